"""Commands as processes: started with a clean environment, read line by line, always ended."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from tests.tiny_models import build_tiny


class Command:
    """A running command, through torch unless it is told otherwise.

    Reading to the end of its pipes means that it and every child of it are gone.
    """

    def __init__(self, module: str, arguments: Sequence[str], environment: dict[str, str]) -> None:
        clean = {name: value for name, value in os.environ.items() if not name.upper().startswith("DEEPSEEK_")}
        self.process = subprocess.Popen(
            [sys.executable, "-m", module, *arguments],
            env={**clean, "DEEPSEEK_REGISTRY": "none", "DEEPSEEK_BACKEND": "torch", **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.lines: list[str] = []

    def read_until(self, start: str) -> str:
        """The rest of the first line of stdout that begins with `start`."""
        for line in self.process.stdout or ():
            self.lines.append(line.rstrip("\n"))
            if line.startswith(start):
                return line.removeprefix(start).strip()
        raise AssertionError(f"no line {start!r}: {self.lines} {self.process.stderr.read() if self.process.stderr else ''}")

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def end(self) -> tuple[int, str, str]:
        """Wait for the end: exit code, the rest of stdout, stderr."""
        out, error = self.process.communicate(timeout=90)
        return self.process.returncode, out, error


Start = Callable[..., Command]


@pytest.fixture
def start() -> Iterator[Start]:
    started: list[Command] = []

    def begin(module: str, *arguments: str, **environment: str) -> Command:
        started.append(Command(module, arguments, environment))
        return started[-1]

    yield begin
    for command in started:
        if command.process.poll() is None:
            command.process.kill()
            command.process.communicate()


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny(tmp_path_factory.mktemp("models") / "tiny", "qwen3")


@pytest.fixture(scope="module")
def served(tiny: Path) -> Iterator[tuple[str, Command]]:
    """A server of the tiny model for a whole file: its URL and command."""
    command = Command("service.cli.serve", ["--model", str(tiny), "--port", "0", "--batch_size", "8"], {})
    try:
        url = command.read_until("serving tiny on ")
        command.read_until("try: ")
        yield url, command
        command.signal(signal.SIGINT)
        code, _, error = command.end()
        assert code == 0 and "Traceback" not in error, error
    finally:
        if command.process.poll() is None:
            command.process.kill()
            command.process.communicate()


@pytest.fixture
def taken_port() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener.getsockname()[1]
