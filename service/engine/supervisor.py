"""The parent's side of a worker: start it, send plans, know whether it lives, kill it when it does not, start it again.

Implements `types.plan.Backend`. It does not know torch, models or sequences, and keeps nothing that a new worker would need: after
`WorkerLost` the caller starts again and opens its sequences anew. Invariant: every future that `execute` gave out ends, in order, with its
result or with one WorkerLost for all that were outstanding.
"""

from __future__ import annotations

import asyncio
import dataclasses
import sys
import time
from collections import deque
from collections.abc import Callable
from typing import Any, NamedTuple

from service.engine.messages import Beat, CannotStart, Execute, Fault, Hello, Load, Progress, Ready, Result, ToSupervisor
from service.processes import ChildLost, ChildProcess
from service.types.errors import CapacityError, CheckpointError, StartupError
from service.types.plan import BackendHealth, BackendInfo, BatchPlan, LoadRequest, StepResult, WorkerLost
from service.types.settings import EngineSettings

WORKERS = {"torch": "service.engine.worker", "onnx": "service.engine.onnx_worker"}
OUTSTANDING = 2
# A step may take this many times what the steps before it predict, when that is longer than the deadline set.
DEADLINE_FACTOR = 10.0
# A plan that opens many long sequences at once is the largest message.
FRAME_BYTES = 256 << 20
_ENVIRONMENT = {
    # Extensions that torch would look for among all installed distributions are none of ours.
    "TORCH_DEVICE_BACKEND_AUTOLOAD": "0",
    # Threads that wait for each other spin for milliseconds by default. The front end shares their cores: then each spin holds up the
    # thread waited for (a tiny model's step: 175 ms, 20 ms with this, 2 busy cores; libgomp).
    "GOMP_SPINCOUNT": "1000",
}
_STARTUP_ERRORS: dict[str, type[StartupError]] = {"CapacityError": CapacityError, "CheckpointError": CheckpointError}

ProgressCallback = Callable[[str, float], None]


async def spawn_worker(backend: str = "torch") -> ChildProcess:
    """A blank worker of `backend`: it loads its libraries at once and waits to be told what to serve."""
    return await ChildProcess.spawn(WORKERS[backend], ToSupervisor, environment=_ENVIRONMENT, frame_bytes=FRAME_BYTES)


class Blank(NamedTuple):
    """A blank worker and the backend whose libraries it loads."""

    backend: str
    child: ChildProcess


class _Step(NamedTuple):
    """A plan that was sent: `flops` predict its time."""

    step: int
    flops: float
    future: asyncio.Future[StepResult]


class WorkerBackend:
    """One worker process as the loop sees it. All methods are called from the event loop's thread.

    `child` is a blank worker of the request's backend that was spawned ahead; with `settings.spare_worker` another one is kept ready, so
    that a restart costs a load and not an import (some 200 MB of memory). `on_progress(phase, fraction)` hears how loading goes.
    """

    def __init__(
        self,
        request: LoadRequest,
        settings: EngineSettings,
        *,
        child: ChildProcess | None = None,
        on_progress: ProgressCallback | None = None,
    ) -> None:
        self._request = request
        self._settings = settings
        self._blank = child
        self._on_progress = on_progress
        self._child: ChildProcess | None = None
        self._starting: asyncio.Future[Ready] | None = None
        self._outstanding: deque[_Step] = deque()
        self._state = "down"
        self._restarts = -1
        self._progress = 0
        self._moved_s = self._heard_s = self._began_s = time.monotonic()
        self._cost: Ready | None = None
        self._seconds_per_flop = 0.0
        self._watch: asyncio.TimerHandle | None = None
        self._fault = ""

    async def start(self) -> BackendInfo:
        """Load the checkpoint in a fresh worker. Raises StartupError when that can never work, WorkerLost when the worker died of it."""
        await self._retire("restarted")
        self._restarts += 1
        self._state, self._fault = "loading", ""
        began_s = time.monotonic()
        child, self._blank = self._blank, None
        if child is None or not child.alive:
            child = await spawn_worker(self._request.backend)
        self._child = child
        ready: asyncio.Future[Ready] = asyncio.get_running_loop().create_future()
        self._starting = ready
        try:
            child.listen(self._take, lambda reason: self._lose(child, reason))
            child.send(Load(self._request))
            self._watch_later()
            async with asyncio.timeout(self._settings.load_deadline_s):
                answer = await ready
        except (TimeoutError, asyncio.CancelledError) as error:
            await self._retire("load_deadline")
            if isinstance(error, TimeoutError):
                seconds = self._settings.load_deadline_s
                raise CapacityError(f"The model did not load within --load_deadline_s {seconds:g}: set more seconds.") from None
            raise
        except ChildLost as error:
            await self._retire(error.reason)
            raise WorkerLost(error.reason) from error
        except StartupError as error:
            await self._retire("cannot_start")
            if self._request.backend == "torch" or self._settings.backend != "auto":
                raise
            return await self._fall_back(error)
        finally:
            self._starting = None
        self._cost, self._state, self._seconds_per_flop = answer, "ready", 0.0
        if self._settings.spare_worker:
            self._blank = await spawn_worker(self._request.backend)
            self._blank.listen(_ignore)  # else its beats would be kept for the day when it is needed
        tier = answer.info.tier if self._settings.tier == "auto" else self._settings.tier
        phases = (*answer.info.phases_s, ("start", time.monotonic() - began_s))
        return dataclasses.replace(answer.info, pid=child.pid, tier=tier, phases_s=phases)

    async def _fall_back(self, error: StartupError) -> BackendInfo:
        """What was chosen automatically cannot work: torch serves from now on, and the log says why."""
        print(f"torch serves instead of a graph: {error}", file=sys.stderr, flush=True)
        self._request = dataclasses.replace(self._request, backend="torch")
        self._restarts -= 1
        return await self.start()

    def execute(self, plan: BatchPlan) -> asyncio.Future[StepResult]:
        """Send a plan now. At most two are outstanding; a third raises RuntimeError."""
        future: asyncio.Future[StepResult] = asyncio.get_running_loop().create_future()
        if len(self._outstanding) >= OUTSTANDING:
            raise RuntimeError("two steps are outstanding already")
        if self._child is None or self._state not in ("ready", "stalled"):
            _fail(future, self._fault or "down")
            return future
        try:
            self._child.send(Execute(plan))
        except ChildLost as error:
            _fail(future, self._fault or error.reason)
            return future
        if not self._outstanding:
            self._began_s = self._moved_s = time.monotonic()
        self._outstanding.append(_Step(plan.step, self._flops(plan), future))
        return future

    def health(self) -> BackendHealth:
        """Ready, loading, stalled (no progress for `heartbeat_s`) or down."""
        silent_s = self._silent_s()
        stalled = self._state == "ready" and silent_s > self._settings.heartbeat_s
        return BackendHealth("stalled" if stalled else self._state, silent_s, max(self._restarts, 0))

    async def close(self) -> None:
        """Stop the worker and the spare one; idempotent. A start after it is a first one and no restart."""
        blank, self._blank = self._blank, None
        if blank is not None:
            await blank.stop()
        await self._retire("closed")
        self._restarts = -1

    def _silent_s(self) -> float:
        now = time.monotonic()
        return now - (self._moved_s if self._outstanding else self._heard_s)

    async def _retire(self, reason: str) -> None:
        """End the worker, if there is one, and everything that waits for it."""
        child, self._child = self._child, None
        self._state = "down"
        self._fail_outstanding(reason)
        if self._starting is not None and not self._starting.done():
            self._starting.set_exception(ChildLost(reason))
        if self._watch is not None:
            self._watch.cancel()
            self._watch = None
        if child is not None:
            await child.stop(grace_s=1.0)

    def _take(self, message: Any) -> None:
        self._heard_s = time.monotonic()
        match message:
            case Result(result):
                self._take_result(result)
            case Beat(progress):
                if progress != self._progress:
                    self._progress, self._moved_s = progress, self._heard_s
            case Progress(phase, fraction):
                if self._on_progress is not None:
                    self._on_progress(phase, fraction)
            case Ready() | CannotStart():
                self._take_start(message)
            case Fault(reason):
                self._fault = reason
            case Hello():
                pass

    def _take_start(self, message: Ready | CannotStart) -> None:
        waiting = self._starting
        if waiting is None or waiting.done():
            self._kill("protocol")
        elif isinstance(message, Ready):
            waiting.set_result(message)
        else:
            waiting.set_exception(_STARTUP_ERRORS.get(message.kind, StartupError)(message.message))

    def _take_result(self, result: StepResult) -> None:
        if not self._outstanding or self._outstanding[0].step != result.step:
            self._kill("protocol")
            return
        step = self._outstanding.popleft()
        now = self._heard_s
        if step.flops > 0:
            self._seconds_per_flop = max(0.9 * self._seconds_per_flop, (now - self._began_s) / step.flops)
        self._began_s = self._moved_s = now
        if not step.future.done():
            step.future.set_result(result)

    def _flops(self, plan: BatchPlan) -> float:
        if self._cost is None:
            return 0.0
        tokens = context = 0
        for _, start, length, _ in plan.slices:
            tokens += length
            context += length * (start + length)
        return tokens * self._cost.token_flops + context * self._cost.context_flops

    def _deadline_s(self) -> float:
        """What the oldest outstanding step may take: the setting, or ten times its predicted time when that is longer."""
        predicted = self._outstanding[0].flops * self._seconds_per_flop if self._outstanding else 0.0
        return max(self._settings.step_deadline_s, DEADLINE_FACTOR * predicted)

    def _watch_later(self) -> None:
        interval = min(self._settings.heartbeat_s, self._settings.step_deadline_s) / 4
        self._watch = asyncio.get_running_loop().call_later(interval, self._look)

    def _look(self) -> None:
        """Kill a worker whose step is overdue, or that has been silent for as long without one. Loading has its own deadline."""
        now = time.monotonic()
        since = self._began_s if self._outstanding else self._heard_s
        if self._state == "ready" and now - since > self._deadline_s():
            self._kill("step_deadline" if self._outstanding else "silent")
        self._watch_later()

    def _kill(self, reason: str) -> None:
        if self._child is not None:
            self._fault = reason
            self._child.kill(reason)

    def _lose(self, child: ChildProcess, reason: str) -> None:
        """The child is dead and reaped."""
        if child is not self._child:
            return
        self._state = "down"
        self._fault = self._fault or reason
        if self._starting is not None and not self._starting.done():
            self._starting.set_exception(ChildLost(self._fault))
        self._fail_outstanding(self._fault)

    def _fail_outstanding(self, reason: str) -> None:
        while self._outstanding:
            _fail(self._outstanding.popleft().future, reason)


def _ignore(message: Any) -> None:
    """What a blank worker says of itself."""


def _fail(future: asyncio.Future[StepResult], reason: str) -> None:
    """End a future with WorkerLost; one that nobody waits for any more is no error."""
    if not future.done():
        future.set_exception(WorkerLost(reason))
        future.exception()
