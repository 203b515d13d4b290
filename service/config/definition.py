"""Every setting of `deepseek-serve`, once: name, type, bounds, default and one sentence. Flags, environment, file and docs follow from it.

It does not know where a value comes from or who uses it. A section is a class; a field whose name equals one in `types/settings` is handed
to that room. Invariant: defaults are those of `types/settings`; none is spelled here.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, NamedTuple, cast

from pydantic import BaseModel, BeforeValidator, Field
from pydantic_settings import BaseSettings, NoDecode, PydanticBaseSettingsSource, SettingsConfigDict

from service.config.flags import parse_bytes
from service.types.settings import AttentionSettings, EngineSettings, FleetSettings, HttpLimits, HttpSettings, SchedulerSettings

ENVIRONMENT_PREFIX = "DEEPSEEK_"
# Flags that are short for a choice of another one.
SHORT_FORMS = {"fp16": ("dtype", "float16"), "bf16": ("dtype", "bfloat16"), "onnx_runtime": ("backend", "onnx")}

_HTTP, _LIMITS, _SCHEDULER = HttpSettings(), HttpLimits(), SchedulerSettings()
_ENGINE, _ATTENTION, _FLEET = EngineSettings(), AttentionSettings(), FleetSettings()


class Unit(NamedTuple):
    """What a number counts: the word for its place in help texts, and the words that follow "must be"."""

    metavar: str
    words: str


class Former(NamedTuple):
    """What values that a setting no longer takes are called now."""

    names: dict[str, str]


def _no_bool(value: object) -> object:
    if isinstance(value, bool):
        raise ValueError("a switch where a number belongs")
    return value


def to_bytes(value: object) -> object:
    """A size as a number of bytes; what is no text is left to the type's own check."""
    return parse_bytes(value) if isinstance(value, str) else _no_bool(value)


def _to_list(value: object) -> object:
    if isinstance(value, str):
        return [part.strip() for part in value.split(",") if part.strip()]
    return value


def _to_numbers(value: object) -> object:
    """Numbers by comma in a text, in each text of a repeated flag, or one number alone, as YAML reads it; `none` is no number."""
    if value in (NO_LAYERS, [NO_LAYERS]):
        return []
    if isinstance(value, int) and not isinstance(value, bool):
        return [value]
    if isinstance(value, list):
        return [part for item in value for part in (cast(list[object], _to_list(item)) if isinstance(item, str) else [_no_bool(item)])]
    return _to_list(value)


def _to_text(value: object) -> object:
    return str(value) if isinstance(value, float) else value


Count = Annotated[int, BeforeValidator(_no_bool), Field(ge=1, le=1 << 40)]
Whole = Annotated[int, BeforeValidator(_no_bool), Field(ge=0, le=1 << 40)]
SECONDS = Unit("SECONDS", "a number of seconds")
Seconds = Annotated[float, BeforeValidator(_no_bool), Field(gt=0, le=1e7, allow_inf_nan=False), SECONDS]
Pause = Annotated[float, BeforeValidator(_no_bool), Field(ge=0, le=1e7, allow_inf_nan=False), SECONDS]
Milliseconds = Annotated[float, BeforeValidator(_no_bool), Field(ge=0, le=1e9, allow_inf_nan=False), Unit("MS", "a number of milliseconds")]
Rate = Annotated[float, BeforeValidator(_no_bool), Field(ge=0, le=1e18, allow_inf_nan=False), Unit("R", "a number a second, such as 27e9,")]
Size = Annotated[int, BeforeValidator(to_bytes), Field(ge=0, le=1 << 50)]
Backend = Literal["auto", "torch", "onnx"]
Dtype = Literal["auto", "float32", "bfloat16", "float16"]
KvCacheDtype = Literal["auto", "float32", "bfloat16", "float16", "int8", "fp8"]
Quantize = Literal["auto", "none", "int8", "int4"]
Load = Literal["auto", "start", "demand"]
Cost = Literal["any", "low"]
Tier = Literal["auto", "gpu", "edge", "cpu"]
Compat = Literal["none", "vllm"]
RunAhead = Annotated[Literal["auto", "always", "never"], Former({"1": "always", "0": "never"})]
CudaGraphs = Literal["auto", "off"]
KvFar = Literal["auto", "int8", "int4", "bf16", "evict"]
Prefill = Literal["sparse", "dense"]
RopeScaling = Literal["auto", "keep", "linear", "dynamic", "yarn"]
NO_LAYERS = "none"
Texts = Annotated[list[str], NoDecode, BeforeValidator(_to_list)]
NUMBERS = Unit("N,N", "whole numbers by comma, such as 0,1, or none")
Layers = Annotated[list[Annotated[int, Field(ge=0, le=4095)]], NoDecode, BeforeValidator(_to_numbers), NUMBERS]


class ModelSection(BaseModel):
    """Models"""

    model: Texts = Field([], description="directory of a checkpoint, served under its base name, or NAME=DIR; repeatable")
    version: Annotated[str, BeforeValidator(_to_text)] = Field(
        "", description="the version to serve instead of a directory: a bundled line such as v2.3, or a registered patch or digest"
    )
    restore: bool = Field(False, description="serve what was last served and ready, as the registry recorded it")
    registry: str = Field(
        "",
        description="file that records what was verified and served (in the user's data directory when left out); none keeps none",
    )


class FleetSection(BaseModel):
    """Several versions"""

    load: Load = Field(
        cast(Load, _FLEET.load),
        description="when models are loaded: all at start, or all but the default on demand (auto: the bundled ones)",
    )
    memory_bytes: Size = Field(
        _FLEET.memory_bytes, description="memory for models loaded on demand, such as 8GiB; 0 takes what the machine leaves at start"
    )
    load_wait_s: Seconds = Field(_FLEET.load_wait_s, description="how long a request waits for its version to be loaded before a 503")
    cost: Cost = Field(cast(Cost, _FLEET.cost), description="what the model auto prefers where a request does not say: low is the cheapest")


class HttpSection(BaseModel):
    """HTTP"""

    host: str = Field(_HTTP.host, description="address to listen on; a public one needs a key or --insecure")
    port: Annotated[int, BeforeValidator(_no_bool), Field(ge=0, le=65535)] = Field(
        _HTTP.port, description="port to listen on; 0 takes a free one"
    )
    api_key: Texts = Field(list(_HTTP.api_keys), description="key that clients send as a bearer token; repeatable")
    insecure: bool = Field(_HTTP.insecure, description="listen on a public address without a key")
    metrics_key: bool = Field(_HTTP.metrics_key, description="ask for the key on /metrics too")
    metrics_compat: Compat = Field(
        cast(Compat, _HTTP.metrics_compat), description="vllm shows metrics under vLLM's names too, for its dashboards and autoscalers"
    )
    allowed_origins: Texts = Field(list(_HTTP.allowed_origins), description="origin of a web page that may call this service; repeatable")
    image_hosts: Texts = Field(
        list(_HTTP.image_hosts),
        description="host, or HOST:PORT, from which images named by URL may be fetched; none unless listed; repeatable",
    )
    drain_s: Pause = Field(_HTTP.drain_s, description="time that running requests get to end when the service is stopped")
    access_log: bool = Field(_HTTP.access_log, description="log one line for each request")


class LimitSection(BaseModel):
    """Limits on requests"""

    header_bytes: Annotated[Size, Field(ge=1024)] = Field(_LIMITS.header_bytes, description="most bytes of a request's headers")
    header_fields: Count = Field(_LIMITS.header_fields, description="most header fields")
    body_bytes: Annotated[Size, Field(ge=1024)] = Field(_LIMITS.body_bytes, description="most bytes of a request's body")
    header_read_s: Seconds = Field(_LIMITS.header_read_s, description="time in which the headers must arrive")
    body_idle_s: Seconds = Field(_LIMITS.body_idle_s, description="longest pause while a body arrives")
    stream_write_s: Seconds = Field(_LIMITS.stream_write_s, description="longest time that a client may leave written data unread")
    json_depth: Count = Field(_LIMITS.json_depth, description="deepest nesting of a JSON body")
    choices: Count = Field(_LIMITS.choices, description="most choices (n) of a request")
    prompts: Count = Field(_LIMITS.prompts, description="most prompts in a request")
    sequences: Count = Field(_LIMITS.sequences, description="most prompts times choices in a request")
    stop_strings: Count = Field(_LIMITS.stop_strings, description="most stop strings")
    stop_characters: Count = Field(_LIMITS.stop_characters, description="longest stop string, in characters")
    logit_bias_entries: Count = Field(_LIMITS.logit_bias_entries, description="most entries of logit_bias")
    top_logprobs: Whole = Field(_LIMITS.top_logprobs, description="most alternatives reported for a token")
    prompt_characters_per_token: Count = Field(
        _LIMITS.prompt_characters_per_token, description="prompt characters allowed for each token of context, checked before tokenizing"
    )
    template_s: Seconds = Field(_LIMITS.template_s, description="time in which a chat template must render")
    template_bytes: Annotated[Size, Field(ge=1024)] = Field(
        _LIMITS.template_bytes, description="memory that rendering a chat template may take"
    )
    images: Whole = Field(_LIMITS.images, description="most images of a request")
    image_bytes: Annotated[Size, Field(le=48 << 20)] = Field(_LIMITS.image_bytes, description="most bytes of one encoded image")
    image_pixels: Count = Field(_LIMITS.image_pixels, description="most pixels of the images of a request in all")
    image_s: Seconds = Field(_LIMITS.image_s, description="time in which an image must be decoded")
    image_memory_bytes: Annotated[Size, Field(ge=1 << 20)] = Field(
        _LIMITS.image_memory_bytes, description="memory that decoding an image may take"
    )
    image_processes: Annotated[Count, Field(le=64)] = Field(
        _LIMITS.image_processes, description="most processes that decode images, one image each at a time"
    )
    prepared_bytes: Size = Field(_LIMITS.prepared_bytes, description="memory for decoded and resized images that may come again")
    fetch_s: Seconds = Field(_LIMITS.fetch_s, description="time in which an image named by URL must arrive")


class SchedulerSection(BaseModel):
    """Scheduling"""

    batch_size: Annotated[Count, Field(le=4096)] = Field(_SCHEDULER.batch_size, description="most sequences running at once")
    step_tokens: Annotated[Count, Field(le=1 << 20)] = Field(
        _SCHEDULER.step_tokens, description="token budget of one step, prompt and generated tokens together"
    )
    queue_requests: Count = Field(_SCHEDULER.queue_requests, description="most sequences waiting; more are answered with 429")
    queue_tokens: Count = Field(_SCHEDULER.queue_tokens, description="most prompt tokens waiting")
    queue_pixel_bytes: Size = Field(_SCHEDULER.queue_pixel_bytes, description="most bytes of prepared image pixels waiting")
    request_deadline_s: Seconds = Field(_SCHEDULER.request_deadline_s, description="longest time from a request's arrival to its end")
    stream_events: Count = Field(
        _SCHEDULER.stream_events, description="most undelivered events of a stream before its client counts as too slow"
    )
    run_ahead: RunAhead = Field(
        cast(RunAhead, _SCHEDULER.run_ahead),
        description="send the worker its next step while it executes one; auto does where steps are short and nobody waits",
    )
    prefix_cache: bool = Field(_SCHEDULER.prefix_cache, description="reuse the KV cache of equal prompt beginnings")
    slo_ttft_ms: Milliseconds = Field(
        _SCHEDULER.slo_ttft_ms, description="service level: longest time to the first token, counted in slo_requests_total; 0 is none"
    )
    slo_tpot_ms: Milliseconds = Field(
        _SCHEDULER.slo_tpot_ms, description="service level: longest mean time of a token after the first; 0 is none"
    )


class EngineSection(BaseModel):
    """Engine"""

    backend: Backend = Field(
        cast(Backend, _ENGINE.backend),
        description="what computes: torch, or onnx for a graph in ONNX Runtime (CPU; where no model is named, bundled lines that it does "
        "not compute are left out); auto takes what was measured to be faster",
    )
    onnx_runtime: bool = Field(False, description="short for --backend onnx")
    backend_table: str = Field(
        _ENGINE.backend_table,
        description="file of measurements that auto asks instead of those that come with the package (deepseek-benchmark --keep_table)",
    )
    dtype: Dtype = Field(
        cast(Dtype, _ENGINE.dtype), description="type of weights and activations; auto takes what the device computes fast"
    )
    fp16: bool = Field(False, description="short for --dtype float16")
    bf16: bool = Field(False, description="short for --dtype bfloat16")
    device: Annotated[str, Field(pattern=r"^(auto|cpu|cuda(:\d+)?)$")] = Field(_ENGINE.device, description="auto, cpu, cuda or cuda:N")
    tier: Tier = Field(
        cast(Tier, _ENGINE.tier),
        description="hardware tier: sets its defaults where no flag does; auto detects it and sets only those that ask for no rounding (a "
        "batch size may have --backend auto take another engine)",
    )
    quantize: Quantize = Field(
        cast(Quantize, _ENGINE.quantize), description="quantise the weights when they are loaded; auto does what the model's precision says"
    )
    quantize_cache: str = Field(
        _ENGINE.quantize_cache, description="directory in which quantised weights are kept for the next start, or none", min_length=1
    )
    quantize_cache_bytes: Size = Field(
        _ENGINE.quantize_cache_bytes, description="most bytes that are kept there; what was used longest ago makes room"
    )
    threads: Annotated[Whole, Field(le=4096)] = Field(
        _ENGINE.threads,
        description="CPU threads of a worker; 0: all cores, of torch one for each 8 million parameters, more in steps of many tokens",
    )
    kv_bytes: Size = Field(
        _ENGINE.kv_bytes, description="memory of a version's KV cache, such as 512MiB; 0 takes what the machine leaves, bounded by need"
    )
    context_tokens: Whole = Field(
        _ENGINE.context_tokens, description="longest sequence, prompt and output together; 0 takes the checkpoint's own"
    )
    kv_cache_dtype: KvCacheDtype = Field(
        cast(KvCacheDtype, _ENGINE.kv_cache_dtype),
        description="type of cached keys and values; auto is that of the activations, or bfloat16 beside quantised weights on a CPU that "
        "multiplies it; bfloat16, float16 and int8 on a CPU, fp8 on a GPU",
    )
    cuda_graphs: CudaGraphs = Field(
        cast(CudaGraphs, _ENGINE.cuda_graphs),
        description="auto replays decode steps from CUDA graphs on a GPU; off launches every kernel of every step",
    )
    deterministic: bool = Field(
        _ENGINE.deterministic,
        description="give a sequence the same bits alone, in any batch, after preemption and restart; refused where that cannot hold",
    )
    image_cache_bytes: Size = Field(
        _ENGINE.image_cache_bytes, description="memory for encoded images of a version that reads them; never less than one context needs"
    )
    heartbeat_s: Seconds = Field(_ENGINE.heartbeat_s, description="longest silence of a worker before it counts as stalled")
    step_deadline_s: Seconds = Field(_ENGINE.step_deadline_s, description="longest time of one step before the worker is replaced")
    load_deadline_s: Seconds = Field(_ENGINE.load_deadline_s, description="longest time that loading a checkpoint may take")
    spare_worker: bool = Field(
        _ENGINE.spare_worker, description="keep a process with its libraries loaded (some 200 MB), so that a restart is a load only"
    )
    machine_bytes_per_s: Rate = Field(
        _ENGINE.machine_bytes_per_s, description="bytes a second that the machine can read from memory; 0 measures it at start-up"
    )
    machine_flops_per_s: Rate = Field(
        _ENGINE.machine_flops_per_s, description="operations a second that the machine can compute; 0 measures it at start-up"
    )


class AttentionSection(BaseModel):
    """Attention and context"""

    attention_window: Annotated[Whole, Field(le=1 << 24)] = Field(
        _ATTENTION.attention_window, description="last tokens that every layer reads as they were computed; 0 is what the model says"
    )
    far_blocks: Annotated[Whole, Field(le=1 << 16)] = Field(
        _ATTENTION.far_blocks,
        description="64-token blocks behind the window that a query reads; 0 is what the model says, or 16 (32 far out)",
    )
    far_refresh: Annotated[Whole, Field(le=64)] = Field(
        _ATTENTION.far_refresh,
        description="tokens that share one choice of far blocks, which costs answers; 0 is what the model says, or 1",
    )
    kv_far: KvFar = Field(
        cast(KvFar, _ATTENTION.kv_far),
        description="how the rest is kept; bf16 is the model's own type, evict keeps nothing",
    )
    prefill: Prefill = Field(cast(Prefill, _ATTENTION.prefill), description="dense lets prompt tokens read all far blocks")
    dense_layers: Layers = Field(
        [], description="layers that read everything, such as 0,1, or none; repeatable; the model's own when left out"
    )
    max_position_embeddings: Annotated[Whole, Field(le=1 << 24)] = Field(
        _ATTENTION.max_position_embeddings, description="longest sequence that the model is made to take; 0 is what it was trained for"
    )
    rope_scaling: RopeScaling = Field(
        cast(RopeScaling, _ATTENTION.rope_scaling),
        description="how more positions than trained are reached; keep changes nothing",
    )


SECTIONS: tuple[type[BaseModel], ...] = (
    ModelSection,
    FleetSection,
    HttpSection,
    LimitSection,
    SchedulerSection,
    EngineSection,
    AttentionSection,
)


class Definition(ModelSection, FleetSection, HttpSection, LimitSection, SchedulerSection, EngineSection, AttentionSection, BaseSettings):
    """All sections joined. It takes values only from its arguments: `load` joins the sources."""

    model_config = SettingsConfigDict(env_prefix=ENVIRONMENT_PREFIX, env_ignore_empty=True, extra="forbid", hide_input_in_errors=True)

    @classmethod
    def settings_customise_sources(
        cls, settings_cls: type[BaseSettings], init_settings: PydanticBaseSettingsSource, *_: Any, **_others: Any
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Only the arguments."""
        return (init_settings,)
