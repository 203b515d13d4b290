"""What streaming through this server costs: per-token latency beside a bare starlette + uvicorn app, and the parent's CPU for each token.

The worker is the tests' fake one, so there is no model time: a step every `--step_ms` gives each of the lockstep streams one token. A lean
client in another process reads raw sockets and notes when each token arrives. Both servers send the same number of bytes a token. A token's
latency is its arrival minus the moment its step ended, as noted where the tokens became available. One JSON row for each run;
`--keep` appends it to results/stream_overhead.jsonl. Run from the repository's root:

    python -m loadtests.stream_overhead --streams 256 --keep
"""

from __future__ import annotations

import argparse
import asyncio
import bisect
import contextlib
import json
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import StreamingResponse
from starlette.routing import Route

from loadtests import rows
from service.api.app import build_app
from service.api.server import HttpServer, bind, build_server, run
from service.telemetry import Telemetry
from service.types.plan import BatchPlan, SampledToken, StepResult, Want
from service.types.settings import HttpSettings, SchedulerSettings
from tests.api.conftest import BYTE_CODEC
from tests.fakes import FakeBackend, FakeBehaviour, FakeManifest, fake_router, fake_spec

PROMPT = "hello"
WANT_TOKEN = int(Want.TOKEN)
MARK = b'"text":'


class Beats:
    """When each step's tokens became available, and the process's CPU time then."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self.cpu_s: list[float] = []

    def note(self) -> None:
        """A step's tokens are here."""
        self.times.append(time.monotonic())
        self.cpu_s.append(time.process_time())


class LeanBackend(FakeBackend):
    """The fake worker without its checks: the same token for every row that wants one, at no cost to speak of."""

    def __init__(self, streams: int, step_s: float) -> None:
        super().__init__(max_rows=streams, max_step_tokens=streams * len(PROMPT), behaviour=FakeBehaviour(step_s=step_s, start_s=0.0))
        self.beats = Beats()

    def execute(self, plan: BatchPlan) -> asyncio.Future[StepResult]:
        """Answer after the step's time."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[StepResult] = loop.create_future()
        tokens = tuple(SampledToken(piece.row, 97) for piece in plan.slices if int(piece.want) & WANT_TOKEN)
        loop.call_later(self.behaviour.step_s, self._answer, future, StepResult(plan.step, tokens, execute_s=self.behaviour.step_s))
        return future

    def _answer(self, future: asyncio.Future[StepResult], result: StepResult) -> None:
        self.beats.note()
        future.set_result(result)


class Ticker:
    """The bare app's source of tokens: wakes every stream at once, `tokens` times, when all of them are there."""

    def __init__(self, streams: int, tokens: int, step_s: float) -> None:
        self.streams, self.tokens, self.step_s = streams, tokens, step_s
        self.beats = Beats()
        self._queues: list[asyncio.Queue[bytes | None]] = []
        self._task: asyncio.Task[None] | None = None

    def join(self) -> asyncio.Queue[bytes | None]:
        """The queue of one more stream."""
        queue: asyncio.Queue[bytes | None] = asyncio.Queue()
        self._queues.append(queue)
        if len(self._queues) == self.streams:
            self._task = asyncio.ensure_future(self._tick())
        return queue

    async def _tick(self) -> None:
        chunk = b"data: " + json.dumps(_chunk("a"), separators=(",", ":")).encode() + b"\n\n"
        for _ in range(self.tokens):
            await asyncio.sleep(self.step_s)
            self.beats.note()
            for queue in self._queues:
                queue.put_nowait(chunk)
        for queue in self._queues:
            queue.put_nowait(None)


def _chunk(text: str) -> dict[str, Any]:
    choice = {"index": 0, "text": text, "logprobs": None, "finish_reason": None}
    return {"id": "cmpl-" + "0" * 24, "object": "text_completion", "created": 1_700_000_000, "model": "fake", "choices": [choice]}


def bare_app(ticker: Ticker) -> Starlette:
    """The comparison: what a few lines of starlette do."""

    async def stream(request: Request) -> StreamingResponse:
        await request.body()
        queue = ticker.join()

        async def chunks() -> Any:
            while (chunk := await queue.get()) is not None:
                yield chunk

        return StreamingResponse(chunks(), media_type="text/event-stream")

    return Starlette(routes=[Route("/v1/completions", stream, methods=["POST"])])


@contextlib.asynccontextmanager
async def serving(server: HttpServer, listener: socket.socket) -> AsyncIterator[int]:
    """Run a server; gives its port."""
    task = asyncio.ensure_future(server.serve(sockets=[listener]))
    await server.accepting.wait()
    try:
        yield listener.getsockname()[1]
    finally:
        server.should_exit = True
        await task


async def drive(port: int, streams: int, tokens: int) -> list[list[float]]:
    """Arrival times by stream, from the client process."""
    arguments = [
        sys.executable,
        "-m",
        "loadtests.stream_overhead",
        "--client",
        str(port),
        "--streams",
        str(streams),
        "--tokens",
        str(tokens),
    ]
    process = await asyncio.create_subprocess_exec(*arguments, stdout=subprocess.PIPE)
    output, _ = await process.communicate()
    arrivals: list[list[float]] = json.loads(output)
    return arrivals


def summary(arrivals: list[list[float]], beats: Beats) -> dict[str, float]:
    """Percentiles in ms of a token's arrival minus its step's end, and CPU for each token, over the steps in which all streams ran.

    A token belongs to the last step that ended before it arrived: a step must be longer than the latency.
    """
    first = max(times[0] for times in arrivals)
    last = min(times[-1] for times in arrivals)
    waits = [
        (arrived - beats.times[bisect.bisect_right(beats.times, arrived) - 1]) * 1000
        for times in arrivals
        for arrived in times
        if first < arrived <= last
    ]
    waits.sort()
    steps = [index for index, due in enumerate(beats.times) if first < due <= last]
    cpu_s = beats.cpu_s[steps[-1]] - beats.cpu_s[steps[0]]
    figures = {f"p{share}_ms": round(waits[min(len(waits) - 1, len(waits) * share // 100)], 3) for share in (50, 90, 99)}
    return {**figures, "cpu_us_per_token": round(cpu_s / ((len(steps) - 1) * len(arrivals)) * 1e6, 2)}


async def measure_ours(streams: int, tokens: int, step_s: float) -> dict[str, float]:
    """This server over the lean worker."""
    backend = LeanBackend(streams, step_s)
    settings = SchedulerSettings(batch_size=streams, step_tokens=streams * len(PROMPT), queue_requests=streams)
    router = fake_router(backend, settings, codec=BYTE_CODEC, manifest=FakeManifest(fake_spec()))
    backend.up = True
    await router.start()
    http = HttpSettings(port=0, access_log=False)
    listener = bind(http)
    async with serving(build_server(build_app(router, Telemetry(), http)), listener) as port:
        await drive(port, 1, 4)
        arrivals = await drive(port, streams, tokens)
    await router.close()
    return summary(arrivals, backend.beats)


async def measure_bare(streams: int, tokens: int, step_s: float) -> dict[str, float]:
    """A bare starlette app on uvicorn as it comes."""
    ticker = Ticker(streams, tokens, step_s)
    config = uvicorn.Config(bare_app(ticker), log_level="critical", access_log=False, lifespan="off")
    async with serving(HttpServer(config), bind(HttpSettings(port=0))) as port:
        arrivals = await drive(port, streams, tokens)
    return summary(arrivals, ticker.beats)


class Reader(asyncio.Protocol):
    """One client connection: notes the time for every token chunk."""

    def __init__(self, tokens: int, done: asyncio.Future[list[float]]) -> None:
        self.tokens, self.done = tokens, done
        self.times: list[float] = []

    def data_received(self, data: bytes) -> None:
        """Count chunks; several in one read have one time."""
        now = time.monotonic()
        count = data.count(MARK)
        self.times += [now] * min(count, self.tokens - len(self.times))
        if len(self.times) >= self.tokens and not self.done.done():
            self.done.set_result(self.times)


async def client(port: int, streams: int, tokens: int) -> list[list[float]]:
    """Open all streams, read them to their last token."""
    body = json.dumps({"prompt": PROMPT, "max_tokens": tokens, "stream": True, "temperature": 0}).encode()
    fields = f"content-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
    request = f"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\n{fields}".encode() + body
    loop = asyncio.get_running_loop()
    futures = [loop.create_future() for _ in range(streams)]
    opened = [await loop.create_connection(lambda f=future: Reader(tokens, f), "127.0.0.1", port) for future in futures]
    for transport, _ in opened:
        transport.write(request)
    times = [await future for future in futures]
    for transport, _ in opened:
        transport.close()
    return times


def main() -> None:
    """Measure and print one row."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--streams", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=60)
    parser.add_argument("--step_ms", type=float, default=80.0)
    parser.add_argument("--keep", action="store_true", help="append the row to the results")
    parser.add_argument("--client", type=int, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.client:
        json.dump(run(client(given.client, given.streams, given.tokens)), sys.stdout)
        return
    step_s = given.step_ms / 1000
    bare = run(measure_bare(given.streams, given.tokens, step_s))
    ours = run(measure_ours(given.streams, given.tokens, step_s))
    row = {
        **rows.surroundings(),
        "streams": given.streams,
        "tokens": given.tokens,
        "step_ms": given.step_ms,
        "ours": ours,
        "bare": bare,
        "p99_ratio": round(ours["p99_ms"] / bare["p99_ms"], 3),
    }
    print(json.dumps(row))
    if given.keep:
        rows.keep("stream_overhead", row)


if __name__ == "__main__":
    main()
