"""The tick of one version: take in, plan, execute, apply, publish; and going on after the worker was lost.

All truth (sequences, block tables, streams) lives here in one asyncio thread; the worker holds nothing that cannot be sent again. Where it
runs ahead the next plan is sent while a step executes, and a token that was run ahead of an ending is dropped. It does not know HTTP,
processes or tensors. Invariants: every accepted sequence gets exactly one terminal event; a sequence that ended holds no block; a broken
invariant stops the loop loudly and ends every sequence.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable
from collections.abc import Sequence as Requests
from dataclasses import dataclass

from service import __version__
from service.schedulers.accounting import Accounting
from service.schedulers.admission import Admission
from service.schedulers.apply import Application
from service.schedulers.blocks import BlockSpace
from service.schedulers.deadlines import Deadlines
from service.schedulers.planner import Planner, Step
from service.schedulers.prefix_cache import PrefixCache
from service.schedulers.recovery import blame, outgrown, start_again
from service.schedulers.run_ahead import RunAhead
from service.schedulers.sequence import InvariantBroken, Sequence, State
from service.schedulers.streams import Codec, Stream
from service.telemetry import Telemetry, log_event
from service.types.errors import DeadlineExceeded, InternalError, ServiceError, Unavailable, WorkerKilled
from service.types.model_spec import ModelSpec
from service.types.plan import Backend, BackendInfo, StepResult, WorkerLost
from service.types.request import FinishEvent, FinishReason, GenerationRequest
from service.types.settings import SchedulerSettings

_IDLE_CHECK_S = 1.0
_RETRY_S = 5.0
_REFUSALS = {
    "unloaded": "The model is not loaded.",
    "loading": "The model is being loaded.",
    "restarting": "The model's worker is being started again.",
    "draining": "The server is shutting down.",
    "closed": "The server is shutting down.",
    "down": "The model's worker cannot be started.",
    "smaller": "The model was started again with less memory than this request needs.",
}


@dataclass(frozen=True, slots=True)
class Identity:
    """Which version a loop serves: its artifact name (`v2.3@<12 hex>`), whole digest, network and tokenizer."""

    artifact: str
    digest: str
    spec: ModelSpec
    codec: Codec


class Loop:
    """One version's loop. `state` is a key of `_REFUSALS` or ready; `info` what the worker last said; `empty` is set while idle."""

    def __init__(
        self,
        identity: Identity,
        backend: Backend,
        settings: SchedulerSettings,
        telemetry: Telemetry,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.state = "loading"
        self.info: BackendInfo | None = None
        self.backend = backend
        self._identity = identity
        self._settings = settings
        self._telemetry = telemetry
        self._clock = clock
        layout = identity.spec.kv_layout()
        space = BlockSpace(layout, (0,) * len(layout.groups))
        self._planner = Planner(space, PrefixCache(space, identity.digest), 0, 0)
        self._admission = Admission(settings)
        self._metrics = telemetry.version(identity.artifact, "none", "none")
        self._accounting = Accounting(self._metrics, identity.spec, "auto", settings)
        self._application = Application(self._planner, self._accounting, self._end)
        self._flying: deque[tuple[Step, asyncio.Future[StepResult]]] = deque()
        self._wake, self.empty = asyncio.Event(), asyncio.Event()
        self.empty.set()
        self._arrivals = self._deaths_in_a_row = self._preemptions_counted = 0
        self._ahead = RunAhead(settings.run_ahead)
        self._deadlines = Deadlines(clock, self._expire)
        self._task: asyncio.Task[None] | None = None

    # The door.

    def submit(self, requests: Requests[GenerationRequest]) -> list[Stream]:
        """Accept all requests, or none. Raises Unavailable, QueueFull, ContextLengthExceeded or another InvalidRequest."""
        if self.state != "ready":
            self._accounting.rejected(self.state, len(requests))
            raise Unavailable(_REFUSALS[self.state], retry_after_s=_RETRY_S)
        try:
            self._admission.check(requests, self._planner.waiting, self._planner.space)
        except ServiceError as refusal:
            self._accounting.rejected(refusal.code, len(requests))
            raise
        now = self._clock()
        streams = [self._accept(request, now) for request in requests]
        self.empty.clear()
        self._wake.set()
        self._deadlines.arm()
        return streams

    def _accept(self, request: GenerationRequest, now: float) -> Stream:
        decoder = self._identity.codec.decoder()
        stream = Stream(request.request_id, decoder, request.stop.strings, self._settings.stream_events)
        self._arrivals += 1
        share, latencies = self._planner.waiting.enrol(request.tenant), self._metrics.latencies(request.route)
        sequence = Sequence(request, self._arrivals, share, stream, latencies)
        sequence.arrived_s = now
        sequence.deadline_s = min(request.deadline_s, now + self._settings.request_deadline_s)
        self._deadlines.add(sequence.deadline_s)
        stream.on_cancel(lambda: self._end(sequence, FinishReason.CANCELLED))
        self._planner.waiting.add(sequence)
        return stream

    # Start and stop.

    async def start(self) -> BackendInfo:
        """Start the worker and the ticks. Raises StartupError when the worker cannot work."""
        try:
            info = await self.backend.start()
        except WorkerLost as lost:
            log_event("worker_start_failed", version=self._identity.artifact, reason=lost.reason, attempt=1)
            again = None if self.state == "closed" else await start_again(self.backend, self._identity.artifact, 1)
            if again is None:
                self.state = "down"
                raise Unavailable(_REFUSALS["down"], retry_after_s=_RETRY_S) from lost
            info = again
        self._take_worker(info)
        self._task = asyncio.create_task(self._run(), name=f"loop {self._identity.artifact}")
        return info

    def refuse(self) -> None:
        """Accept nothing from now on."""
        if self.state in ("unloaded", "loading", "ready", "restarting"):
            self.state = "draining"

    async def drain(self, seconds: float) -> None:
        """Refuse what is new, let what was accepted end within `seconds`, and end the rest with an error."""
        self.refuse()
        try:
            async with asyncio.timeout(seconds):
                await self.empty.wait()
        except TimeoutError:
            self._end_all(lambda: Unavailable("The server is shutting down.", retry_after_s=_RETRY_S))

    async def close(self) -> None:
        """End everything and stop the worker; idempotent."""
        self.state = "closed"
        self._deadlines.stop()
        self._end_all(lambda: Unavailable("The server is shutting down.", retry_after_s=_RETRY_S))
        task, self._task = self._task, None
        if task is not None:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
        self._metrics.value("model_loaded").set(0)
        await self.backend.close()
        self._drop_flying()

    def check(self) -> None:
        """Recount the blocks; raises InvariantBroken."""
        self._planner.space.check(self._planner.running)

    def _take_worker(self, info: BackendInfo) -> None:
        identity, settings = self._identity, self._settings
        self.info = info
        space = BlockSpace(info.kv_layout, info.group_blocks)
        cache = PrefixCache(space, identity.digest, settings.prefix_cache)
        self._planner.restart(space, cache, min(settings.batch_size, info.max_rows), min(settings.step_tokens, info.max_step_tokens))
        self._planner.image_tokens = self._admission.image_tokens = info.image_tokens
        self._admission.context_tokens = min(info.context_tokens, identity.spec.context_tokens)
        self._admission.vocab_size = info.vocab_size
        metrics = self._telemetry.version(identity.artifact, info.tier, info.device)
        if metrics is not self._metrics:
            self._metrics.drop()
        self._metrics = metrics
        self._accounting = Accounting(self._metrics, identity.spec, info.dtype, settings)
        self._accounting.ready(info, __version__, self._planner)
        self._metrics.watch("worker_silent_seconds", lambda: self.backend.health().silent_s)
        self._application = Application(self._planner, self._accounting, self._end)
        if self.state in ("loading", "restarting"):
            self.state = "ready"
        log_event("worker_ready", version=identity.artifact, tier=info.tier, device=info.device, pid=info.pid)

    # The tick.

    async def _run(self) -> None:
        try:
            while self.state != "down":
                try:
                    await self._tick()
                except WorkerLost as lost:
                    await self._recover(lost.reason)
        except Exception as fault:  # The one place that must answer for any fault: every reader is told, then it is reported.
            self.state = "down"
            log_event("loop_stopped", version=self._identity.artifact, fault=type(fault).__name__, detail=str(fault))
            self._abandon(InternalError("The scheduler stopped on an internal fault."))
            raise

    async def _tick(self) -> None:
        while self._ahead.may_send([step for step, _ in self._flying], bool(self._planner.waiting)) and self._launch():
            pass
        if not self._flying:
            await self._idle()
            return
        step, future = self._flying[0]
        result = await asyncio.shield(future)
        self._flying.popleft()
        self._deaths_in_a_row = 0
        self._ahead.note(step, result)
        self._application.apply(step, result, self._clock())
        before, self._preemptions_counted = self._preemptions_counted, self._planner.preemptions
        self._accounting.stepped(step, result, self._preemptions_counted - before)

    def _launch(self) -> bool:
        step = self._planner.plan()
        if step is None:
            return False
        now = self._clock()
        for sequence in step.opened:
            if not sequence.opened_s:
                self._accounting.opened(sequence, now)
        self._flying.append((step, self.backend.execute(step.plan)))
        return True

    async def _idle(self) -> None:
        if self._planner.running or self._planner.waiting:
            raise InvariantBroken("sequences wait and none can move")
        self._wake.clear()
        try:
            async with asyncio.timeout(_IDLE_CHECK_S):
                await self._wake.wait()
        except TimeoutError:
            if self.backend.health().state == "down":
                raise WorkerLost("idle") from None

    async def _recover(self, reason: str) -> None:
        """The worker is gone: everything accepted waits again, a new worker takes over and computes what was lost."""
        self._deaths_in_a_row += 1
        if self.state == "ready":
            self.state = "restarting"
        steps = [step for step, _ in self._flying]
        self._drop_flying()
        self._accounting.lost(reason)
        log_event("worker_lost", version=self._identity.artifact, reason=reason, sequences=len(self._planner.running))
        for killer in blame(steps, self._planner):
            self._deaths_in_a_row = 1
            self._end(killer, FinishReason.ERROR, WorkerKilled("This request ended the model's worker and is not tried again."))
        for sequence in list(self._planner.running):
            self._planner.leave(sequence, State.WAITING)
        info = await start_again(self.backend, self._identity.artifact, self._deaths_in_a_row)
        if info is None:
            self.state = "down"
            self._end_all(lambda: Unavailable(_REFUSALS["down"], retry_after_s=_RETRY_S))
        else:
            self._take_worker(info)
            self._end_all(lambda: Unavailable(_REFUSALS["smaller"], retry_after_s=_RETRY_S), outgrown(self._planner, self._admission))

    def _drop_flying(self) -> None:
        """Nobody waits for the outstanding results any more (a lost one counts as seen)."""
        for _, future in self._flying:
            if not future.cancel() and not future.cancelled():
                future.exception()
        self._flying.clear()

    # Endings.

    def _end(self, sequence: Sequence, reason: FinishReason, error: ServiceError | None = None, matched: str | int | None = None) -> None:
        usage = sequence.usage
        self._planner.leave(sequence, State.FINISHED)
        self._planner.waiting.dismiss(sequence.share)
        ending = FinishEvent(reason, usage, error, matched)
        sequence.stream.finish(ending)
        now = self._clock()
        self._accounting.ended(sequence, ending, now)
        self._admission.ended(now, bool(self._planner.waiting))
        if error is not None:
            log_event("sequence_failed", request_id=sequence.request.request_id, version=self._identity.artifact, code=error.code)
        if not self._planner.running and not self._planner.waiting:
            self.empty.set()

    def _end_all(self, error: Callable[[], ServiceError], among: Requests[Sequence] | None = None) -> None:
        for sequence in self._planner.sequences() if among is None else among:
            self._end(sequence, FinishReason.ERROR, error())

    def _abandon(self, error: ServiceError) -> None:
        """Tell every reader, touching no block or row: what is broken cannot be given back in order."""
        now = self._clock()
        for sequence in self._planner.abandon():
            ending = FinishEvent(FinishReason.ERROR, sequence.usage, error)
            sequence.stream.finish(ending)
            self._accounting.ended(sequence, ending, now)
        self.empty.set()

    def _expire(self, now: float) -> float:
        """End what is past its deadline; the next deadline."""
        for sequence in self._planner.sequences():
            if sequence.deadline_s <= now:
                self._end(sequence, FinishReason.ERROR, DeadlineExceeded("The request's deadline passed before it was done."))
        return min((sequence.deadline_s for sequence in self._planner.sequences()), default=float("inf"))
