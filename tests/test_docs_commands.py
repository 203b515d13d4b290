"""The commands of pages that start a server: each does, with a tiny model in place of the reader's; `make serve` from a checkout too."""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.pages import ROOT, blocks
from tests.test_docs_examples import read_until_served
from tests.tiny_models import build_tiny

MODEL = "/models/Qwen3-0.6B"
STARTED = ("docs/tutorial.md", "docs/migration.md")
COMMANDS = sorted(
    {
        line
        for block in blocks()
        if not block.run and block.language == "bash" and block.place.startswith(STARTED)
        for line in block.text.replace("\\\n", " ").splitlines()
    }
)


def as_run(command: str, directory: Path) -> list[str]:
    """The words of the command with a tiny model, a free port and this environment's programs. Any other kind of command is an error."""
    words = shlex.split(command)
    if words == ["make", "serve"]:
        environment = directory / "environment"
        (environment / "bin").mkdir(parents=True)
        (environment / "bin" / "deepseek-serve").symlink_to(Path(sys.executable).parent / "deepseek-serve")
        (environment / ".serve").touch()
        return [*words, f"VENV={environment}", "ARGS=--port 0"]
    if words[0] != "deepseek-serve":
        raise ValueError(f"no check knows {command}")
    if MODEL in words:
        words[words.index(MODEL)] = str(build_tiny(directory / "model", "qwen3", max_position_embeddings=8192))
    # The last of two is what counts.
    return [str(Path(sys.executable).parent / words[0]), *words[1:], "--port", "0"]


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_it_serves(command: str, tmp_path: Path) -> None:
    if command.startswith("make") and shutil.which("make") is None:
        pytest.skip("make is not installed")
    clean = {name: value for name, value in os.environ.items() if not name.upper().startswith("DEEPSEEK_")}
    with subprocess.Popen(
        as_run(command, tmp_path), cwd=ROOT, stdout=subprocess.PIPE, text=True, env=clean, start_new_session=True
    ) as process:
        try:
            assert read_until_served(process).startswith("http://127.0.0.1:")
        finally:
            os.killpg(process.pid, signal.SIGTERM)
            process.communicate(timeout=60)


def test_each_kind_is_there(tmp_path: Path) -> None:
    assert "make serve" in COMMANDS and len(COMMANDS) >= 4
    with pytest.raises(ValueError, match="no check knows"):
        as_run("vllm serve x", tmp_path)
