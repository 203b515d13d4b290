"""Which versions are loaded: on demand, within a memory budget; the one used least recently that is idle makes room.

It does not know HTTP or how a worker loads. Invariants: what is planned for the loaded versions never exceeds the budget; a version with
work is never unloaded; a version that `hold` returned for is ready until its caller gives up control.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from dataclasses import dataclass

from service.schedulers.loop import Loop
from service.telemetry import log_event
from service.types.errors import StartupError, Unavailable

RETRY_S = 5.0


@dataclass(slots=True)
class Resident:
    """One version that may be loaded. `make` gives a loop that was never started; `planned_bytes` is what it takes when it is loaded."""

    name: str
    make: Callable[[], Loop]
    planned_bytes: int
    loop: Loop
    used: int = 0
    loading: asyncio.Task[None] | None = None


class Residency:
    """The loaded versions of the process. `budget_bytes` 0 is no bound; a request waits `wait_s` for its version."""

    def __init__(self, budget_bytes: int, wait_s: float) -> None:
        self._budget_bytes = budget_bytes
        self._wait_s = wait_s
        self._residents: list[Resident] = []
        self._uses = 0
        self._room = asyncio.Lock()

    def add(self, name: str, make: Callable[[], Loop], planned_bytes: int) -> Resident:
        """A version, not loaded yet."""
        resident = Resident(name, make, planned_bytes, make())
        resident.loop.state = "unloaded"
        self._residents.append(resident)
        return resident

    async def start(self, resident: Resident) -> None:
        """Load a version that the command asked for. Raises StartupError or Unavailable."""
        resident.loop.state = "loading"
        await resident.loop.start()

    async def hold(self, resident: Resident) -> None:
        """Return when the version accepts requests, loading it if need be; what else is wrong with it is for its loop to say.

        Raises Unavailable when it is not loaded in time or cannot be.
        """
        self._uses += 1
        resident.used = self._uses
        while resident.loading is not None or resident.loop.state == "unloaded":
            if resident.loading is None:
                resident.loading = asyncio.create_task(self._load(resident), name=f"load {resident.name}")
                resident.loading.add_done_callback(_seen)
            try:
                async with asyncio.timeout(self._wait_s):
                    await asyncio.shield(resident.loading)
            except TimeoutError:
                raise Unavailable("The model is being loaded.", retry_after_s=RETRY_S) from None

    async def close(self) -> None:
        """End every load and every loop; idempotent."""
        for resident in self._residents:
            if resident.loading is not None:
                resident.loading.cancel()
                with contextlib.suppress(asyncio.CancelledError, Unavailable):
                    await resident.loading
        await asyncio.gather(*(resident.loop.close() for resident in self._residents))

    async def _load(self, resident: Resident) -> None:
        try:
            async with self._room:
                await self._make_room(resident)
                try:
                    await self.start(resident)
                except (StartupError, Unavailable) as error:
                    log_event("load_failed", version=resident.name, reason=str(error))
                    await self._unload(resident)
                    raise Unavailable("The model cannot be loaded.", retry_after_s=RETRY_S) from error
        finally:
            resident.loading = None

    async def _make_room(self, wanted: Resident) -> None:
        """Unload idle versions, the one used longest ago first, until `wanted` fits. Raises Unavailable while too many are at work."""
        if wanted.loop.state != "unloaded":
            raise Unavailable("The server is shutting down.", retry_after_s=RETRY_S)
        while self._budget_bytes and self._taken() + wanted.planned_bytes > self._budget_bytes:
            idle = [one for one in self._residents if one.loop.state == "ready" and one.loop.empty.is_set()]
            if not idle:
                raise Unavailable("The memory is taken by models at work.", retry_after_s=RETRY_S)
            await self._unload(min(idle, key=lambda one: one.used))

    def _taken(self) -> int:
        return sum(one.planned_bytes for one in self._residents if one.loop.state not in ("unloaded", "closed"))

    async def _unload(self, resident: Resident) -> None:
        """Stop a version's worker. From the first moment its loop accepts nothing, and nothing is in it."""
        before, resident.loop = resident.loop, resident.make()
        resident.loop.state = "unloaded"
        log_event("unloaded", version=resident.name)
        await before.close()


def _seen(task: asyncio.Task[None]) -> None:
    """A failure that nobody waited for is in the log already."""
    if not task.cancelled():
        task.exception()
