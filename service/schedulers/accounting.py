"""What the loop records: counts and times of steps and sequences, and the arithmetic that the steps cost by the model's own formulas.

It adds to children bound once; per token it costs one dictionary update. It does not know how metrics are shown. Invariant: every
accepted sequence is counted in `requests_total` exactly once, when it ends.
"""

from __future__ import annotations

from collections import Counter

from service.schedulers.planner import Planner, Step
from service.schedulers.sequence import Sequence
from service.schedulers.service_levels import ServiceLevels
from service.telemetry import Distribution, VersionMetrics
from service.types.errors import DeadlineExceeded
from service.types.model_spec import ELEMENT_BYTES, ModelSpec
from service.types.plan import BackendInfo, ImageWork, StepResult
from service.types.request import FinishEvent, FinishReason
from service.types.settings import SchedulerSettings


class StepCost:
    """FLOPs and bytes of a step, the same as `ModelSpec.flops` and `.bytes_read`, with the sums over layers taken once.

    `element_bytes` is the size of what is cached and, unless `parameter_bytes` says otherwise, of a parameter.
    """

    def __init__(self, spec: ModelSpec, element_bytes: int, parameter_bytes: float | None = None) -> None:
        head = spec.vocab_size * spec.dim
        self._flops_a_token = 2.0 * (spec.matmul_parameters - head)
        self._flops_a_sample = 2.0 * head
        self._weight_bytes = spec.matmul_parameters_read * float(parameter_bytes or element_bytes)
        kinds = Counter(layer.attention for layer in spec.layers)
        self._kinds = tuple((attention, float(count), 4.0 * attention.heads * attention.head_dim) for attention, count in kinds.items())
        self._element_bytes = element_bytes

    def of(self, tokens: int, samples: int, sequences: int, context_tokens: float) -> tuple[float, float]:
        """(FLOPs, bytes read) of a step of `tokens` positions and `sequences` rows that see `context_tokens` each on average."""
        flops = tokens * self._flops_a_token + samples * self._flops_a_sample
        size = self._weight_bytes
        for attention, layers, width in self._kinds:
            flops += tokens * layers * width * sum(attention.tokens_seen(context_tokens))
            size += sequences * layers * attention.bytes_seen(context_tokens, self._element_bytes)
        return flops, size


class Accounting:
    """The bound metrics of one version's loop."""

    def __init__(self, metrics: VersionMetrics, spec: ModelSpec, dtype: str, settings: SchedulerSettings) -> None:
        self._metrics = metrics
        self._levels = ServiceLevels(metrics, settings)
        self._spec = spec
        self._cost = StepCost(spec, ELEMENT_BYTES.get(dtype, 4))
        self._generated = metrics.value("generation_tokens_total")
        self._prompt = metrics.value("prompt_tokens_total")
        self._cached = metrics.value("prompt_tokens_cached_total")
        self._preemptions = metrics.value("preemptions_total")
        self._flops = metrics.value("model_flops_total")
        self._bytes = metrics.value("model_bytes_read_total")
        self._far_blocks = metrics.value("far_blocks_read_total")
        self._step_tokens = metrics.distribution("step_tokens")
        self._kinds: dict[str, Distribution] = {}

    def ready(self, info: BackendInfo, program: str, planner: Planner) -> None:
        """The worker is ready: bind what is read when somebody looks."""
        metrics, memory = self._metrics, dict(info.memory_bytes)
        metrics.value("model_loaded").set(1)
        kept = info.kv_cache_dtype or info.dtype
        metrics.value("build_info", program, info.dtype, info.backend, info.quantize, kept).set(1)
        metrics.value("tier_info", *metrics.tier).set(1)
        for phase, seconds in info.phases_s:
            metrics.value("startup_seconds", phase).set(seconds)
        for kind, limit in info.limits:
            metrics.value("machine_limit", kind).set(limit)
        metrics.watch("requests_running", lambda: len(planner.running))
        metrics.watch("requests_waiting", lambda: len(planner.waiting))
        metrics.watch("prefix_cache_tokens", lambda: planner.cache.cached_tokens)
        element_bytes = ELEMENT_BYTES.get(kept, 4)
        quantised = info.quantize != "none" and "weights" in memory
        parameter_bytes = memory["weights"] / self._spec.parameters if quantised else ELEMENT_BYTES.get(info.dtype, 4)
        self._cost = StepCost(self._spec, element_bytes, parameter_bytes)
        for index, (group, blocks) in enumerate(zip(info.kv_layout.groups, info.group_blocks, strict=True)):
            size = memory.get(f"kv:{group.name}", blocks * info.kv_layout.block_bytes(group, element_bytes))
            metrics.value("kv_cache_bytes", group.name).set(size)
            metrics.watch("kv_cache_usage_ratio", lambda index=index: planner.space.pools[index].used_ratio, group.name)  # type: ignore[misc]

    def lost(self, reason: str) -> None:
        """The worker was lost."""
        self._metrics.value("model_loaded").set(0)
        self._metrics.value("worker_restarts_total", reason).add()

    def rejected(self, reason: str, sequences: int) -> None:
        """Sequences were refused at the door."""
        self._metrics.value("admission_rejections_total", reason).add(sequences)

    def stepped(self, step: Step, result: StepResult, preemptions: int) -> None:
        """A step was executed, after `preemptions` since the last."""
        rows = len(step.entries)
        flops, size = self._cost.of(step.tokens, len(result.tokens), rows, step.context_tokens / rows)
        self._flops.value += flops
        self._bytes.value += size
        self._far_blocks.value += result.far_blocks_read
        self._preemptions.value += preemptions
        self._step_tokens.observe(step.tokens)
        kind = "decode" if step.decodes == rows else "mixed" if step.decodes else "prefill"
        seconds = self._kinds.get(kind)
        if seconds is None:
            seconds = self._kinds[kind] = self._metrics.distribution("step_seconds", kind)
        seconds.observe(result.execute_s)
        if result.images is not None:
            self._looked(result.images)
        for op, implementation, calls in result.dispatch:
            self._metrics.value("kernel_dispatch_total", op, implementation).add(calls)
        for how, forwards in result.forwards:
            self._metrics.value("decode_graph_steps_total", how).add(forwards)

    def _looked(self, work: ImageWork) -> None:
        self._metrics.value("images_total", "encoded").add(work.encoded)
        self._metrics.value("images_total", "found").add(work.found)
        self._metrics.value("image_tokens_total").add(work.encoded_tokens)
        self._metrics.value("fusion_rows_total").add(work.seeing)
        for modality, gates in (("text", work.text_gates), ("image", work.image_gates)):
            for head, total in enumerate(gates):
                self._metrics.value("fusion_gate_total", modality, str(head)).add(total)
        self._flops.value += work.flops

    def generated(self, tokens: int, last_s: float, now: float) -> None:
        """`tokens` were published now; of them, those counted as `lockstep` follow a token of their sequence at `last_s`."""
        self._generated.value += tokens
        for latencies in self._metrics.routes.values():
            if latencies.lockstep:
                latencies.gap.observe(now - last_s, latencies.lockstep)
                latencies.lockstep = 0

    def opened(self, sequence: Sequence, now: float) -> None:
        """The sequence got a row for the first time."""
        sequence.opened_s = now
        sequence.latencies.queue.observe(now - sequence.arrived_s)

    def prompt_read(self, sequence: Sequence, now: float) -> None:
        """The prompt is computed and the first token (if one was wanted) is known."""
        self._prompt.value += sequence.prompt_tokens
        self._cached.value += sequence.cached_tokens or 0
        sequence.first_token_s = now
        latencies = sequence.latencies
        latencies.first.observe(now - sequence.arrived_s)
        latencies.prefill.observe(now - sequence.opened_s)

    def ended(self, sequence: Sequence, ending: FinishEvent, now: float) -> None:
        """The sequence ended."""
        self._metrics.value("requests_total", _outcome(ending)).add()
        self._levels.ended(sequence, ending.reason, now)
        latencies = sequence.latencies
        latencies.duration.observe(now - sequence.arrived_s)
        if sequence.first_token_s:
            latencies.decode.observe(now - sequence.first_token_s)
            if sequence.generated > 1:
                latencies.per_token.observe((sequence.last_token_s - sequence.first_token_s) / (sequence.generated - 1))
        self._metrics.distribution("request_prompt_tokens").observe(sequence.prompt_tokens)
        self._metrics.distribution("request_generation_tokens").observe(sequence.generated)


def _outcome(ending: FinishEvent) -> str:
    if isinstance(ending.error, DeadlineExceeded):
        return "deadline"
    return ending.reason.value if ending.reason is not FinishReason.ERROR else "error"
