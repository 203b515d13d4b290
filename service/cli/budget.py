"""KV memory of several versions on one machine, planned before anything is loaded.

It does not know workers. Invariants: one version plans for itself (0); several together never plan more than half of what their weights and
workspaces leave; a budget that the user names is kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from service.checkpoints.quantisation import weight_bytes
from service.engine.choosing_memory import StepSize, kept_bytes, step_bytes, tile_tokens
from service.engine.memory import AUTO_SHARE, image_room, workspace_bytes
from service.types.errors import CapacityError
from service.types.model_spec import ELEMENT_BYTES, ModelSpec
from service.types.settings import EngineSettings, SchedulerSettings

if TYPE_CHECKING:
    from service.checkpoints.manifest import Manifest

RUNTIME_BYTES = 300 << 20
_MIB = 1 << 20


def share_kv(manifests: Sequence[Manifest], engine: EngineSettings, scheduler: SchedulerSettings, available_bytes: int) -> list[int]:
    """Bytes of KV blocks for each version. Raises CapacityError with the numbers when the versions do not fit together."""
    if len(manifests) < 2 or engine.kv_bytes:
        return [engine.kv_bytes] * len(manifests)
    taken, needs = 0, []
    for manifest in manifests:
        spec = manifest.spec
        context = min(engine.context_tokens or spec.context_tokens, spec.context_tokens)
        needs.append(scheduler.batch_size * _sequence_bytes(spec, context, engine))
        taken += _fixed_bytes(spec, engine, scheduler)
    left = int((available_bytes - taken) * AUTO_SHARE)
    if left <= 0:
        raise CapacityError(
            f"{len(manifests)} versions need {taken / _MIB:.0f} MiB before any KV cache and {available_bytes / _MIB:.0f} MiB are free: "
            "serve fewer or smaller models."
        )
    share = min(1.0, left / sum(needs))
    return [int(need * share) for need in needs]


def plan_demand(
    manifests: Sequence[Manifest], engine: EngineSettings, scheduler: SchedulerSettings, budget_bytes: int
) -> list[tuple[int, int]]:
    """(bytes of KV blocks, bytes in all) of each version when it is loaded on demand. Raises CapacityError for one that never fits."""
    plans = []
    for manifest in manifests:
        spec = manifest.spec
        context = min(engine.context_tokens or spec.context_tokens, spec.context_tokens)
        fixed = _fixed_bytes(spec, engine, scheduler)
        need = scheduler.batch_size * _sequence_bytes(spec, context, engine)
        kv_bytes = engine.kv_bytes or min(need, int((budget_bytes - fixed) * AUTO_SHARE))
        if kv_bytes <= 0 or fixed + kv_bytes > budget_bytes:
            raise CapacityError(
                f"{manifest.directory.name} needs {fixed / _MIB:.0f} MiB before any KV cache and may take {budget_bytes / _MIB:.0f} MiB: "
                "set a larger --memory_bytes or serve a smaller model."
            )
        plans.append((kv_bytes, fixed + kv_bytes))
    return plans


def _sequence_bytes(spec: ModelSpec, context: int, engine: EngineSettings) -> int:
    """Bytes of keys and values of one sequence of `context` tokens. Raises CapacityError for a model that cannot keep them in 8 bits.

    What `auto` keeps them in only the worker knows, so it counts as float32.
    """
    layout, kept = spec.kv_layout(), engine.dtype if engine.kv_cache_dtype == "auto" else engine.kv_cache_dtype
    if kept == "int8":
        layout = layout.in_eight_bits()
    return layout.sequence_bytes(context, ELEMENT_BYTES.get(kept, 4))


def _fixed_bytes(spec: ModelSpec, engine: EngineSettings, scheduler: SchedulerSettings) -> int:
    """What a version takes before any KV block: weights, workspace, encoded images and the process itself.

    What `auto` quantises depends on the device, which only the worker knows, so such weights are counted whole unless the device is named.
    """
    element = ELEMENT_BYTES.get(engine.dtype, 4)
    quantize = engine.quantize
    if quantize == "auto":
        quantize = spec.precision.quantize if engine.device == "cpu" else "none"
    context = min(engine.context_tokens or spec.context_tokens, spec.context_tokens)
    _, image_bytes = image_room(spec, context, engine.image_cache_bytes, element)
    workspace = workspace_bytes(spec, scheduler.step_tokens, scheduler.batch_size, element)
    layout, step = spec.kv_layout(), StepSize(scheduler.step_tokens, scheduler.batch_size, context)
    tokens_a_tile = tile_tokens(spec, element) if engine.device.startswith("cuda") else 0
    workspace += kept_bytes(layout, scheduler.batch_size) + step_bytes(layout, step, tokens_a_tile)
    return weight_bytes(spec, element, quantize) + workspace + image_bytes + RUNTIME_BYTES
