"""When requests are sent: seeded Poisson processes, a recorded trace, or as fast as a fixed number of clients take answers.

It does not know clocks, files or sockets. Invariants: the same seed gives the same schedule; due times ascend.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from typing import Annotated

import msgspec
from msgspec import Meta

Positive = Annotated[float, Meta(gt=0)]
NotNegative = Annotated[float, Meta(ge=0)]
Share = Annotated[float, Meta(ge=0, le=1)]
Count = Annotated[int, Meta(ge=1, le=10_000_000)]
Whole = Annotated[int, Meta(ge=0)]


class Phase(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A stretch of `seconds` in which requests come at `rate` a second; 0 is a pause."""

    rate: NotNegative
    seconds: Positive


class Load(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How much is sent: `requests` in all after `warmup` unmeasured ones, and none later than `max_seconds` (0: no bound).

    Open loop: at `rate` a second, or at the rates of `phases` one after the other and again, or at the times of a trace (`trace_s`,
    seconds, divided by `speed`). Else a closed loop of `concurrency` clients. `abort_share` of the requests, chosen by the seed, is left by
    the client after its first token.
    """

    requests: Count
    concurrency: Count = 8
    rate: NotNegative = 0.0
    warmup: Whole = 0
    timeout_s: Positive = 120.0
    abort_share: Share = 0.0
    seed: Whole = 0
    max_seconds: NotNegative = 0.0
    phases: tuple[Phase, ...] = ()
    trace_s: tuple[float, ...] = ()
    speed: Positive = 1.0

    def __post_init__(self) -> None:
        if self.phases and not any(phase.rate for phase in self.phases):
            raise ValueError("one phase must have a rate above 0")
        if sum(map(bool, (self.rate, self.phases, self.trace_s))) > 1:
            raise ValueError("give a rate, phases or a trace, and only one of them")

    @property
    def mode(self) -> str:
        """`open` or `closed`."""
        return "open" if self.rate > 0 or self.phases or self.trace_s else "closed"


def due_times(load: Load) -> list[float]:
    """Seconds after the start at which the requests of an open loop are due."""
    if load.trace_s:
        times: Iterator[float] = (due / load.speed for due in load.trace_s)
    elif load.phases:
        times = _phased_times(load.phases, load.seed)
    else:
        times = iter(poisson_times(load.rate, load.requests, load.seed))
    first = itertools.islice(times, load.requests)
    return list(itertools.takewhile(lambda due: not load.max_seconds or due <= load.max_seconds, first))


def poisson_times(rate: float, count: int, seed: int) -> list[float]:
    """Seconds after the start at which `count` requests are due, at `rate` per second on average."""
    generator, due, times = random.Random(seed), 0.0, []
    for _ in range(count):
        due += generator.expovariate(rate)
        times.append(due)
    return times


def _phased_times(phases: tuple[Phase, ...], seed: int) -> Iterator[float]:
    """Poisson arrivals of each phase, the phases repeated for ever: at a change the wait begins anew, as the process has no memory."""
    generator, begins_s = random.Random(seed), 0.0
    for phase in itertools.cycle(phases):
        due, ends_s = begins_s, begins_s + phase.seconds
        while phase.rate and (due := due + generator.expovariate(phase.rate)) < ends_s:
            yield due
        begins_s = ends_s


def abort_choices(share: float, count: int, seed: int) -> list[bool]:
    """Which of `count` requests the client leaves early."""
    generator = random.Random(f"abort {seed}")
    return [generator.random() < share for _ in range(count)]
