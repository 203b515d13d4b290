"""One timer for the deadlines of all sequences: it fires when the earliest may have passed.

It does not know sequences: `expire(now)` ends what is due and gives the next deadline. Invariant: while a finite deadline is known and the
timer has been armed, a timer is set for a time no later than it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable


class Deadlines:
    """Times are absolute, in seconds of `clock`."""

    def __init__(self, clock: Callable[[], float], expire: Callable[[float], float]) -> None:
        self._clock = clock
        self._expire = expire
        self._next_s = float("inf")
        self._timer: asyncio.TimerHandle | None = None
        self._timer_s = float("inf")

    def add(self, deadline_s: float) -> None:
        """Another deadline; `arm` once all are added."""
        self._next_s = min(self._next_s, deadline_s)

    def arm(self) -> None:
        """Set the timer for the earliest deadline, unless one as early is set."""
        if self._timer is not None and self._timer_s <= self._next_s:
            return
        self.stop()
        if self._next_s < float("inf"):
            self._timer_s = self._next_s
            self._timer = asyncio.get_running_loop().call_later(max(self._next_s - self._clock(), 0.0), self._fire)

    def stop(self) -> None:
        """No timer is set any more."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _fire(self) -> None:
        self._timer = None
        self._next_s = self._expire(self._clock())
        self.arm()
