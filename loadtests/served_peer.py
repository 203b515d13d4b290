"""Our own service as a peer of `engine_speed`: the same weights and flags behind HTTP, so that the ratio is what HTTP costs.

One streaming request a sequence, all sent at once over sockets of their own, read by one loop that does not parse what it reads until the
round is over: the client shares the machine with what it measures. Invariant: the service runs in a process of its own with its own worker.
"""

from __future__ import annotations

import json
import re
import selectors
import socket
import subprocess
import sys
import time
from bisect import bisect_right
from pathlib import Path
from typing import Any

from loadtests.first_token import TIMEOUT_S, free_port, wait_ready
from loadtests.peers import Speed
from service import __version__
from service.cli.local_engine import round_of

COUNT = re.compile(rb'"completion_tokens": ?(\d+)')
ROUND_S = 600.0


def memory_of(parent: int) -> dict[str, int]:
    """Bytes of a service's processes: its own, and those of the worker, the largest of its children; shared pages in parts (Linux)."""

    def proportional(process: int) -> int:
        rollup = Path(f"/proc/{process}/smaps_rollup").read_text()
        return 1024 * next(int(line.split()[1]) for line in rollup.splitlines() if line.startswith("Pss:"))

    children = [int(word) for path in Path(f"/proc/{parent}/task").glob("*/children") for word in path.read_text().split()]
    return {"front_end": proportional(parent), "worker": max(map(proportional, children), default=0)}


class _Stream:
    """One streaming request on a socket of its own: what came of its answer, and when its pieces came."""

    def __init__(self, port: int, prompt: tuple[int, ...], generate: int) -> None:
        asked = {"prompt": prompt, "max_tokens": generate, "stream": True, "temperature": 0, "ignore_eos": True}
        body = json.dumps({**asked, "stream_options": {"include_usage": True, "continuous_usage_stats": True}}).encode()
        head = "POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
        head += f"connection: close\r\ncontent-length: {len(body)}\r\n\r\n"
        self.socket = socket.create_connection(("127.0.0.1", port), ROUND_S)
        self.socket.sendall(head.encode() + body)
        self._came = b""
        self._times_s: list[float] = []
        self._ends: list[int] = []

    def read(self) -> bool:
        """Take what has come; whether the service has closed the connection."""
        piece = self.socket.recv(1 << 16)
        if not piece:
            self.socket.close()
            return True
        self._came += piece
        self._times_s.append(time.perf_counter())
        self._ends.append(len(self._came))
        return False

    def arrivals(self, generate: int) -> list[tuple[float, int]]:
        """When tokens came, and how many at a time. Raises RuntimeError unless they are so many."""
        found, made = [], 0
        for match in COUNT.finditer(self._came):
            if (total := int(match[1])) > made:
                found.append((self._times_s[bisect_right(self._ends, match.start())], total - made))
                made = total
        if made != generate:
            raise RuntimeError(f"asked for {generate} tokens, the service answered {made or self._came[:500]!r}")
        return found


class ServedPeer:
    """`deepseek-serve` on a directory with some flags, and a client of it."""

    def __init__(self, directory: Path, cache: Path, flags: list[str]) -> None:
        """`cache` keeps quantised weights."""
        self._port = free_port()
        command = [sys.executable, "-m", "service.cli.serve", "--model", f"bench={directory}", "--port", str(self._port)]
        command += ["--quantize_cache", str(cache), *flags]
        self._process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        wait_ready(self._port, time.perf_counter() + TIMEOUT_S)
        self.about: dict[str, Any] = {"version": __version__, "flags": flags, "ready": memory_of(self._process.pid)}

    def run(self, texts: list[tuple[int, ...]], generate: int) -> Speed:
        """One round. Raises RuntimeError where an answer is not what was asked for."""
        began = time.perf_counter()
        streams = [_Stream(self._port, text, generate) for text in texts]
        with selectors.DefaultSelector() as selector:
            for stream in streams:
                selector.register(stream.socket, selectors.EVENT_READ, stream)
            while selector.get_map():
                ready = selector.select(ROUND_S)
                if not ready:
                    raise RuntimeError(f"the service said nothing for {ROUND_S:.0f} s")
                for key, _ in ready:
                    if key.data.read():
                        selector.unregister(key.fileobj)
        found = [stream.arrivals(generate) for stream in streams]
        self.about["after_requests"] = memory_of(self._process.pid)
        spent = round_of(began, sum(len(text) for text in texts), found)
        return Speed(spent.prefill, spent.decode)

    def close(self) -> None:
        """End the service."""
        self._process.terminate()
        self._process.wait(60)
