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
from service.kernels.gpu.online_softmax import LOG2_E
from service.kernels.gpu.paged_attention import REGISTERS, SPLIT_TOKENS, AttentionPlan, Tile, attention_options, capability, check_attention
from service.kernels.gpu.sparse_tiles import sparse_kernel
from service.kernels.reference_sparse import ChosenFar


def sparse_tile(dtype: torch.dtype, head_dim: int, group: int, refresh: int, block_tokens: int, chip: int) -> tuple[Tile, int]:
    """The prefill tile on sm_`chip` and how many tokens it holds: a power of two that divides `refresh` and the block.

    A tile holds rows of one anchor only, so a smaller `refresh` makes it narrower; the widest is what the compile gate finds free of
    spills. Raises ValueError for a `refresh` that is no power of two.
    """
    if refresh & (refresh - 1):
        raise ValueError(f"refresh must be a power of two, not {refresh}")
    most = 16 if dtype == torch.float32 or head_dim > 64 else 64 if chip >= 90 else 32
    tokens = min(refresh, block_tokens, 1 << max(most // group, 1).bit_length() - 1)
    rows = max(16, triton.next_power_of_2(tokens * group))
    narrow = rows == 16 and head_dim <= 64 and dtype != torch.float32
    return Tile(rows, 4, 3) if narrow else Tile(rows, 8, 2), tokens


def plan_sparse(
    query_starts: Tensor, context_lengths: Tensor, *, tokens: int, most_entries: int, block_tokens: int, device: torch.device | str
) -> AttentionPlan:
    """Count each sequence's tiles (of `tokens` rows' positions) and splits. The lengths are CPU tensors, so that nothing waits.

    `most_entries` bounds the blocks that one row reads: every decoding row gets as many splits as they fill, so that the number of work
    items depends on the number of rows alone.
    """
    contexts, counts = context_lengths.to(torch.int64), query_starts[1:].to(torch.int64) - query_starts[:-1]
    shift = (contexts - counts).clamp_(min=0)
    runs = torch.where(contexts > shift, (contexts - 1).clamp_(min=0) // tokens - shift // tokens + 1, 0)
    splits = max(2, -(-most_entries // (SPLIT_TOKENS // block_tokens)))
    totals = torch.stack((torch.where(counts > 1, runs, 0).cumsum(0), torch.where(counts == 1, splits, 0).cumsum(0)))
    ends = totals.to(torch.int32).to(device, non_blocking=True)
    return AttentionPlan(ends[0], ends[1], int(totals[0, -1]), int(totals[1, -1]))


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
    heads, kv_heads, block_tokens = query.shape[1], key_blocks.shape[1], key_blocks.shape[2]
    size = max(query.shape[2], value_blocks.shape[3])
    shared = (heads // kv_heads, refresh, block_tokens)
    tile, tokens = sparse_tile(query.dtype, size, *shared, capability(query.device))
    if plan is None:
        most = far.choices.shape[2] if far is not None else 0
        plan = plan_sparse(
            query_starts.cpu(),
            context_lengths.cpu(),
            tokens=tokens,
            most_entries=most_entries(window, refresh, block_tokens, sink_blocks, most),
            block_tokens=block_tokens,
            device=query.device,
        )
    shape = (query.shape[0], heads, value_blocks.shape[3])
    out = query.new_zeros(shape) if plan.tiles else query.new_empty(shape)
    sequences = context_lengths.shape[0]
    numbers = (sequences, scale * LOG2_E, 1.0) if softcap is None else (sequences, scale / softcap, softcap * LOG2_E)
    options = attention_options(query, key_blocks, value_blocks, sequences, (None, softcap, sink_logits))
    options |= {"WINDOW": window, "REFRESH": refresh, "SINK_BLOCKS": sink_blocks}
    strides = (*query.stride()[:2], *out.stride()[:2], near_tables.stride(0), *key_blocks.stride()[:3], *value_blocks.stride()[:3])
    far_tensors, far_strides, far_options = _far_arguments(far, key_blocks, near_tables)
    tensors = (query, key_blocks, value_blocks, out, near_tables, query_starts, context_lengths)

    def launch(items: int, ends: Tensor, parts: tuple[Tensor | None, ...], shape: Tile, width: int, split: bool) -> None:
        sparse_kernel[(items, kv_heads)](
            *tensors, ends, sink_logits, *parts, *far_tensors, *numbers, *strides, *far_strides,
            ROWS=shape.rows, TOKENS=width, SPLIT=split,
            num_warps=shape.warps, num_stages=shape.stages, maxnreg=REGISTERS, **options, **far_options,
        )  # fmt: skip

    if plan.tiles:
        launch(plan.tiles, plan.tile_ends, (None, None, None), tile, tokens, False)
    if plan.splits:
        row = sparse_tile(query.dtype, size, heads // kv_heads, 1, block_tokens, capability(query.device))[0]
        peaks, sums = query.new_empty((2, plan.splits, heads), dtype=torch.float32)
        parts = query.new_empty((plan.splits, heads, shape[2]), dtype=torch.float32)
        launch(plan.splits, plan.split_ends, (peaks, sums, parts), row, 1, True)
        reduce_kernel[(sequences, heads)](
            out, query_starts, plan.split_ends, sink_logits, peaks, sums, parts, *out.stride()[:2],
            VALUE_DIM=options["VALUE_DIM"], BLOCK_VALUE=options["BLOCK_VALUE"], SINKS=options["SINKS"], num_warps=1, num_stages=3,
        )  # fmt: skip
    return out


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
