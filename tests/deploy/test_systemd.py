"""The systemd unit: systemd reads it without complaint, it leaves the service little, and it ends the service the way that it drains."""

from __future__ import annotations

import configparser
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from service.api.server import CLOSE_S
from service.config.load import load_settings
from tests.house.source import ROOT

SYSTEMD = ROOT / "deploy" / "systemd"
ANALYZE = shutil.which("systemd-analyze")
needs_systemd = pytest.mark.skipif(ANALYZE is None, reason="systemd-analyze is not installed")


def section(name: str, part: str) -> dict[str, str]:
    parser = configparser.ConfigParser(interpolation=None, strict=False)
    parser.optionxform = str  # type: ignore[assignment,method-assign]
    parser.read_string((SYSTEMD / name).read_text("utf-8"))
    return dict(parser[part])


UNIT = section("deepseek-serve.service", "Service")


def placed(directory: Path, *, gpu: bool) -> Path:
    """The unit as it would lie in /etc, its program replaced by one that exists."""
    unit = directory / "deepseek-serve.service"
    text = (SYSTEMD / unit.name).read_text("utf-8")
    unit.write_text(re.sub(r"^ExecStart=\S+", f"ExecStart={sys.executable}", text, flags=re.MULTILINE), "utf-8")
    if gpu:
        (directory / "deepseek-serve.service.d").mkdir()
        shutil.copy(SYSTEMD / "gpu.conf", directory / "deepseek-serve.service.d")
    return unit


def analyze(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    assert ANALYZE is not None
    return subprocess.run([ANALYZE, *arguments], capture_output=True, text=True, check=False, timeout=60)


@needs_systemd
@pytest.mark.parametrize("gpu", [False, True])
def test_systemd_reads_it(tmp_path: Path, gpu: bool) -> None:
    done = analyze("verify", "--man=no", "--recursive-errors=no", placed(tmp_path, gpu=gpu))
    assert (done.returncode, done.stderr) == (0, "")


@needs_systemd
def test_a_misspelt_directive_is_seen(tmp_path: Path) -> None:
    unit = placed(tmp_path, gpu=False)
    unit.write_text(unit.read_text("utf-8").replace("KillMode=", "KillMoode="), "utf-8")
    assert "KillMoode" in analyze("verify", "--man=no", "--recursive-errors=no", unit).stderr


@needs_systemd
def test_it_leaves_little(tmp_path: Path) -> None:
    done = analyze("security", "--offline=true", "--json=short", "--threshold=20", placed(tmp_path, gpu=False))
    assert done.returncode == 0, done.stdout[-3000:]  # an exposure of at most 2.0 of 10
    assert json.loads(done.stdout)


def test_it_ends_the_service_by_a_drain(tmp_path: Path) -> None:
    settings = load_settings(["--config", str(SYSTEMD / "service.yaml")])
    assert int(UNIT["TimeoutStopSec"]) >= settings.http.drain_s + CLOSE_S + 10
    assert UNIT["KillMode"] == "mixed"  # a worker that is ended is started again in the middle of the drain
    assert UNIT["OOMPolicy"] == "continue"  # and one killed for memory is the supervisor's matter
    assert UNIT["RestartPreventExitStatus"] == "2"


def test_its_command_is_ours() -> None:
    program, *arguments = UNIT["ExecStart"].split()
    assert Path(program).name == "deepseek-serve" and arguments == ["--config", "/etc/deepseek/service.yaml"]
    assert Path(sys.executable).with_name("deepseek-serve").exists()


def test_what_it_keeps_lies_where_it_may_write() -> None:
    assert UNIT["ProtectSystem"] == "strict" and UNIT["CacheDirectory"] == "deepseek"
    settings = load_settings(["--config", str(SYSTEMD / "service.yaml")])
    assert settings.engine.quantize_cache.startswith("/var/cache/deepseek/")
    assert section("gpu.conf", "Service")["Environment"].startswith("TRITON_CACHE_DIR=/var/cache/deepseek/")
