"""Window + far attention by the compiled kernels: the choice of far blocks, and attention over both stores in one walk.

The signatures are those of `reference_sparse.py`. A row's list of blocks (sinks, chosen, window) is cut into splits as a dense context is:
where nothing is far the bits are those of `attention.paged_attention`. It does not know layers or who owns a block. Invariant: what a
row gets depends on its position and its choice alone, never on the batch, the slice it is computed in or the number of threads.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from service.kernels.native.attention import compute, prepare
from service.kernels.native.binding import ELEMENTS, STORED, functions
from service.kernels.native.far_store import FarBounds, has_plain_bounds
from service.kernels.reference_sparse import FIRST_STAGE, SECOND_STAGE, ChosenFar, FarBlocks
from service.kernels.workspace import Workspace

_WORKSPACE = Workspace()


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
    plan: object = None,
) -> Tensor:
    """See `reference_sparse.window_sparse_attention`, rounding as in `paged_attention`. Raises ValueError for what does not fit."""
    del plan
    call = prepare(query, key_blocks, value_blocks, (near_tables, query_starts, context_lengths), scale, window, softcap, sink_logits)
    if far is None or not len(far.counts):
        nothing = (0, None, None, None, None, 0, 0, None, 0, None, 0, None, None)
        compute(functions().native_window_sparse_attention, *call.arguments, refresh, sink_blocks, *nothing)
        return call.out
    blocks = far.blocks
    stores = [blocks.keys.contiguous(), blocks.values.contiguous()]
    scales = [None if scale is None else scale.contiguous() for scale in (blocks.key_scales, blocks.value_scales)]
    tables, choices, counts, anchors = (t.contiguous() for t in (far.tables, far.choices, far.counts, far.anchors))
    if any(t.dtype != torch.int32 for t in (tables, choices, counts)) or anchors.dtype != torch.int64:
        raise ValueError("far tables, choices and counts must be int32, and anchors int64")
    compute(
        functions().native_window_sparse_attention,
        *call.arguments,
        *(refresh, sink_blocks, STORED[stores[0].dtype], *(store.data_ptr() for store in stores)),
        *(None if scale is None else scale.data_ptr() for scale in scales),
        *(store.shape[3] for store in stores),
        *(tables.data_ptr(), tables.shape[1], choices.data_ptr(), choices.shape[2], counts.data_ptr(), anchors.data_ptr()),
    )
    return call.out


def choose_far(
    query: Tensor,
    far: FarBlocks,
    far_tables: Tensor,
    sequences: Tensor,
    candidate_ends: Tensor,
    budgets: Tensor,
    *,
    sink_blocks: int,
    most: int,
) -> tuple[Tensor, Tensor]:
    """See `reference_sparse.choose_far`; queries are rounded to 15 bits for bounds and keys in bytes, so near ties may fall otherwise."""
    (anchors, heads, size), kv_heads = query.shape, far.bounds.shape[1]
    query = query if query.stride(-1) == 1 else query.contiguous()
    tables = far_tables.contiguous()
    if not has_plain_bounds(far):
        far = far._replace(bounds=far.bounds.contiguous(), part_bounds=far.part_bounds.contiguous())
    keys, key_scales = far.keys.contiguous(), None if far.key_scales is None else far.key_scales.contiguous()
    block_tokens, key_size = keys.shape[2:]
    owners, ends, limits = sequences.to(torch.int64).contiguous(), *(t.to(torch.int32).contiguous() for t in (candidate_ends, budgets))
    choices = torch.empty(anchors, kv_heads, most, dtype=torch.int32)
    counts = torch.minimum((ends - sink_blocks).clamp_(min=0), limits)
    widest, threads = max(tables.shape[1], 1), torch.get_num_threads()
    each = functions().native_choose_bytes(widest, SECOND_STAGE, most, heads // kv_heads, size, block_tokens)
    workspace = _WORKSPACE.take("choosing", threads * each // 4)
    functions().native_choose_far(
        *(ELEMENTS[query.dtype], query.data_ptr(), *query.stride()[:2]),
        *(STORED[keys.dtype], keys.data_ptr(), None if key_scales is None else key_scales.data_ptr()),
        *(ctypes.byref(FarBounds.of(far)), tables.data_ptr(), tables.shape[1]),
        *(owners.data_ptr(), ends.data_ptr(), limits.data_ptr(), choices.data_ptr()),
        *(anchors, kv_heads, heads // kv_heads, size, block_tokens, key_size, sink_blocks, most),
        *(FIRST_STAGE, SECOND_STAGE, widest),
        *(workspace.data_ptr(), threads),
    )
    return choices, counts
