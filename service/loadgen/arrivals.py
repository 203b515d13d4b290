"""When requests are sent: a seeded Poisson process, or as fast as a fixed number of clients take answers.

It does not know clocks or sockets. Invariant: the same seed gives the same schedule.
"""

from __future__ import annotations

import random
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Load:
    """How much is sent: `requests` in all after `warmup` unmeasured ones; open loop at `rate` per second, or with
    rate 0 `concurrency` clients.

    `abort_share` of the requests, chosen by the seed, is left by the client after its first token.
    """

    requests: int
    concurrency: int = 8
    rate: float = 0.0
    warmup: int = 0
    timeout_s: float = 120.0
    abort_share: float = 0.0
    seed: int = 0

    @property
    def mode(self) -> str:
        """`open` or `closed`."""
        return "open" if self.rate > 0 else "closed"


def poisson_times(rate: float, count: int, seed: int) -> list[float]:
    """Seconds after the start at which `count` requests are due, at `rate` per second on average."""
    generator, due, times = random.Random(seed), 0.0, []
    for _ in range(count):
        due += generator.expovariate(rate)
        times.append(due)
    return times


def abort_choices(share: float, count: int, seed: int) -> list[bool]:
    """Which of `count` requests the client leaves early."""
    generator = random.Random(f"abort {seed}")
    return [generator.random() < share for _ in range(count)]
