"""Every fenced block that is marked to be run does run, as a reader would run it, against a server of the bundled model or a tiny one."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from service.checkpoints.bundled import complete_lines
from tests.pages import ROOT, Block, blocks
from tests.tiny_models import build_tiny

EXAMPLE_URL = "http://127.0.0.1:8000"


@pytest.fixture(scope="module")
def server_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server on a free port: of the bundled model, or of a tiny one under its name where none is bundled."""
    arguments = ["--port", "0"]
    if not complete_lines():
        tiny = build_tiny(tmp_path_factory.mktemp("docs") / "tiny", "qwen3", max_position_embeddings=1024)
        arguments += ["--model", f"v2.3={tiny}"]
    clean = {name: value for name, value in os.environ.items() if not name.upper().startswith("DEEPSEEK_")}
    with subprocess.Popen(
        [sys.executable, "-m", "service.cli.serve", *arguments], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=clean
    ) as process:
        try:
            yield read_until_served(process)
            process.send_signal(signal.SIGINT)
            process.communicate(timeout=60)
        finally:
            process.kill()


def read_until_served(process: subprocess.Popen[str]) -> str:
    lines: list[str] = []
    for line in process.stdout or ():
        lines.append(line)
        if match := re.match(r"serving .* on (http://\S+)", line):
            return match[1]
    raise AssertionError("".join(lines))


def run_block(block: Block, url: str, directory: Path) -> subprocess.CompletedProcess[str]:
    """Run a block as a reader would, against `url`; an error answer fails curl. Commands of this environment come first."""
    text = block.text.replace(EXAMPLE_URL, url)
    if block.language == "bash":
        text = 'curl() { command curl --silent --show-error --fail-with-body "$@"; }\n' + text
    command = [sys.executable, "-c", text] if block.language == "python" else ["bash", "-euo", "pipefail", "-c", text]
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"}
    return subprocess.run(command, cwd=directory, env=environment, capture_output=True, text=True, check=False, timeout=90)


RUNNABLE = [block for block in blocks() if block.run]


@pytest.mark.parametrize("block", RUNNABLE, ids=lambda block: block.place)
def test_examples_run(block: Block, server_url: str, tmp_path: Path) -> None:
    if "curl" in block.text and shutil.which("curl") is None:
        pytest.skip("curl is not installed")
    assert EXAMPLE_URL in block.text
    (tmp_path / "loadtests").symlink_to(ROOT / "loadtests")
    done = run_block(block, server_url, tmp_path)
    assert done.returncode == 0, (done.stdout[-2000:], done.stderr[-2000:])
    assert done.stdout.strip()


def test_a_failing_example_is_seen(tmp_path: Path) -> None:
    assert {block.language for block in RUNNABLE} == {"bash", "python"} and len(RUNNABLE) >= 5
    assert run_block(Block("", "bash", True, "false | cat\n"), EXAMPLE_URL, tmp_path).returncode != 0
    assert run_block(Block("", "python", True, "raise SystemExit(3)\n"), EXAMPLE_URL, tmp_path).returncode == 3
