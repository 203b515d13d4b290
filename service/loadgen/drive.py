"""Running a load: warm-up, then an open or a closed loop, every request watched from its due time to its end.

It does not know HTTP or how results are shown. Invariant: every request that was due has one finished watch in the result; an open loop
sends when a request is due and never waits for an answer.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass

from service.loadgen.arrivals import Load, abort_choices, due_times
from service.loadgen.prompts import Requests
from service.loadgen.senders import Sender
from service.loadgen.watch import SendFailure, Watch

Progress = Callable[[Watch], None]
Prepared = tuple[str, bytes]
# Made before the clock starts, so that making them delays nothing; a soak of millions makes the rest as it goes.
READY_BODIES = 50_000


@dataclass(frozen=True, slots=True)
class Measured:
    """A finished load: its watches, the seconds from its start to its last end, the sender's CPU seconds, and details of failures."""

    watches: list[Watch]
    duration_s: float
    cpu_s: float
    failures: dict[str, str]


class Drive:
    """One load against one server."""

    def __init__(self, sender: Sender, plan: Requests, load: Load, progress: Progress = lambda watch: None) -> None:
        self._sender, self._plan, self._load, self._progress = sender, plan, load, progress
        self._failures: dict[str, str] = {}

    async def run(self) -> Measured:
        """Warm up, measure, and return every watch."""
        load = self._load
        await self._closed([Watch() for _ in range(load.warmup)], load.requests, float("inf"))
        self._failures.clear()
        times = due_times(load) if load.mode == "open" else [0.0] * load.requests
        aborts = abort_choices(load.abort_share, load.requests, load.seed)
        ready = [(self._plan.path(index), self._plan.body(index)) for index in range(min(len(times), READY_BODIES))]
        watches = [Watch(due, abort) for due, abort in zip(times, aborts, strict=False)]
        for index, watch in enumerate(watches):
            watch.kind = self._plan.kind(index)
        started_s, started_cpu_s = time.perf_counter(), time.process_time()
        if load.mode == "open":
            for watch in watches:
                watch.due_s += started_s
            await self._open(watches, ready)
        else:
            await self._closed(watches, 0, started_s + (load.max_seconds or float("inf")), ready)
            watches = [watch for watch in watches if watch.outcome]
        end_s = max((watch.end_s for watch in watches), default=started_s)
        return Measured(watches, end_s - started_s, time.process_time() - started_cpu_s, dict(self._failures))

    async def _open(self, watches: list[Watch], ready: list[Prepared]) -> None:
        async with asyncio.TaskGroup() as group:
            for index, watch in enumerate(watches):
                wait_s = watch.due_s - time.perf_counter()
                if wait_s > 0:
                    await asyncio.sleep(wait_s)
                group.create_task(self._one(watch, *self._prepared(index, ready)))

    async def _closed(self, watches: list[Watch], first: int, until_s: float, ready: list[Prepared] | None = None) -> None:
        waiting = iter(range(len(watches)))

        async def client() -> None:
            for index in waiting:
                watches[index].due_s = time.perf_counter()
                if watches[index].due_s > until_s:
                    return
                await self._one(watches[index], *self._prepared(first + index, ready or []))

        async with asyncio.TaskGroup() as group:
            for _ in range(min(self._load.concurrency, len(watches))):
                group.create_task(client())

    def _prepared(self, index: int, ready: list[Prepared]) -> Prepared:
        return ready[index] if index < len(ready) else (self._plan.path(index), self._plan.body(index))

    async def _one(self, watch: Watch, path: str, body: bytes) -> None:
        failure: SendFailure | None = None
        try:
            async with asyncio.timeout(self._load.timeout_s):
                await self._sender.stream(path, body, watch)
        except SendFailure as caught:
            failure = caught
        except TimeoutError:
            failure = SendFailure("timeout", f"no end within {self._load.timeout_s} s")
        watch.finish(time.perf_counter(), failure)
        if failure is not None:
            self._failures.setdefault(failure.kind, failure.detail)
        self._progress(watch)
