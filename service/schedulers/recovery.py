"""When the worker is lost: who is to blame, and starting it again.

A sequence that was executing at two deaths is run alone until it has passed the place where the worker died; if the worker dies again
then, that one sequence killed it and is never tried again. It does not know plans or streams. Invariant: each death either raises a
count that is bounded or ends a sequence, so a poisonous request cannot keep a worker dying.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable

from service.schedulers.admission import Admission
from service.schedulers.planner import Planner, Step
from service.schedulers.sequence import Sequence
from service.telemetry import log_event
from service.types.errors import StartupError
from service.types.plan import Backend, BackendInfo, WorkerLost

_DEATHS_UNTIL_ALONE = 2
_START_ATTEMPTS = 6
_BACKOFF_S, _BACKOFF_MOST_S = 0.5, 8.0


def blame(steps: Iterable[Step], planner: Planner) -> list[Sequence]:
    """Count a death for every sequence that was executing; gives those that were executing alone, which the caller must end."""
    executing: dict[int, Sequence] = {}
    for step in steps:
        for entry in step.entries:
            if entry.epoch == entry.sequence.epoch:
                executing[entry.sequence.arrival] = entry.sequence
    killers = []
    for sequence in executing.values():
        if sequence.suspect_until:
            killers.append(sequence)
            continue
        sequence.deaths += 1
        sequence.died_at = max(sequence.died_at, sequence.scheduled)
        if sequence.deaths >= _DEATHS_UNTIL_ALONE:
            planner.suspect(sequence, sequence.died_at)
    return killers


def outgrown(planner: Planner, admission: Admission) -> list[Sequence]:
    """Sequences that cannot run even alone in the new worker, which may have less memory than the one that they were accepted for."""
    return [sequence for sequence in planner.sequences() if not admission.still_fits(sequence.request, planner.space)]


def backoff_s(deaths: int) -> float:
    """Seconds to wait before the start after `deaths` losses in a row without a completed step; the first is at once."""
    return 0.0 if deaths <= 1 else min(_BACKOFF_S * 2 ** (deaths - 2), _BACKOFF_MOST_S)


async def start_again(backend: Backend, artifact: str, deaths: int) -> BackendInfo | None:
    """Start the lost worker again, a bounded number of times; None when it cannot be started."""
    for attempt in range(_START_ATTEMPTS):
        await asyncio.sleep(backoff_s(deaths + attempt))
        try:
            return await backend.start()
        except WorkerLost as lost:
            log_event("worker_start_failed", version=artifact, reason=lost.reason, attempt=attempt + 1)
        except StartupError as error:
            log_event("worker_start_refused", version=artifact, reason=str(error))
            return None
    return None
