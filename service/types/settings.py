"""Plain frozen settings for each room, handed in as arguments; `config.py` is the only place that reads flags, environment and files.

It does not know pydantic or where a value came from. Invariant: defaults stand here once; every field is obeyed by the room that takes it
(tests/house walks them).
"""

from __future__ import annotations

from dataclasses import dataclass, field

KIB, MIB = 1024, 1024 * 1024


@dataclass(frozen=True, slots=True)
class HttpLimits:
    """Bounds on what a client may send. Times in seconds, sizes in bytes."""

    header_bytes: int = 32 * KIB
    header_fields: int = 100
    body_bytes: int = 32 * MIB
    header_read_s: float = 10.0
    body_idle_s: float = 30.0
    stream_write_s: float = 60.0
    json_depth: int = 64
    choices: int = 16
    prompts: int = 64
    sequences: int = 128
    stop_strings: int = 16
    stop_characters: int = 256
    logit_bias_entries: int = 1024
    top_logprobs: int = 20
    prompt_characters_per_token: int = 8
    template_s: float = 2.0
    template_bytes: int = 128 * MIB
    images: int = 16
    image_bytes: int = 20 * MIB
    image_pixels: int = 40_000_000
    image_s: float = 5.0
    image_memory_bytes: int = 1024 * MIB
    image_processes: int = 2
    prepared_bytes: int = 64 * MIB
    fetch_s: float = 10.0


@dataclass(frozen=True, slots=True)
class HttpSettings:
    """Where the service listens and who may call. Keys are kept as given; only digests are compared. Empty `api_keys`: open."""

    host: str = "127.0.0.1"
    port: int = 8000
    api_keys: tuple[str, ...] = field(default=(), repr=False)
    insecure: bool = False
    metrics_key: bool = False
    metrics_compat: str = "none"
    allowed_origins: tuple[str, ...] = ()
    image_hosts: tuple[str, ...] = ()
    drain_s: float = 30.0
    access_log: bool = True
    limits: HttpLimits = HttpLimits()


@dataclass(frozen=True, slots=True)
class SchedulerSettings:
    """Bounds and policy of one version's loop. `queue_tokens` bounds the prompt tokens waiting, `queue_pixel_bytes` the pixels of their
    images; `run_ahead` is auto, always or never.

    A request meets its service levels when its first token came within `slo_ttft_ms` and its others within `slo_tpot_ms` each on average;
    0 is no target. `stream_events` is how many undelivered events a stream may hold before its client counts as too slow. `step_tokens` is
    the token budget of a step; `batch_size` the most sequences running at once.
    """

    batch_size: int = 32
    step_tokens: int = 512
    queue_requests: int = 256
    queue_tokens: int = 1 << 20
    queue_pixel_bytes: int = 256 * MIB
    request_deadline_s: float = 600.0
    stream_events: int = 1024
    run_ahead: str = "auto"
    prefix_cache: bool = True
    slo_ttft_ms: float = 2000.0
    slo_tpot_ms: float = 200.0


@dataclass(frozen=True, slots=True)
class EngineSettings:
    """How a worker loads and runs a checkpoint. `kv_bytes` 0: what the machine leaves, bounded by what batch_size contexts can use;
    `threads` 0: all cores, of torch at most one for each 8 million parameters and more where a step has many rows.

    `context_tokens` 0: the checkpoint's own. `machine_bytes_per_s` and `machine_flops_per_s` are what the machine can read and compute;
    0: measured when the worker starts. `quantize` auto: what the model's own precision says; `quantize_cache` is a directory or "none".
    `spare_worker` keeps a second process with its libraries loaded: a restart is a load only. `deterministic` computes each row of a step
    to the same bits whatever else the step holds, or refuses to start. `backend` is torch, onnx (an exported graph in ONNX Runtime) or
    auto, which asks the measured table `backend_table` ("": the one that comes with this package). `kv_cache_dtype` auto is the dtype,
    or bfloat16 beside quantised weights on a CPU that multiplies it.
    `cuda_graphs` auto replays decode steps from graphs on a GPU, off launches every kernel of every step.
    """

    backend: str = "auto"
    backend_table: str = ""
    dtype: str = "auto"
    device: str = "auto"
    tier: str = "auto"
    threads: int = 0
    kv_bytes: int = 0
    context_tokens: int = 0
    image_cache_bytes: int = 64 * MIB
    heartbeat_s: float = 5.0
    step_deadline_s: float = 60.0
    load_deadline_s: float = 1800.0
    spare_worker: bool = False
    quantize: str = "auto"
    quantize_cache: str = "~/.cache/deepseek-service"
    quantize_cache_bytes: int = 16 * 1024 * MIB
    machine_bytes_per_s: float = 0.0
    machine_flops_per_s: float = 0.0
    deterministic: bool = False
    kv_cache_dtype: str = "auto"
    cuda_graphs: str = "auto"


@dataclass(frozen=True, slots=True)
class AttentionSettings:
    """What is asked of every served model's attention; 0, `auto` and nothing mean what the checkpoint says.

    `attention_window` tokens and the first block are read as they were computed, of the rest the best `far_blocks` blocks, chosen anew
    every `far_refresh` tokens and kept as `kv_far` says. `prefill` dense lets prompt tokens read all far blocks; `dense_layers` read
    everything, of a model with far blocks these instead of its own (None keeps them). `max_position_embeddings` is the longest sequence,
    `rope_scaling` how a longer one than trained is reached.
    """

    attention_window: int = 0
    far_blocks: int = 0
    far_refresh: int = 0
    kv_far: str = "auto"
    prefill: str = "sparse"
    dense_layers: tuple[int, ...] | None = None
    max_position_embeddings: int = 0
    rope_scaling: str = "auto"


@dataclass(frozen=True, slots=True)
class FleetSettings:
    """Which versions are loaded and which one `auto` means. `memory_bytes` 0: what the machine leaves.

    `load` is `start` (all before the first request), `demand` (the default at once, others when they are asked for) or `auto` (demand for
    the bundled lines, else start). A request waits `load_wait_s` for its version. `cost` is what `auto` does where a request does not say.
    """

    memory_bytes: int = 0
    load: str = "auto"
    load_wait_s: float = 30.0
    cost: str = "any"


@dataclass(frozen=True, slots=True)
class TierChoice:
    """The hardware tier that a service runs as. `how` is given or detected, and `reason` what it was detected by.

    `flags` are the defaults that its profile set, as one would type them; `more` those that it would set as well if the tier were named;
    `held_back` those that gave way to what else was set, or to the device.
    """

    name: str
    how: str
    reason: str
    flags: str
    more: str
    held_back: str = ""


@dataclass(frozen=True, slots=True)
class ModelSource:
    """One model to serve: its served `name` and the directory that holds it."""

    name: str
    directory: str


@dataclass(frozen=True, slots=True)
class LaunchSettings:
    """One process of a parallel training run: its number among all and on its host, how many there are, and where rank 0 listens."""

    rank: int
    size: int
    local_rank: int
    address: str
    port: int
