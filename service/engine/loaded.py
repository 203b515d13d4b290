"""What loading ends in, whichever engine was loaded, and the times it took. No torch.

It does not know engines. Invariant: phases are consecutive, so they add up to the whole.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple, Protocol

from service.checkpoints.long_context import adapt
from service.checkpoints.manifest import Manifest, read_manifest
from service.types.plan import BackendInfo, BatchPlan, LoadRequest, StepResult

WARM_UP_TOKENS = 16
ProgressCallback = Callable[[str, float], None]


class Executor(Protocol):
    """What a worker runs plans with."""

    @property
    def layers_done(self) -> int:
        """Layers computed since the start: it grows while a step gets on."""

    def execute(self, plan: BatchPlan) -> StepResult:
        """Run one step. Raises PlanError for a contradictory plan, MemoryError when not even one token fits."""

    def rest(self) -> None:
        """No step is at hand: what can wait may be done in the background until the next one."""


class Loaded(NamedTuple):
    """An executor, what it says of itself, and the cost model's coefficients (see `messages.Ready`)."""

    backend: Executor
    info: BackendInfo
    token_flops: float
    context_flops: float


Loader = Callable[[LoadRequest, float, ProgressCallback], Loaded]


class Phases:
    """Times of consecutive phases in seconds."""

    def __init__(self, import_s: float) -> None:
        self.seconds: list[tuple[str, float]] = [("import", import_s)]
        self._began_s = time.perf_counter()

    def end(self, name: str) -> None:
        """The phase that ran until now was `name`."""
        now = time.perf_counter()
        self.seconds.append((name, now - self._began_s))
        self._began_s = now


def read_as_served(request: LoadRequest) -> Manifest:
    """The checkpoint's manifest with its attention as the request asks."""
    manifest = read_manifest(Path(request.directory))
    return replace(manifest, spec=adapt(manifest.spec, request.attention))
