"""How much memory a worker may take and on what: weights, KV blocks by group, workspace, the runtime itself. Pure arithmetic, no torch.

It does not allocate. Invariant: the lines add up to what the worker will use once its blocks are written, and every group of blocks holds
the same number of longest sequences.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
from dataclasses import dataclass
from pathlib import Path

from service.engine.choosing_memory import StepSize, kept_bytes, step_bytes, tile_tokens
from service.engine.graph_memory import graph_bytes
from service.types.errors import CapacityError
from service.types.kv_layout import KvGroup, KvLayout
from service.types.model_spec import ELEMENT_BYTES, ModelSpec
from service.types.plan import LoadRequest

# Of what the machine leaves free, unless the user names a number.
AUTO_SHARE = 0.5
SMALLEST_CONTEXT_TOKENS = 256
# Rows whose logits exist at once when prompts are scored.
SCORED_ROWS = 64
_MIB = 1 << 20
# Limit and usage in the first (`memory` controller) and second version of control groups.
_GROUP_FILES = {"memory": ("memory.limit_in_bytes", "memory.usage_in_bytes"), "": ("memory.max", "memory.current")}


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """`lines` are (name, bytes); `group_blocks` the usable blocks of each group, the null block not counted.

    `image_tokens` encoded image tokens are kept at most.
    """

    lines: tuple[tuple[str, int], ...]
    group_blocks: tuple[int, ...]
    context_tokens: int
    image_tokens: int = 0

    @property
    def total_bytes(self) -> int:
        """What the worker will use in all."""
        return sum(size for _, size in self.lines)


@dataclass(frozen=True, slots=True)
class Usage:
    """What is taken before any block: parameters, and the process with its libraries; and whether the device is a GPU."""

    weight_bytes: int
    runtime_bytes: int
    available_bytes: int
    on_gpu: bool = False


def plan_memory(spec: ModelSpec, layout: KvLayout, element_bytes: int, request: LoadRequest, usage: Usage) -> MemoryPlan:
    """Divide the memory. Raises CapacityError with the numbers when it does not suffice.

    Without `kv_bytes`: what `max_rows` full contexts can use, at most half of what weights and workspace leave of `available_bytes`. The
    checkpoint's own context shrinks to what fits (not below 256 tokens); one that the request names does not. Activations take
    `element_bytes`, and so do keys and values unless the request names a type for them (loading.py resolves what `auto` is).
    """
    context = _context(spec, request)
    workspace = workspace_bytes(spec, request.max_step_tokens, request.max_rows, element_bytes)
    tokens_a_tile = tile_tokens(spec, element_bytes) if usage.on_gpu else 0
    workspace += step_bytes(layout, StepSize(request.max_step_tokens, request.max_rows, context), tokens_a_tile)
    choices = kept_bytes(layout, request.max_rows)
    graphs = 0
    if usage.on_gpu and request.cuda_graphs == "auto":
        graphs = graph_bytes(spec, layout, request.max_rows, context, element_bytes)
    image_tokens, image_bytes = image_room(spec, context, request.image_cache_bytes, element_bytes)
    kept_element_bytes = ELEMENT_BYTES.get(request.kv_cache_dtype, element_bytes)
    left = usage.available_bytes - usage.weight_bytes - workspace - choices - graphs - image_bytes
    most = _pool_bytes(layout, context, request, float(request.max_rows), kept_element_bytes)
    budget = request.kv_bytes or min(most, int(left * AUTO_SHARE))
    if budget > left:
        raise CapacityError(
            f"The model needs {_mib(usage.weight_bytes)} for weights, {_mib(workspace + choices + graphs)} for workspace and "
            f"{_mib(budget)} for KV blocks, and {_mib(usage.available_bytes)} are free: set a smaller KV cache or serve a smaller model."
        )
    if _pool_bytes(layout, context, request, 1.0, kept_element_bytes) > budget:
        context = _shrunk_context(layout, context, request, budget, kept_element_bytes)
    blocks = _split(layout, context, request, budget, kept_element_bytes)
    kv_lines = tuple(
        (f"kv:{group.name}", (count + 1) * layout.block_bytes(group, kept_element_bytes))
        for group, count in zip(layout.groups, blocks, strict=True)
    )
    other_lines = [(name, size) for name, size in (("choices", choices), ("graphs", graphs), ("images", image_bytes)) if size]
    lines = (("weights", usage.weight_bytes), *kv_lines, *other_lines, ("workspace", workspace), ("runtime", usage.runtime_bytes))
    return MemoryPlan(lines, blocks, context, image_tokens)


def workspace_bytes(spec: ModelSpec, step_tokens: int, max_rows: int, element_bytes: int) -> int:
    """The most that one step's temporaries take: activations of the widest layer and the logits with their copies in float32."""
    widest = 0
    for layer in spec.layers:
        attention = layer.attention
        heads = (attention.heads + 2 * attention.kv_heads) * attention.head_dim
        widest = max(widest, 3 * layer.mlp.hidden, 3 * heads + attention.heads * attention.head_dim)
    activations = step_tokens * (4 * spec.dim + widest) * element_bytes
    logits = max(min(max_rows, step_tokens), SCORED_ROWS) * spec.vocab_size * (element_bytes + 2 * 4)
    return activations + logits + _encoder_bytes(spec, element_bytes)


def _encoder_bytes(spec: ModelSpec, element_bytes: int) -> int:
    """Temporaries of encoding the largest image: its pixels in float32 and the activations of one layer."""
    vision = spec.vision
    if vision is None:
        return 0
    patches = vision.most_tokens * vision.merge**2
    return patches * (4 * vision.patch_values + (8 * vision.dim + 3 * vision.mlp_hidden) * element_bytes)


def image_room(spec: ModelSpec, context: int, cache_bytes: int, element_bytes: int) -> tuple[int, int]:
    """Image tokens that are kept encoded, at least those of one whole context, and their bytes."""
    token_bytes = spec.image_token_values() * element_bytes
    tokens = max(context, cache_bytes // token_bytes) if token_bytes else 0
    return tokens, tokens * token_bytes


def _context(spec: ModelSpec, request: LoadRequest) -> int:
    if request.context_tokens > spec.context_tokens:
        raise CapacityError(f"A context of {request.context_tokens} tokens was asked for; the model has {spec.context_tokens}.")
    return request.context_tokens or spec.context_tokens


def _spare_blocks(layout: KvLayout, group: KvGroup, context: int, request: LoadRequest) -> int:
    """Blocks beyond the sequences' own: a window's sequence holds a whole slice more while a step runs."""
    if group.window is None or group.source is not None:
        return 0
    full = -(-context // layout.block_tokens)
    return min(full - layout.blocks_for(group, context), -(-request.max_step_tokens // layout.block_tokens))


def _pool_bytes(layout: KvLayout, context: int, request: LoadRequest, sequences: float, element_bytes: int) -> int:
    total = 0.0
    for group in layout.groups:
        blocks = sequences * layout.blocks_for(group, context) + _spare_blocks(layout, group, context, request) + 1
        total += blocks * layout.block_bytes(group, element_bytes)
    return int(total)


def _split(layout: KvLayout, context: int, request: LoadRequest, budget: int, element_bytes: int) -> tuple[int, ...]:
    """Blocks of each group such that all hold the same number of longest sequences, which need not be whole."""
    fixed = _pool_bytes(layout, context, request, 0.0, element_bytes)
    sequences = (budget - fixed) / layout.sequence_bytes(context, element_bytes)
    return tuple(
        int(sequences * layout.blocks_for(group, context) + 1e-6) + _spare_blocks(layout, group, context, request)
        for group in layout.groups
    )


def _shrunk_context(layout: KvLayout, context: int, request: LoadRequest, budget: int, element_bytes: int) -> int:
    smallest = min(SMALLEST_CONTEXT_TOKENS, context)
    blocks = -(-context // layout.block_tokens)
    while blocks and _pool_bytes(layout, blocks * layout.block_tokens, request, 1.0, element_bytes) > budget:
        blocks -= 1
    fitting = blocks * layout.block_tokens
    if request.context_tokens or fitting < smallest:
        asked = context if request.context_tokens else smallest
        needed = _pool_bytes(layout, asked, request, 1.0, element_bytes)
        raise CapacityError(
            f"One sequence of {asked} tokens needs {_mib(needed)} of KV blocks and {_mib(max(budget, 0))} are at hand, enough for "
            f"{fitting} tokens: set a larger KV cache, a shorter context, or serve a smaller model."
        )
    return fitting


def _mib(size: int) -> str:
    return f"{size / _MIB:.1f} MiB"


def resident_bytes(process: int | None = None) -> int:
    """Physical memory that a process uses now, this one unless its id is given."""
    pages = int(Path(f"/proc/{process or 'self'}/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def settled_bytes() -> int:
    """Physical memory that this process keeps after loading: glibc gives back whole pages that were freed.

    What loading frees lies between what it keeps, in holes that later requests for memory seldom fit: up to 0.8 of the weights' size, more
    or less from one start to the next.
    """
    with contextlib.suppress(OSError, AttributeError):  # Another C library has no such call.
        ctypes.CDLL(None).malloc_trim(ctypes.c_size_t(0))
    return resident_bytes()


def available_bytes() -> int:
    """What this process may still take: the machine's free memory, bounded by every control group above us."""
    lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    return min([free, *_group_room(Path("/sys/fs/cgroup"), Path("/proc/self/cgroup").read_text(encoding="utf-8"))])


def _group_room(root: Path, membership: str) -> list[int]:
    """Free bytes under each memory limit that applies, for both versions of control groups. `membership` is /proc/self/cgroup's text."""
    room: list[int] = []
    for line in membership.splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers not in _GROUP_FILES:
            continue
        base = root / controllers
        here = base / path.lstrip("/")
        for directory in (here, *here.parents):
            room += _free_under(directory, *_GROUP_FILES[controllers])
            if directory == base:
                break
    return room


def _free_under(directory: Path, limit_name: str, usage_name: str) -> list[int]:
    try:
        limit = (directory / limit_name).read_text(encoding="ascii").strip()
        if limit == "max":
            return []
        used = int((directory / usage_name).read_text(encoding="ascii"))
        stat = dict(line.split() for line in (directory / "memory.stat").read_text(encoding="ascii").splitlines())
    except OSError:
        return []
    return [int(limit) - used + int(stat.get("total_inactive_file", stat.get("inactive_file", "0")))]
