"""Programs of other projects that the tests of deploy/ run, and commands of ours as processes."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.house.source import ROOT

DEPLOY = ROOT / "deploy"
TOOLS = ROOT / ".tools" / "usr" / "bin"


def program(name: str) -> str:
    """The path of a program, installed or unpacked by `make tools`; the test is skipped where it is missing."""
    found = shutil.which(name, path=f"{TOOLS}{os.pathsep}{os.environ.get('PATH', '')}")
    if found is None:
        pytest.skip(f"{name} is not there: run `make tools` (Debian) or install it")
    return found


def free_port() -> int:
    """A port that nobody has now."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


@contextmanager
def serving(directory: Path, *arguments: str) -> Iterator[str]:
    """deepseek-serve over a model directory under the name `tiny`; gives its address."""
    command = [sys.executable, "-m", "service.cli.serve", "--model", f"tiny={directory}", "--port", "0", *arguments]
    clean = {name: value for name, value in os.environ.items() if not name.upper().startswith("DEEPSEEK_")}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=clean) as process:
        try:
            lines: list[str] = []
            for line in process.stdout or ():
                lines.append(line)
                if match := re.match(r"serving .* on (http://\S+)", line):
                    yield match[1]
                    break
            else:
                raise AssertionError("".join(lines))
            process.send_signal(signal.SIGINT)
            process.communicate(timeout=60)
        finally:
            process.kill()
