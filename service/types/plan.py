"""What the parent asks of a worker for one step, what comes back, and the protocol between them.

A worker keeps, for each `row` of its tables, the sequence's tokens and one block table per KV group; a plan carries only changes.
A token sampled by step N is already in the worker's table when step N+1 runs, so a plan never waits for its value: that is all that
running one step ahead needs. Invariant: the worker holds no truth that the parent could not send again with `OpenSequence`.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from enum import IntFlag
from typing import NamedTuple, Protocol

from service.types.kv_layout import KvLayout
from service.types.request import ImageInput, Sampling, Stop, TokenLogprob
from service.types.settings import AttentionSettings


class Want(IntFlag):
    """What is wanted of a slice besides its KV entries."""

    NOTHING = 0
    TOKEN = 1
    PROMPT_LOGPROBS = 2


class Slice(NamedTuple):
    """Compute positions [start, start + length) of the sequence in `row`. With Want.TOKEN the position start + length is sampled.

    With Want.PROMPT_LOGPROBS the log-probs of the tokens at positions start + 1 .. min(start + length, prompt length − 1) are returned.
    """

    row: int
    start: int
    length: int
    want: int


class BlockAppend(NamedTuple):
    """Block ids that extend one row's table of one KV group, from table index `first` on."""

    row: int
    group: int
    first: int
    blocks: tuple[int, ...]


class BlockRelease(NamedTuple):
    """Entries of a row's table of one KV group below index `before`, but not its sinks, lie behind the window and become null."""

    row: int
    group: int
    before: int


class BlockDemote(NamedTuple):
    """Copy the near blocks `sources` into the blocks `targets` of the far group `group`, in its form.

    Both belong to `row`. It is done before anything of the step is computed, so sources may be released, or taken anew, in this plan.
    """

    row: int
    group: int
    sources: tuple[int, ...]
    targets: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class OpenSequence:
    """A sequence enters a row. `tokens` is everything known: the prompt and, after preemption or restart, what was generated.

    `images` stand in the prompt; one whose pixels an earlier sequence of the same plan brings has none.
    """

    row: int
    tokens: tuple[int, ...]
    prompt_tokens: int
    sampling: Sampling
    stop: Stop
    prompt_logprobs: int | None = None
    images: tuple[ImageInput, ...] = ()


@dataclass(frozen=True, slots=True)
class BatchPlan:
    """One step. The worker applies close, open, append, release, demote in this order and then computes the slices.

    Slices are ordered and rows are distinct within a plan.
    """

    step: int
    slices: tuple[Slice, ...] = ()
    close: tuple[int, ...] = ()
    open: tuple[OpenSequence, ...] = ()
    append: tuple[BlockAppend, ...] = ()
    release: tuple[BlockRelease, ...] = ()
    demote: tuple[BlockDemote, ...] = ()


class SampledToken(NamedTuple):
    """The token sampled for a row; `logprob` when asked for. `failure` is an error code (`numerical_failure`) instead of a token of −1."""

    row: int
    token: int
    logprob: TokenLogprob | None = None
    failure: str | None = None


class PromptLogprobs(NamedTuple):
    """Log-probs of the prompt tokens at positions first, first + 1, … of a row; none, and a `failure` code, if any is not finite."""

    row: int
    first: int
    logprobs: tuple[TokenLogprob, ...]
    failure: str | None = None


class ImageWork(NamedTuple):
    """What a step did for images: how many it encoded, of how many image tokens, and how many it found encoded.

    `flops` are those of encoding and of the fusion. `seeing` rows went through the fusion; `text_gates` and `image_gates` are the sums of
    their gates, head by head.
    """

    encoded: int
    encoded_tokens: int
    found: int
    flops: float
    seeing: int = 0
    text_gates: tuple[float, ...] = ()
    image_gates: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class StepResult:
    """What one step gave: tokens in the order of the slices that wanted one; numbers for the metrics. Workers count nothing themselves.

    `execute_s` is the step's time in the worker in seconds; `dispatch` counts (op, implementation) calls since the last result;
    `far_blocks_read` are the far blocks that queries read, counted once for each layer and K/V head. `forwards` counts how the decoder's
    passes were computed where decode steps are recorded: replayed, or why not.
    """

    step: int
    tokens: tuple[SampledToken, ...] = ()
    prompt_logprobs: tuple[PromptLogprobs, ...] = ()
    execute_s: float = 0.0
    dispatch: tuple[tuple[str, str, int], ...] = ()
    far_blocks_read: int = 0
    images: ImageWork | None = None
    forwards: tuple[tuple[str, int], ...] = ()


@dataclass(frozen=True, slots=True)
class BackendInfo:
    """What a ready worker says of itself.

    `group_blocks` are the usable block ids per KV group: 1 … n (0 is the null block). `memory_bytes` names what was taken (weights,
    kv:<group>, choices, graphs, images, workspace, runtime). `phases_s` are the start-up phases in order with their seconds. `limits` are
    what the machine can do a second, by kind (bytes, flops). `kernels` says whether the compiled kernels are in use, and for which
    instruction set. `image_tokens` is the most image tokens of all running sequences together, 0 for a model that reads no images.
    `backend` is the engine: torch, or onnx for an exported graph. `kv_cache_dtype` is the type of keys and values, "" for the dtype.
    """

    kv_layout: KvLayout
    group_blocks: tuple[int, ...]
    max_rows: int
    max_step_tokens: int
    context_tokens: int
    vocab_size: int
    dtype: str
    tier: str
    device: str
    memory_bytes: tuple[tuple[str, int], ...] = ()
    phases_s: tuple[tuple[str, float], ...] = ()
    dispatch: tuple[tuple[str, str], ...] = ()
    pid: int = 0
    limits: tuple[tuple[str, float], ...] = ()
    kernels: str = ""
    quantize: str = "none"
    image_tokens: int = 0
    backend: str = "torch"
    kv_cache_dtype: str = ""


@dataclass(frozen=True, slots=True)
class BackendHealth:
    """Liveness of a worker: `state` is loading, ready, stalled or down; `silent_s` the seconds since it last made progress or answered."""

    state: str
    silent_s: float
    restarts: int


class WorkerLost(Exception):
    """The worker died, stalled beyond its deadline or broke the protocol; every outstanding step is lost. `reason` is a metric label."""

    def __init__(self, reason: str) -> None:
        super().__init__(f"worker lost: {reason}")
        self.reason = reason


class Backend(Protocol):
    """One version replica as the loop sees it. All methods are called from the event loop's thread."""

    async def start(self) -> BackendInfo:
        """Start (or, after WorkerLost, start again) and return when ready. Raises StartupError when it cannot ever work."""

    def execute(self, plan: BatchPlan) -> asyncio.Future[StepResult]:
        """Send a plan now; the future gives its result or WorkerLost. Steps complete in order; at most two are outstanding."""

    def health(self) -> BackendHealth:
        """The worker's liveness now; never blocks."""

    async def close(self) -> None:
        """Stop the worker and free everything; idempotent."""


@dataclass(frozen=True, slots=True)
class LoadRequest:
    """The first message to a worker: which checkpoint to load and how. `kv_bytes` 0 means: what the machine leaves, bounded.

    `backend` torch or onnx decides which worker it is sent to. `kv_cache_dtype` auto keeps keys and values in the dtype, or in
    bfloat16 beside quantised weights where a CPU multiplies it.
    `machine_limits` are bytes read and operations a second, 0 where the worker is to measure. `deterministic`: a row's bits must not
    depend on its batch. `cuda_graphs` auto records decode steps on a GPU, off does not.
    """

    directory: str
    dtype: str = "auto"
    device: str = "auto"
    threads: int = 0
    kv_bytes: int = 0
    max_rows: int = 64
    max_step_tokens: int = 512
    context_tokens: int = 0
    image_cache_bytes: int = 0
    machine_limits: tuple[float, float] = (0.0, 0.0)
    quantize: str = "auto"
    quantize_cache: str = "none"
    quantize_cache_bytes: int = 0
    deterministic: bool = False
    kv_cache_dtype: str = "auto"
    cuda_graphs: str = "auto"
    attention: AttentionSettings = field(default_factory=AttentionSettings)
    backend: str = "torch"
