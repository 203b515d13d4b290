"""Attention over two stores on a GPU: which rows go where, the launches, and what they move.

Sequences with one query row are decoded in splits of their compacted list, all others in tiles of rows that share an anchor; both sum in
one order (see `online_softmax`). It does not know how far blocks were chosen. Invariant: with a plan no call waits for the device.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from service.kernels.gpu.dense_rows import reduce_kernel
from service.kernels.gpu.paged_attention import (
    REGISTERS,
    AttentionPlan,
    Tile,
    attention_options,
    capability,
    check_attention,
    score_factors,
)
from service.kernels.gpu.sparse_tiles import sparse_kernel
from service.kernels.reference_sparse import ChosenFar
from service.kernels.splits import SPLIT_TOKENS


def sparse_tile(dtype: torch.dtype, head_dim: int, group: int, refresh: int, block_tokens: int, chip: int) -> tuple[Tile, int]:
    """The prefill tile on sm_`chip` and how many tokens it holds: a power of two that divides `refresh` and the block.

    A tile holds rows of one anchor only, so a smaller `refresh` makes it narrower; the widest is what the compile gate finds free of
    spills. Raises ValueError for a `refresh` that is no power of two.
    """
    if refresh & (refresh - 1):
        raise ValueError(f"refresh must be a power of two, not {refresh}")
    small = head_dim <= 64 and dtype != torch.float32
    most = 16 if dtype == torch.float32 or head_dim > 128 else 128 if small and chip >= 90 else 32
    tokens = min(refresh, block_tokens, 1 << max(most // group, 1).bit_length() - 1)
    rows = max(16, triton.next_power_of_2(tokens * group))
    if small and rows == 16:
        return Tile(rows, 4, 3), tokens
    # Warp groups take 64 rows each: two of them would compute the scores of 64 twice.
    return Tile(rows, 4 if rows == 64 else 8, 1 if head_dim > 128 else 2), tokens


def plan_sparse(
    near_tables: Tensor,
    query_starts: Tensor,
    context_lengths: Tensor,
    *,
    far: ChosenFar | None,
    block_tokens: int,
    window: int,
    refresh: int,
    sink_blocks: int,
) -> AttentionPlan:
    """The plan of one step for layers with this window. Lengths that lie on the host are used as they are; others are waited for."""
    del far, block_tokens, refresh, sink_blocks
    return AttentionPlan(query_starts, context_lengths, near_tables.device, window)


def plan_sparse_tiles(
    near_tables: Tensor,
    query_starts: Tensor,
    context_lengths: Tensor,
    *,
    far: ChosenFar | None,
    block_tokens: int,
    window: int,
    refresh: int,
    sink_blocks: int,
) -> AttentionPlan:
    """The same with every row in tiles of one shape, see `plan_tiles`."""
    del far, block_tokens, refresh, sink_blocks
    return AttentionPlan(query_starts, context_lengths, near_tables.device, window, tiled=True)


def most_entries(window: int, refresh: int, block_tokens: int, sink_blocks: int, most: int) -> int:
    """Blocks that one row reads at most: sinks, `most` far blocks, and the window of its anchor with what follows up to the row."""
    return sink_blocks + most + (window - 1 + refresh + block_tokens - 1) // block_tokens + 1


def window_sparse_attention(
    query: Tensor,
    key_blocks: Tensor,
    value_blocks: Tensor,
    near_tables: Tensor,
    query_starts: Tensor,
    context_lengths: Tensor,
    *,
    far: ChosenFar | None,
    scale: float,
    window: int,
    refresh: int,
    sink_blocks: int,
    softcap: float | None = None,
    sink_logits: Tensor | None = None,
    plan: AttentionPlan | None = None,
) -> Tensor:
    """Causal attention of query [T, Hq, D] to sinks, chosen far blocks and the window: [T, Hq, Dv], sums in float32.

    Arguments as in `reference_sparse.window_sparse_attention`, types and strides as in `paged_attention`. A store of 8 or 4 bits is widened
    in registers, its scales applied to scores and weights. A row reads `most_entries` blocks at most, whatever its context: at D = Dv = 64
    and one K/V head 256 bytes a near and 132 a far token. Raises ValueError for other types, sizes or strides.
    """
    check_attention(query, key_blocks, value_blocks, near_tables)
    heads, (kv_heads, block_tokens) = query.shape[1], key_blocks.shape[1:3]
    size, chip = max(query.shape[2], value_blocks.shape[3]), capability(query.device)
    tile, tokens = sparse_tile(query.dtype, size, heads // kv_heads, refresh, block_tokens, chip)
    row = sparse_tile(query.dtype, size, heads // kv_heads, 1, block_tokens, chip)[0]
    if plan is None:
        plan = AttentionPlan(query_starts, context_lengths, query.device, window)
    entries = most_entries(window, refresh, block_tokens, sink_blocks, 0 if far is None else far.choices.shape[2])
    work = plan.sparse(tokens, max(2, -(-entries // (SPLIT_TOKENS // block_tokens))))
    shape = (query.shape[0], heads, value_blocks.shape[3])
    out = query.new_zeros(shape) if work.tiles else query.new_empty(shape)
    options = attention_options(query, key_blocks, value_blocks, context_lengths.shape[0], (None, softcap, sink_logits))
    scoring = (scale, softcap)
    options |= {"WINDOW": window, "REFRESH": refresh, "SINK_BLOCKS": sink_blocks, "maxnreg": REGISTERS}
    tensors = (query, key_blocks, value_blocks, out, near_tables, query_starts, context_lengths)
    if work.tiles:
        _launch(work.tiles, tensors, (work.tile_ends, sink_logits, None, None, None), far, scoring, options | _shape(tile, tokens, False))
    if work.splits:
        peaks, sums = query.new_empty((2, work.splits, heads), dtype=torch.float32)
        parts = query.new_empty((work.splits, heads, shape[2]), dtype=torch.float32)
        lists = (work.split_ends, sink_logits, peaks, sums, parts)
        _launch(work.splits, tensors, lists, far, scoring, options | _shape(row, 1, True))
        reduce_kernel[(context_lengths.shape[0], heads)](
            out, query_starts, *lists, *out.stride()[:2],
            VALUE_DIM=options["VALUE_DIM"], BLOCK_VALUE=options["BLOCK_VALUE"], SINKS=options["SINKS"], num_warps=1, num_stages=3,
        )  # fmt: skip
    return out


def _shape(tile: Tile, tokens: int, split: bool) -> dict[str, Any]:
    return {"ROWS": tile.rows, "TOKENS": tokens, "SPLIT": split, "num_warps": tile.warps, "num_stages": tile.stages}


def _launch(
    items: int,
    tensors: tuple[Tensor, ...],
    lists: tuple[Tensor | None, ...],
    far: ChosenFar | None,
    scoring: tuple[float, float | None],
    options: dict[str, Any],
) -> None:
    """One launch over all items of `lists`; tensors are query, keys, values, out, tables, starts, lengths."""
    query, keys, values, out, tables, _, lengths = tensors
    numbers = (lengths.shape[0], *score_factors(*scoring))
    strides = (*query.stride()[:2], *out.stride()[:2], tables.stride(0), *keys.stride()[:3], *values.stride()[:3])
    far_tensors, far_strides, far_options = _far_arguments(far, keys, tables)
    sparse_kernel[(items, keys.shape[1])](*tensors, *lists, *far_tensors, *numbers, *strides, *far_strides, **options, **far_options)


def _far_arguments(far: ChosenFar | None, keys: Tensor, tables: Tensor) -> tuple[tuple[Tensor, ...], tuple[int, ...], dict[str, Any]]:
    """Tensors, strides and constants of the far store; where there is none or it has no scales, tensors that are never read."""
    options: dict[str, Any] = {"HAS_FAR": far is not None, "QUANTISED": False, "NIBBLES": False}
    if far is None:
        return (keys, keys, keys, keys, tables, tables, tables, tables), (0,) * 11, options
    store = far.blocks
    key_scales, value_scales = store.key_scales, store.value_scales
    scales = (store.keys, store.values) if key_scales is None or value_scales is None else (key_scales, value_scales)
    options |= {"QUANTISED": key_scales is not None, "NIBBLES": store.keys.dtype == torch.uint8}
    strides = (
        *store.keys.stride()[:3],
        *store.values.stride()[:3],
        *(store.key_scales.stride()[:2] if store.key_scales is not None else (0, 0)),
    )
    tensors = (store.keys, store.values, *scales, far.tables, far.choices, far.counts, far.anchors)
    return tensors, (*strides, far.tables.stride(0), *far.choices.stride()[:2]), options
