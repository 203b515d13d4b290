"""For which numbers of rows and lengths of tables decode steps are recorded, and what that takes in memory. Pure arithmetic, no torch.

It does not allocate or record. Invariant: `graph_bytes` is what the fixed arrays and the temporaries of the largest recorded step take,
and an allowance for what the driver keeps of each graph, which was not measured.
"""

from __future__ import annotations

from typing import NamedTuple

from service.engine.choosing_memory import StepSize, step_bytes, tile_tokens
from service.types.kv_layout import SPLIT_TOKENS, KvGroup, KvLayout
from service.types.model_spec import ModelSpec

# Shapes that are kept recorded, and what the driver may take for one.
MOST_GRAPHS, GRAPH_BYTES = 32, 4 << 20
# Pieces that all rows of a recorded step may have together: room for their sums is fixed.
MOST_SPLITS = 4096
# The shortest tables that are recorded for, in blocks; longer ones double.
FEWEST_BLOCKS = 64


class Shape(NamedTuple):
    """For how many rows, and for block tables of how many entries, a step is recorded."""

    rows: int
    blocks: int


def far_groups(layout: KvLayout) -> list[int]:
    """Indices of the far groups."""
    return [index for index, group in enumerate(layout.groups) if group.source is not None and group.far is not None]


def fixed_values(layout: KvLayout, shape: Shape) -> int:
    """Values of int32 that a step of this shape has."""
    return shape.rows * (4 + len(layout.groups) * (1 + shape.blocks) + 3 * len(far_groups(layout)))


def rows_for(rows: int) -> int:
    """The number of rows that a step of `rows` is recorded for: 1, 2, 4, 8, then multiples of 8, from 64 on of 32."""
    if rows <= 8:
        return 1 << (rows - 1).bit_length()
    step = 8 if rows <= 64 else 32
    return -(-rows // step) * step


def tables_for(blocks: int) -> int:
    """The entries of the block tables that a step with tables of `blocks` is recorded for."""
    return max(FEWEST_BLOCKS, 1 << (blocks - 1).bit_length())


def splits_of(layout: KvLayout, blocks: int) -> int:
    """The most pieces that one row is decoded in by any layer, where block tables have `blocks` entries."""
    return max(_splits(group, blocks * layout.block_tokens, layout.block_tokens) for group in layout.groups if group.source is None)


def _splits(group: KvGroup, tokens: int, block_tokens: int) -> int:
    far = group.far
    if far is not None:
        # As `kernels.splits.most_sparse_splits` counts them, which a process without torch cannot ask.
        blocks, budget = SPLIT_TOKENS // block_tokens, far.budget(0)
        near = ((group.window or 0) - 1 + far.refresh + block_tokens - 1) // block_tokens + 1
        before = far.sink_blocks + (max(budget, -(-budget * blocks // 4)) + 1 if budget else 0)
        whole = -(-tokens // SPLIT_TOKENS) + 1
        return max(2, min(-(-before // blocks) + (near + blocks - 2) // blocks + 1, whole))
    whole = max(-(-tokens // SPLIT_TOKENS), 1)
    return whole if group.window is None else min(whole, (group.window + SPLIT_TOKENS - 2) // SPLIT_TOKENS + 1)


def graph_bytes(spec: ModelSpec, layout: KvLayout, rows: int, context_tokens: int, element_bytes: int) -> int:
    """Bytes that recorded decode steps of up to `rows` sequences take on a GPU."""
    rows, blocks = rows_for(rows), tables_for(-(-context_tokens // layout.block_tokens))
    fixed = 4 * fixed_values(layout, Shape(rows, blocks))
    widest = max(
        max(3 * layer.mlp.hidden, (4 * layer.attention.heads + 6 * layer.attention.kv_heads) * layer.attention.head_dim)
        for layer in spec.layers
    )
    activations = rows * (4 * spec.dim + widest) * element_bytes
    splits = min(MOST_SPLITS, rows * splits_of(layout, blocks))
    parts = 4 * splits * max(layer.attention.heads * (layer.attention.head_dim + 2) for layer in spec.layers)
    choosing = step_bytes(layout, StepSize(rows, rows, blocks * layout.block_tokens), tile_tokens(spec, element_bytes))
    return fixed + activations + parts + choosing + MOST_GRAPHS * GRAPH_BYTES
