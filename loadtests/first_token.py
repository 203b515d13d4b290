"""Seconds from the command to ready and to the first token: `deepseek-serve` is started anew in every round and asked once.

    python -m loadtests.first_token [--rounds 5] [--model DIR] [--keep] [--side="--onnx_runtime" --side="--backend torch"]

The first round warms the disk cache and is not counted. The clock starts before the process is spawned; the request is sent as soon as the
address answers and /ready says so, streaming, and the clock stops at the first chunk that carries text. Each `--side` is a set of flags of
the service; they alternate, and each makes a row.
"""

from __future__ import annotations

import argparse
import http.client
import json
import shlex
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from loadtests.rows import keep, spread, surroundings

TIMEOUT_S = 120.0
POLL_S = 0.01


def free_port() -> int:
    """A port of the loopback address that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_ready(port: int, deadline_s: float) -> None:
    """Return when /ready answers 200."""
    while time.perf_counter() < deadline_s:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
        try:
            connection.request("GET", "/ready")
            if connection.getresponse().status == 200:
                return
        except OSError:
            pass
        finally:
            connection.close()
        time.sleep(POLL_S)
    raise TimeoutError("the service did not become ready")


def ask(port: int) -> float:
    """Send one streaming request; the time at which its first text arrived."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    body = json.dumps({"prompt": "def fibonacci(n):\n", "max_tokens": 8, "stream": True, "temperature": 0})
    connection.request("POST", "/v1/completions", body, {"content-type": "application/json"})
    answer = connection.getresponse()
    while line := answer.readline():
        if line.startswith(b"data: {") and json.loads(line[6:])["choices"][0].get("text"):
            found = time.perf_counter()
            connection.close()
            return found
    raise RuntimeError("the stream ended without text")


def one_round(model: Path | None, flags: str = "") -> tuple[float, float]:
    """Seconds to ready and to the first token of a fresh process."""
    port = free_port()
    command = [str(Path(sys.executable).parent / "deepseek-serve"), "--port", str(port), *shlex.split(flags)]
    if model is not None:
        command += ["--model", str(model)]
    began_s = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait_ready(port, began_s + TIMEOUT_S)
        ready_s = time.perf_counter()
        return ready_s - began_s, ask(port) - began_s
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(30)


def main() -> None:
    """Measure, print the row, keep it when asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--model", type=Path, default=None)
    parser.add_argument("--side", action="append", default=None, metavar="FLAGS", help="flags of the service; repeatable")
    parser.add_argument("--keep", action="store_true", help="append the row to results/first_token.jsonl")
    options = parser.parse_args()
    around = surroundings()
    sides = options.side or [""]
    rounds = [[one_round(options.model, flags) for flags in sides] for _ in range(options.rounds + 1)][1:]
    for flags, found in zip(sides, zip(*rounds, strict=True), strict=True):
        row: dict[str, Any] = {
            "what": "first_token",
            "model": options.model.name if options.model else "bundled",
            "flags": flags,
            **around,
            "ready_s": spread([ready for ready, _ in found]),
            "first_token_s": spread([first for _, first in found]),
        }
        print(json.dumps(row))
        if options.keep:
            keep("first_token", row)


if __name__ == "__main__":
    main()
