"""Attention over two stores on a GPU: which rows go where, the launches, and what they move.

Sequences with one query row are decoded in splits of their compacted list, all others in tiles of rows that visit what any of them reads;
both sum in one order (see `online_softmax`). It does not know how far blocks were chosen. Invariant: with a plan no call waits for the
device.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from service.kernels.gpu.dense_rows import reduce_kernel
from service.kernels.gpu.paged_attention import (
    REGISTERS,
    AttentionPlan,
    Tile,
    Work,
    attention_options,
    capability,
    check_attention,
    score_factors,
    tile_of,
)
from service.kernels.gpu.sparse_rows import sparse_row_kernel
from service.kernels.gpu.sparse_tiles import sparse_tile_kernel
from service.kernels.gpu.tile_visits import MOST_TOKENS, find_visits
from service.kernels.reference_sparse import ChosenFar
from service.kernels.splits import most_sparse_splits


def sparse_tile(dtype: torch.dtype, head_dim: int, group: int, chip: int, far: bool) -> tuple[Tile, int]:
    """The tile of prompts on sm_`chip` and how many tokens it holds, a power of two: the widest that the compile gate finds free of spills,
    in float32 of few; that of dense attention for steps in which no row reads anything `far`, such as prompts within their window."""
    if head_dim <= 128 and dtype != torch.float32 and not far:
        tile = tile_of(dtype, head_dim, chip)
        if group <= tile.rows:
            return tile, _power_below(tile.rows // group)
    if dtype == torch.float32:
        rows = max(16 if head_dim <= 64 else 8, triton.next_power_of_2(group))
        return Tile(rows, 8, 1), min(MOST_TOKENS, _power_below(rows // group))
    if chip >= 90:
        most, stages = (64, 2) if head_dim > 128 else (128, 3)
    else:
        most, stages = (16, 1) if head_dim > 128 else (32 if head_dim <= 64 else 64, 3)
    tokens = min(MOST_TOKENS, _power_below(max(most // group, 1)))
    rows = max(16, triton.next_power_of_2(tokens * group))
    # Warp groups take 64 rows each: two of them would compute the scores of 64 twice.
    return Tile(rows, 4 if rows == 64 and head_dim <= 64 else 8, stages), tokens


def _power_below(number: int) -> int:
    """The largest power of two that is at most `number`."""
    return 1 << number.bit_length() - 1


def sparse_row(dtype: torch.dtype, head_dim: int, group: int) -> Tile:
    """The tile of one decoding row's query heads. Four warps where their registers suffice: two programs then fit a multiprocessor, and one
    computes while the other waits."""
    rows = max(16, triton.next_power_of_2(group))
    if dtype == torch.float32 or head_dim > 128:
        return Tile(rows, 8, 1 if head_dim > 128 else 2)
    return Tile(rows, 4 if rows == 16 or (rows == 64 and head_dim <= 64) else 8, 3)


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
    in registers, its scales applied to scores and weights. What a row reads does not grow with its context: at D = Dv = 64 and one K/V head
    256 bytes a near and 132 a far token. Raises ValueError for other types, sizes or strides.
    """
    check_attention(query, key_blocks, value_blocks, near_tables)
    heads, (kv_heads, block_tokens) = query.shape[1], key_blocks.shape[1:3]
    size = max(query.shape[2], value_blocks.shape[3])
    tile, tokens = sparse_tile(query.dtype, size, heads // kv_heads, capability(query.device), far is not None)
    if far is not None:
        tokens = min(tokens, block_tokens)  # All of one block, see `far_span`.
    if plan is None:
        plan = AttentionPlan(query_starts, context_lengths, query.device, window)
    budget = None if far is None else far.budget
    if block_tokens % refresh or budget == 0:
        raise ValueError(
            f"refresh {refresh} must divide the block of {block_tokens} tokens, and a budget of far blocks be positive, not {budget}"
        )
    splits = most_sparse_splits(window, refresh, block_tokens, sink_blocks, budget, near_tables.shape[1])
    work = plan.sparse(tokens, splits)
    shape = (query.shape[0], heads, value_blocks.shape[3])
    decoded = work.splits == splits * len(query)  # Every row; else some may see nothing and be written by nobody.
    out = query.new_empty(shape) if decoded else query.new_zeros(shape)
    options = attention_options(query, key_blocks, value_blocks, context_lengths.shape[0], (None, softcap, sink_logits))
    options |= {"WINDOW": window, "REFRESH": refresh, "SINK_BLOCKS": sink_blocks, "maxnreg": REGISTERS}
    call = _Call((query, key_blocks, value_blocks, out, near_tables), (query_starts, context_lengths), work, far, sink_logits)
    numbers = (context_lengths.shape[0], *score_factors(scale, softcap))
    if work.tiles:
        _launch_tiles(call, tile, tokens, numbers, options)
    if work.splits:
        _launch_rows(call, sparse_row(query.dtype, size, heads // kv_heads), numbers, options)
    return out


class _Call(NamedTuple):
    """What both launches read and write: tensors are query, keys, values, out, tables; lengths the starts of queries and the contexts."""

    tensors: tuple[Tensor, ...]
    lengths: tuple[Tensor, Tensor]
    work: Work
    far: ChosenFar | None
    sinks: Tensor | None


def _launch_tiles(call: _Call, tile: Tile, tokens: int, numbers: tuple[int, float, float], options: dict[str, Any]) -> None:
    """One launch over all tiles, after their visits have been found."""
    query, keys, values, out, tables = call.tensors
    lengths = (*call.lengths, call.work.tile_ends)
    stores, far_strides, far_options = _far_arguments(call.far, keys, tables)
    visits: tuple[Tensor, ...] = (tables,) * 4
    if call.far is not None:
        visits = (call.far.tables, *find_visits(lengths, call.work.tiles, tokens, call.far))
    strides = (*query.stride()[:2], *out.stride()[:2], tables.stride(0), *keys.stride()[:3], *values.stride()[:3])
    sparse_tile_kernel[(call.work.tiles, keys.shape[1])](
        *call.tensors, *lengths, call.sinks, *stores, *visits, *numbers, visits[1].shape[-1], *strides, *far_strides, visits[0].stride(0),
        ROWS=tile.rows, TOKENS=tokens, num_warps=tile.warps, num_stages=tile.stages, **options, **far_options,
    )  # fmt: skip


def _launch_rows(call: _Call, tile: Tile, numbers: tuple[int, float, float], options: dict[str, Any]) -> None:
    """One launch over the splits of all decoding rows, and one that joins them."""
    query, keys, values, out, tables = call.tensors
    heads, splits, split_ends = query.shape[1], call.work.splits, call.work.split_ends
    peaks, sums = query.new_empty((2, splits, heads), dtype=torch.float32)
    parts = query.new_empty((splits, heads, out.shape[2]), dtype=torch.float32)
    stores, far_strides, far_options = _far_arguments(call.far, keys, tables)
    far = call.far
    chosen = (tables,) * 4 if far is None else (far.counts, far.anchors, far.tables, far.choices)
    choice_strides = (0, 0) if far is None else far.choices.stride()[:2]
    strides = (*query.stride()[:2], tables.stride(0), *keys.stride()[:3], *values.stride()[:3])
    sparse_row_kernel[(splits, keys.shape[1])](
        query, keys, values, tables, *call.lengths, split_ends, peaks, sums, parts, *stores, *chosen, *numbers,
        *strides, *far_strides, chosen[2].stride(0), *choice_strides,
        ROWS=tile.rows, num_warps=tile.warps, num_stages=tile.stages, **{name: options[name] for name in options if name != "SINKS"},
        **far_options,
    )  # fmt: skip
    reduce_kernel[(numbers[0], heads)](
        out, call.lengths[0], split_ends, call.sinks, peaks, sums, parts, *out.stride()[:2],
        VALUE_DIM=options["VALUE_DIM"], BLOCK_VALUE=options["BLOCK_VALUE"], SINKS=options["SINKS"], num_warps=1, num_stages=3,
    )  # fmt: skip


def _far_arguments(far: ChosenFar | None, keys: Tensor, tables: Tensor) -> tuple[tuple[Tensor, ...], tuple[int, ...], dict[str, Any]]:
    """Tensors, strides and constants of the far store; where there is none or it has no scales, tensors that are never read."""
    options: dict[str, Any] = {"HAS_FAR": far is not None, "BUDGET": 0 if far is None else far.budget, "QUANTISED": False, "NIBBLES": False}
    if far is None:
        return (keys,) * 4, (0,) * 8, options
    store = far.blocks
    key_scales, value_scales = store.key_scales, store.value_scales
    scales = (store.keys, store.values) if key_scales is None or value_scales is None else (key_scales, value_scales)
    options |= {"QUANTISED": key_scales is not None, "NIBBLES": store.keys.dtype == torch.uint8}
    scale_strides = store.key_scales.stride()[:2] if store.key_scales is not None else (0, 0)
    return (store.keys, store.values, *scales), (*store.keys.stride()[:3], *store.values.stride()[:3], *scale_strides), options
