"""The messages between a worker and its supervisor, beyond the plain data of `types/plan.py` that they carry.

Both sides import this file and nothing else of each other. Invariant: the parent sends one `Load`, then `Execute`s; the child sends
`Hello` when its libraries are loaded, `Progress`, then one `Ready` or `CannotStart`, then one `Result` a plan in order; `Beat`s anywhere.
"""

from __future__ import annotations

import msgspec

from service.types.plan import BackendInfo, BatchPlan, LoadRequest, StepResult


class Load(msgspec.Struct, frozen=True, array_like=True, tag="load"):
    """Load this; it may take long."""

    request: LoadRequest


class Execute(msgspec.Struct, frozen=True, array_like=True, tag="execute"):
    """Run this plan after those sent before it."""

    plan: BatchPlan


ToWorker = Load | Execute


class Hello(msgspec.Struct, frozen=True, array_like=True, tag="hello"):
    """The libraries are loaded, which took that long."""

    import_s: float


class Progress(msgspec.Struct, frozen=True, array_like=True, tag="progress"):
    """How far loading is: the phase's name and its share done, 0 to 1."""

    phase: str
    fraction: float


class Ready(msgspec.Struct, frozen=True, array_like=True, tag="ready"):
    """Plans may come. The FLOPs predict how long a step takes: tokens · token_flops + Σ tokens · context · context_flops."""

    info: BackendInfo
    token_flops: float
    context_flops: float


class CannotStart(msgspec.Struct, frozen=True, array_like=True, tag="cannot_start"):
    """This request can never work: `kind` names a StartupError, `message` says why."""

    kind: str
    message: str


class Result(msgspec.Struct, frozen=True, array_like=True, tag="result"):
    """The result of the oldest plan not yet answered."""

    result: StepResult


class Beat(msgspec.Struct, frozen=True, array_like=True, tag="beat"):
    """The process is alive; `progress` grows while it also gets on with its work."""

    progress: int


class Fault(msgspec.Struct, frozen=True, array_like=True, tag="fault"):
    """The worker is about to exit; `reason` is a metric label (`oom`, `plan`, `error`)."""

    reason: str


ToSupervisor = Hello | Progress | Ready | CannotStart | Result | Beat | Fault
