"""`deepseek-versions` end to end on a registry of its own, and `deepseek-serve --restore` on what it served before."""

from __future__ import annotations

import json
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest

from service.checkpoints.manifest import read_manifest
from service.checkpoints.registry import Registry
from service.cli import versions
from service.config.bundled import bundled_source
from tests.cli.conftest import Start
from tests.tiny_models import build_tiny

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Run:
    def begin(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["deepseek-versions", *map(str, arguments), "--registry", str(tmp_path / "registry")])
        code = versions.main()
        return (code, *capsys.readouterr())

    return begin


def test_register_verify_show_list(run: Run) -> None:
    directory = bundled_source("2.3").directory
    manifest = read_manifest(Path(directory))
    name = f"v2.3@{manifest.digest[:12]}"
    assert run("register", directory) == (0, f"registered {name}: {directory}\n", "")
    code, out, _ = run("verify", "v2.3")
    assert code == 0 and out.startswith(f"verified {directory}: every file")
    code, out, _ = run("show", manifest.digest[:12])
    assert code == 0 and out.splitlines()[0] == name and "verified with  python" in out and "differs here" not in out
    code, out, _ = run("list")
    assert code == 0 and name in out and "v2.3" in out


def test_a_directory_is_verified_without_being_registered_first(run: Run) -> None:
    assert run("verify", bundled_source("2.3").directory)[0] == 0
    assert "verified " in run("show", "v2.3")[1]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("show",), "show needs a name"),
        (("list", "v2.3"), "list takes no name"),
        (("show", "v9.9"), "the registry has no 'v9.9'"),
        (("register", "nowhere"), "nowhere is not a directory"),
        (("forget", "v2.3"), "invalid choice"),
    ],
)
def test_wrong_use(run: Run, arguments: tuple[str, ...], words: str) -> None:
    code, out, error = run(*arguments)
    assert code == 2 and out == "" and words in error and error.count("\n") == 1


def test_what_changed_under_its_name_is_not_verified(run: Run, tmp_path: Path) -> None:
    directory = build_tiny(tmp_path / "theirs")
    assert run("register", directory)[0] == 0
    digest = read_manifest(directory).digest
    build_tiny(directory, seed=5)
    code, _, error = run("verify", digest[:12])
    assert code == 2 and "no longer holds" in error


def test_restore_serves_what_was_served_last(start: Start, tmp_path: Path) -> None:
    registry = str(tmp_path / "registry")
    tiny = build_tiny(tmp_path / "tiny")
    code, _, error = start("service.cli.serve", "--restore", "--registry", registry, "--port", "0").end()
    assert code == 2 and "--restore finds nothing" in error
    for flags in (("--model", f"mine={tiny}"), ("--restore",)):
        command = start("service.cli.serve", *flags, "--registry", registry, "--port", "0", "--batch_size", "2")
        command.read_until("serving mine on ")
        command.signal(signal.SIGTERM)
        assert command.end()[0] == 0
    (artifact,) = Registry(Path(registry)).artifacts()
    assert artifact.served is not None and artifact.directory == str(tiny)
    build_tiny(tiny, seed=5)
    code, _, error = start("service.cli.serve", "--restore", "--registry", registry, "--port", "0").end()
    assert code == 2 and "is not what was served as mine" in error


def test_restore_brings_back_what_was_loaded_on_demand_and_not_what_never_was(start: Start, tmp_path: Path) -> None:
    registry = str(tmp_path / "registry")
    flags = [part for name in ("first", "asked", "never") for part in ("--model", f"{name}={build_tiny(tmp_path / name, seed=len(name))}")]
    common = ("--registry", registry, "--port", "0", "--batch_size", "2", "--kv_bytes", "16MiB")
    command = start("service.cli.serve", *flags, "--load", "demand", *common)
    url = command.read_until("serving first, asked, never on ")
    httpx.post(f"{url}/v1/completions", json={"model": "asked", "prompt": "a", "max_tokens": 1}, timeout=60).raise_for_status()
    command.signal(signal.SIGTERM)
    assert command.end()[0] == 0
    assert [source.name for source, _ in Registry(Path(registry)).last_good()] == ["first", "asked"]
    command = start("service.cli.serve", "--restore", *common)
    assert command.read_until("loaded when asked for: ") == "asked"
    command.read_until("serving first, asked on ")
    command.signal(signal.SIGTERM)
    assert command.end()[0] == 0
    # Nobody asked for it in that run; it is as good as it was.
    assert [source.name for source, _ in Registry(Path(registry)).last_good()] == ["first", "asked"]


def test_another_environment_is_reported_when_it_is_served(start: Start, tmp_path: Path) -> None:
    directory = Path(shutil.copytree(bundled_source("2.3").directory, tmp_path / "model"))
    manifest = json.loads((directory / "manifest.json").read_text())
    (directory / "manifest.json").write_text(json.dumps({**manifest, "lock": {"numpy": "0.1"}}))
    command = start("service.cli.serve", "--model", str(directory), "--port", "0", "--batch_size", "2")
    command.read_until("serving model on ")
    command.signal(signal.SIGTERM)
    events = [json.loads(line) for line in command.end()[2].splitlines() if '"environment_differs"' in line]
    assert len(events) == 1 and events[0]["published_with"][0].startswith("numpy 0.1, here ")
