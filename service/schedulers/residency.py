"""Which versions are loaded: on demand, within a memory budget; the one used least recently that is idle makes room.

It does not know HTTP or how a worker loads. Invariants: what is planned for the loaded versions never exceeds the budget; a version with
work is never unloaded; a version that `hold` returned for is ready until its caller gives up control.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from service.schedulers.loop import Loop
from service.telemetry import log_event
from service.types.errors import StartupError, Unavailable

RETRY_S = 5.0
_NO_ROOM = "The memory is taken by models at work."


@dataclass(slots=True)
class Resident:
    """One version that may be loaded. `make` gives a loop that was never started; `planned_bytes` is what it takes when it is loaded.

    `was_ready` says whether it was loaded at least once.
    """

    name: str
    make: Callable[[], Loop]
    planned_bytes: int
    loop: Loop
    used: int = 0
    was_ready: bool = False
    loading: asyncio.Task[None] | None = None
    waiting: int = 0


class Residency:
    """The loaded versions of the process. `budget_bytes` 0 is no bound; a request waits `wait_s` for its version."""

    def __init__(self, budget_bytes: int, wait_s: float) -> None:
        self._budget_bytes = budget_bytes
        self._wait_s = wait_s
        self._residents: list[Resident] = []
        self._uses = 0
        self._room = asyncio.Lock()
        self._loaded = asyncio.Event()
        self._settled = asyncio.Event()  # some load ended, well or not

    def add(self, name: str, make: Callable[[], Loop], planned_bytes: int) -> Resident:
        """A version, not loaded yet."""
        resident = Resident(name, make, planned_bytes, make())
        resident.loop.state = "unloaded"
        self._residents.append(resident)
        return resident

    async def start(self, resident: Resident) -> None:
        """Load a version that the command asked for. Raises StartupError or Unavailable."""
        resident.loop.state = "loading"
        try:
            await resident.loop.start()
            resident.was_ready = True
            self._loaded.set()
        finally:
            self._settled.set()

    async def loaded(self) -> None:
        """Return when a version was loaded since the last call; for one caller."""
        await self._loaded.wait()
        self._loaded.clear()

    async def hold(self, resident: Resident) -> None:
        """Return when the version accepts requests, loading it if need be; what else is wrong with it is for its loop to say.

        Raises Unavailable when it is not loaded in time or cannot be.
        """
        self._uses += 1
        resident.used = self._uses
        resident.waiting += 1
        try:
            async with asyncio.timeout(self._wait_s):
                while resident.loading is not None or resident.loop.state == "unloaded":
                    if resident.loading is None:
                        resident.loading = asyncio.create_task(self._load(resident), name=f"load {resident.name}")
                        resident.loading.add_done_callback(_seen)
                    await asyncio.shield(resident.loading)
        except TimeoutError:
            reason = _NO_ROOM if resident.loop.state == "unloaded" else "The model is being loaded."
            raise Unavailable(reason, retry_after_s=RETRY_S) from None
        finally:
            resident.waiting -= 1

    async def close(self) -> None:
        """End every load and every loop; idempotent."""
        for resident in self._residents:
            if resident.loading is not None:
                resident.loading.cancel()
                with contextlib.suppress(asyncio.CancelledError, Unavailable):
                    await resident.loading
        await asyncio.gather(*(resident.loop.close() for resident in self._residents))

    async def _load(self, resident: Resident) -> None:
        """Make room, in turn, and then load; what has room loads beside the others."""
        try:
            async with self._room:
                try:
                    async with asyncio.timeout(self._wait_s):
                        await self._make_room(resident)
                except TimeoutError:
                    raise Unavailable(_NO_ROOM, retry_after_s=RETRY_S) from None
                resident.loop.state = "loading"
            try:
                await self.start(resident)
            except (StartupError, Unavailable) as error:
                log_event("load_failed", version=resident.name, reason=str(error))
                await self._unload(resident)
                raise Unavailable("The model cannot be loaded.", retry_after_s=RETRY_S) from error
        finally:
            resident.loading = None

    async def _make_room(self, wanted: Resident) -> None:
        """Unload idle versions, the one used longest ago first, until `wanted` fits; wait where none is idle, or is only being loaded.

        Raises Unavailable when the server stops or no version could ever make room.
        """
        while wanted.loop.state == "unloaded":
            if not self._budget_bytes or self._taken() + wanted.planned_bytes <= self._budget_bytes:
                return
            ready = [one for one in self._residents if one.loop.state == "ready"]
            idle = [one for one in ready if one.loop.empty.is_set() and not one.waiting]
            if idle:
                await self._unload(min(idle, key=lambda one: one.used))
            elif ready:
                await _any_empty([one.loop for one in ready])
            elif any(one.loop.state == "loading" for one in self._residents):
                self._settled.clear()
                await self._settled.wait()
            else:
                raise Unavailable(_NO_ROOM, retry_after_s=RETRY_S)
        raise Unavailable("The server is shutting down.", retry_after_s=RETRY_S)

    def _taken(self) -> int:
        return sum(one.planned_bytes for one in self._residents if one.loop.state not in ("unloaded", "closed"))

    async def _unload(self, resident: Resident) -> None:
        """Stop a version's worker. From the first moment its loop accepts nothing, and nothing is in it."""
        before, resident.loop = resident.loop, resident.make()
        resident.loop.state = "unloaded"
        log_event("unloaded", version=resident.name)
        await before.close()


async def _any_empty(loops: Sequence[Loop]) -> None:
    """Return when one of the loops has nothing to do; it may have by the time that the caller looks."""
    waits = [asyncio.create_task(loop.empty.wait()) for loop in loops]
    try:
        await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for wait in waits:
            wait.cancel()


def _seen(task: asyncio.Task[None]) -> None:
    """A failure that nobody waited for is in the log already."""
    if not task.cancelled():
        task.exception()
