"""How a model's cache is kept: groups of layers with one cache shape, what each keeps behind its window, and its size in blocks and bytes.

A layer whose attention has a `FarSpec` belongs to two groups: one keeps the window and the sinks as they were computed (near), the other
what lies between them in its own form (far). It does not know layers' arithmetic, sequences or tensors. Invariant: which table entries of
a group exist is a function of positions alone, and this file is the only place that says which.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum

from service.types.errors import CapacityError

# Tokens of a block, in every group.
BLOCK_TOKENS = 64
# Candidates whose sub-blocks are looked at, and those whose keys are, for each far block that may be chosen (the kernels' own numbers,
# which a test compares).
FIRST_STAGE, SECOND_STAGE = 4, 3
# Bytes behind a token's keys, and behind its values, of one head in a cache of 8 bits on a CPU: their scale.
SCALE_BYTES = 4
# Tokens of the pieces in which a GPU decodes a row (the kernels' own number, which a test compares).
SPLIT_TOKENS = 512


class FarStore(Enum):
    """How tokens behind the window are kept: quantised to 8 or 4 bits, in the model's own type, or not at all."""

    INT8 = "int8"
    INT4 = "int4"
    NATIVE = "native"
    EVICT = "evict"


# Without a number of its own, a layer reads this many far blocks below this position, and twice as many from there on.
FAR_BLOCKS, FAR_POSITION = 16, 32_768


@dataclass(frozen=True, slots=True)
class FarSpec:
    """What a layer does with blocks behind its window: keep them in `store` and let every query choose the best `blocks` of them.

    `blocks` 0 means 16, from position 32768 on 32. The choice is made at positions that are multiples of `refresh`, which divides the
    block size, and shared by the queries that follow; the first `sink_blocks` blocks are never far. Blocks are chosen by the bounds of
    their keys, kept for each `sub_block_tokens` tokens, and by these keys. With `dense_prompts` queries whose anchor lies in the prompt
    read all far blocks.
    """

    blocks: int = 0
    store: FarStore = FarStore.INT8
    refresh: int = 1
    sub_block_tokens: int = 16
    sink_blocks: int = 1
    dense_prompts: bool = False

    def budget(self, anchor: int) -> int:
        """Far blocks that queries read whose anchor is the position `anchor`."""
        if self.store is FarStore.EVICT:
            return 0
        return self.blocks or (FAR_BLOCKS if anchor < FAR_POSITION else 2 * FAR_BLOCKS)


@dataclass(frozen=True, slots=True)
class KvGroup:
    """Layers whose caches have one shape and one window: they share block tables. Dims are per K/V head.

    Without `far` a window is exact to the token. With it the window reaches back to the start of its first block, and the group is near,
    or far if `source` names the near group (by its index in the layout) that its blocks come from.
    """

    name: str
    layers: tuple[int, ...]
    kv_heads: int
    key_dim: int
    value_dim: int
    window: int | None = None
    far: FarSpec | None = None
    source: int | None = None

    @property
    def sink_blocks(self) -> int:
        """First table entries that are never released."""
        return self.far.sink_blocks if self.far is not None and self.source is None else 0

    @property
    def refresh(self) -> int:
        """Positions that share one start of the window."""
        return 1 if self.far is None else self.far.refresh

    def token_bytes(self, element_bytes: int) -> int:
        """Bytes kept for one token in all layers of a group that is not far."""
        return len(self.layers) * self.kv_heads * (self.key_dim + self.value_dim) * element_bytes


@dataclass(frozen=True, slots=True)
class KvLayout:
    """The groups of a model's cache and the block size in tokens; every layer is in one group, or in a near and a far one."""

    groups: tuple[KvGroup, ...]
    block_tokens: int = BLOCK_TOKENS

    @property
    def slice_tokens(self) -> int | None:
        """The longest slice of one sequence that a step may compute: blocks become far before the step that no longer finds them near."""
        return min((group.window for group in self.groups if group.source is not None and group.window), default=None)

    @property
    def dense_prompts(self) -> bool:
        """Whether what a position sees also depends on where the prompt ends."""
        return any(group.far is not None and group.far.dense_prompts for group in self.groups)

    def first_read(self, group: KvGroup, position: int) -> int:
        """The lowest table index behind the sinks that a query at `position` or later reads."""
        if group.source is not None and group.far is not None:
            return group.far.sink_blocks
        return self._window_start(group, position)

    def entries(self, group: KvGroup, position: int) -> int:
        """How long the table is when `position` is the newest that was planned."""
        if group.source is not None and group.far is not None:
            return max(self._window_start(group, position), group.far.sink_blocks)
        return position // self.block_tokens + 1

    def reach(self, group: KvGroup, entries: int) -> int:
        """The positions that a table of so many entries serves."""
        return entries * self.block_tokens if group.source is None else self.next_start(group, entries)

    def next_start(self, group: KvGroup, start: int) -> int:
        """The first position whose window starts behind block `start`."""
        step = group.refresh
        return -(-((start + 1) * self.block_tokens + (group.window or 0) - 1) // step) * step

    def in_eight_bits(self) -> KvLayout:
        """The same cache with keys and values in 8 bits on a CPU, where dims count the bytes of the scales too; far groups keep their form.

        Raises CapacityError for far groups in the model's own type: of another type than the blocks that they come from.
        """
        if any(group.far is not None and group.far.store is FarStore.NATIVE for group in self.groups):
            raise CapacityError(
                "--kv_cache_dtype int8 does not go with --kv_far bf16: set int8 or int4 for far blocks, or keep all in bfloat16."
            )
        near = (replace(g, key_dim=g.key_dim + SCALE_BYTES, value_dim=g.value_dim + SCALE_BYTES) for g in self.groups)
        return replace(self, groups=tuple(g if g.source is not None else scaled for g, scaled in zip(self.groups, near, strict=True)))

    def blocks_for(self, group: KvGroup, context_tokens: int) -> int:
        """Most blocks of `group` that one sequence of `context_tokens` holds at a step boundary."""
        full = -(-context_tokens // self.block_tokens)
        if group.window is None:
            return full
        if group.source is not None and group.far is not None:
            return self.entries(group, max(context_tokens - 1, 0)) - group.far.sink_blocks
        # A window that is exact to the token needs its blocks and one more; one that starts with a block, as many as reach behind it.
        reaching = group.window if group.far is None else group.window - 1
        return min(full, group.sink_blocks + -(-reaching // self.block_tokens) + 1)

    def block_bytes(self, group: KvGroup, element_bytes: int) -> int:
        """Bytes of one block of `group` over all its layers, with scales and bounds where it is far."""
        values = self.block_tokens * (group.key_dim + group.value_dim)
        if group.source is None or group.far is None:
            return self.block_tokens * group.token_bytes(element_bytes)
        size = {FarStore.INT8: values, FarStore.INT4: values // 2}.get(group.far.store, values * element_bytes)
        scales = 0 if group.far.store is FarStore.NATIVE else 2 * 2 * self.block_tokens
        bounds = (1 + self.block_tokens // group.far.sub_block_tokens) * 2 * group.key_dim + 2
        return len(group.layers) * group.kv_heads * (size + scales + bounds)

    def sequence_bytes(self, context_tokens: int, element_bytes: int) -> int:
        """Bytes kept for one sequence of `context_tokens`."""
        return sum(self.blocks_for(group, context_tokens) * self.block_bytes(group, element_bytes) for group in self.groups)

    def _window_start(self, group: KvGroup, position: int) -> int:
        if group.window is None:
            return 0
        anchor = position // group.refresh * group.refresh
        return max(anchor - group.window + 1, 0) // self.block_tokens
