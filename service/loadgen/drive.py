"""Running a load: warm-up, then an open or a closed loop, every request watched from its due time to its end.

It does not know HTTP or how results are shown. Invariant: every request that was due has one finished watch in the result; an open loop
sends when a request is due and never waits for an answer.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass

from service.loadgen.arrivals import Load, abort_choices, poisson_times
from service.loadgen.prompts import PromptPlan
from service.loadgen.senders import Sender
from service.loadgen.watch import SendFailure, Watch

Progress = Callable[[Watch], None]


@dataclass(frozen=True, slots=True)
class Measured:
    """A finished load: its watches, the seconds from its start to its last end, the sender's CPU seconds, and details of failures."""

    watches: list[Watch]
    duration_s: float
    cpu_s: float
    failures: dict[str, str]


class Drive:
    """One load against one server."""

    def __init__(self, sender: Sender, plan: PromptPlan, load: Load, progress: Progress = lambda watch: None) -> None:
        self._sender, self._plan, self._load, self._progress = sender, plan, load, progress
        self._path = f"/v1/{plan.path}"
        self._failures: dict[str, str] = {}

    async def run(self) -> Measured:
        """Warm up, measure, and return every watch."""
        load = self._load
        await self._closed([Watch() for _ in range(load.warmup)], first=load.requests)
        self._failures.clear()
        bodies = [self._plan.body(index) for index in range(load.requests)]
        aborts = abort_choices(load.abort_share, load.requests, load.seed)
        started_s, started_cpu_s = time.perf_counter(), time.process_time()
        if load.mode == "open":
            times = poisson_times(load.rate, load.requests, load.seed)
            watches = [Watch(started_s + due, abort) for due, abort in zip(times, aborts, strict=True)]
            await self._open(watches, bodies)
        else:
            watches = [Watch(abort=abort) for abort in aborts]
            await self._closed(watches, bodies=bodies)
        end_s = max((watch.end_s for watch in watches), default=started_s)
        return Measured(watches, end_s - started_s, time.process_time() - started_cpu_s, dict(self._failures))

    async def _open(self, watches: list[Watch], bodies: list[bytes]) -> None:
        async with asyncio.TaskGroup() as group:
            for watch, body in zip(watches, bodies, strict=True):
                wait_s = watch.due_s - time.perf_counter()
                if wait_s > 0:
                    await asyncio.sleep(wait_s)
                group.create_task(self._one(watch, body))

    async def _closed(self, watches: list[Watch], *, first: int = 0, bodies: list[bytes] | None = None) -> None:
        waiting = iter(range(len(watches)))

        async def client() -> None:
            for index in waiting:
                watches[index].due_s = time.perf_counter()
                await self._one(watches[index], bodies[index] if bodies else self._plan.body(first + index))

        async with asyncio.TaskGroup() as group:
            for _ in range(min(self._load.concurrency, len(watches))):
                group.create_task(client())

    async def _one(self, watch: Watch, body: bytes) -> None:
        failure: SendFailure | None = None
        try:
            async with asyncio.timeout(self._load.timeout_s):
                await self._sender.stream(self._path, body, watch)
        except SendFailure as caught:
            failure = caught
        except TimeoutError:
            failure = SendFailure("timeout", f"no end within {self._load.timeout_s} s")
        watch.finish(time.perf_counter(), failure)
        if failure is not None:
            self._failures.setdefault(failure.kind, failure.detail)
        self._progress(watch)
