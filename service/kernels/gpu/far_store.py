"""The far store on a GPU: near blocks quantised into far ones with bounds of their keys, and the choice of far blocks by these bounds.

Arithmetic is that of `reference_sparse`, operation for operation: divisions and roundings are the IEEE ones, so both write the same bytes.
It does not know sequences. Invariant: a choice depends on the anchor's query and its candidates' bounds alone; ties go to the lower index.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from service.kernels.reference_sparse import FIRST_STAGE, FarBlocks

# Candidates that one program of the first stage scores.
SCORED_BLOCKS = 32


@triton.jit
def round_half_even(b_x):
    """Round float32 values below 2^22 to whole numbers, ties to even: the sum with 1.5 · 2^23 has no room for a fraction."""
    return (b_x + 12582912.0) - 12582912.0


@triton.jit
def quantise_rows(b_x, LEVELS: tl.constexpr):
    """(units [B, D] float32, scales [B] float16) of rows b_x [B, D] float32: `reference_sparse.quantise`."""
    b_scales = tl.math.div_rn(tl.max(tl.abs(b_x), 1, return_indices=False), LEVELS * 1.0).to(tl.float16)
    b_units = b_scales.to(tl.float32)
    m_usable = (b_units > 0) & (b_units < float("inf"))
    b_ratio = tl.math.div_rn(b_x, tl.where(m_usable, b_units, 1.0)[:, None])
    b_ratio = tl.where(m_usable[:, None], b_ratio, 0.0)
    return tl.minimum(tl.maximum(round_half_even(b_ratio), -LEVELS), LEVELS), b_scales


@triton.jit
def store_rows(p_stored, b_units, o_tokens, stride_token, DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, NIBBLES: tl.constexpr):
    """Store whole units [B, BLOCK_DIM] as int8, or two a byte with the even index in the low nibble."""
    if NIBBLES:
        b_low, b_high = tl.split(tl.reshape(b_units.to(tl.int8), [o_tokens.shape[0], BLOCK_DIM // 2, 2]))
        b_packed = (b_low & 15).to(tl.uint8) | ((b_high & 15).to(tl.uint8) << 4)
        o_dim = tl.arange(0, BLOCK_DIM // 2)
        tl.store(p_stored + o_tokens[:, None] * stride_token + o_dim[None, :], b_packed, mask=(o_dim < DIM // 2)[None, :])
    else:
        o_dim = tl.arange(0, BLOCK_DIM)
        tl.store(p_stored + o_tokens[:, None] * stride_token + o_dim[None, :], b_units.to(tl.int8), mask=(o_dim < DIM)[None, :])


@triton.jit
def whole_units(b_x, b_unit, m_usable):
    """The least whole number of units that is not below b_x, even where the quotient was rounded down."""
    b_count = tl.ceil(tl.math.div_rn(b_x, tl.zeros_like(b_x) + tl.where(m_usable, b_unit, 1.0)))
    b_count = tl.where(b_count * b_unit < b_x, b_count + 1.0, b_count)
    return tl.where(m_usable, b_count, 0.0).to(tl.int8)


@triton.jit
def store_bounds(p_bounds, b_high, b_low, b_unit, m_usable, o_parts, m_parts, DIM: tl.constexpr, BLOCK_DIM: tl.constexpr):
    """Store the bounds of parts o_parts [P] of a block, highest and lowest keys [P, BLOCK_DIM], as int8 [part, 2, DIM]."""
    o_dim = tl.arange(0, BLOCK_DIM)
    o_at = o_parts[:, None] * (2 * DIM) + o_dim[None, :]
    m_at = m_parts[:, None] & (o_dim < DIM)[None, :]
    tl.store(p_bounds + o_at, whole_units(b_high, b_unit, m_usable), mask=m_at)
    tl.store(p_bounds + o_at + DIM, -whole_units(-b_low, b_unit, m_usable), mask=m_at)


@triton.jit
def demote_kernel(
    p_keys, p_values, p_far_keys, p_far_values, p_key_scales, p_value_scales, p_bounds, p_bound_scales, p_near_ids, p_far_ids,
    stride_key_block, stride_key_head, stride_key_token, stride_value_block, stride_value_head, stride_value_token,
    stride_far_key_block, stride_far_key_head, stride_far_key_token, stride_far_value_block, stride_far_value_head, stride_far_value_token,
    stride_scale_block, stride_scale_head, stride_bound_block, stride_bound_head, stride_bound_scale,
    KEY_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_KEY: tl.constexpr, BLOCK_VALUE: tl.constexpr, BLOCK_TOKENS: tl.constexpr,
    SUBS: tl.constexpr, LEVELS: tl.constexpr,
):  # fmt: skip
    """One program owns one block and K/V head: keys and values [B, D] in registers; LEVELS 127, 7, or 0 for a store of the near type."""
    i_near, i_far = tl.load(p_near_ids + tl.program_id(0)).to(tl.int64), tl.load(p_far_ids + tl.program_id(0)).to(tl.int64)
    i_head = tl.program_id(1).to(tl.int64)
    o_tokens, o_key, o_value = tl.arange(0, BLOCK_TOKENS), tl.arange(0, BLOCK_KEY), tl.arange(0, BLOCK_VALUE)
    m_key, m_value = (o_key < KEY_DIM)[None, :], (o_value < VALUE_DIM)[None, :]
    p_key = p_keys + i_near * stride_key_block + i_head * stride_key_head
    p_value = p_values + i_near * stride_value_block + i_head * stride_value_head
    p_far_key = p_far_keys + i_far * stride_far_key_block + i_head * stride_far_key_head
    p_far_value = p_far_values + i_far * stride_far_value_block + i_head * stride_far_value_head
    b_keys = tl.load(p_key + o_tokens[:, None] * stride_key_token + o_key[None, :], mask=m_key, other=0.0).to(tl.float32)
    b_values = tl.load(p_value + o_tokens[:, None] * stride_value_token + o_value[None, :], mask=m_value, other=0.0).to(tl.float32)
    if LEVELS > 0:
        o_scale = i_far * stride_scale_block + i_head * stride_scale_head + o_tokens
        b_units, b_scales = quantise_rows(b_keys, LEVELS)
        store_rows(p_far_key, b_units, o_tokens, stride_far_key_token, KEY_DIM, BLOCK_KEY, LEVELS == 7)
        tl.store(p_key_scales + o_scale, b_scales)
        b_keys = b_units * b_scales.to(tl.float32)[:, None]
        b_units, b_scales = quantise_rows(b_values, LEVELS)
        store_rows(p_far_value, b_units, o_tokens, stride_far_value_token, VALUE_DIM, BLOCK_VALUE, LEVELS == 7)
        tl.store(p_value_scales + o_scale, b_scales)
    else:
        tl.store(p_far_key + o_tokens[:, None] * stride_far_key_token + o_key[None, :], b_keys, mask=m_key)
        tl.store(p_far_value + o_tokens[:, None] * stride_far_value_token + o_value[None, :], b_values, mask=m_value)
    largest = tl.max(tl.abs(b_keys))
    b_scale = tl.math.div_rn(tl.zeros([1], tl.float32) + largest, 127.0).to(tl.float16)  # [1]
    b_above = (b_scale.to(tl.int16, bitcast=True) + 1).to(tl.float16, bitcast=True)
    b_scale = tl.where(b_scale.to(tl.float32) * 127.0 < largest, b_above, b_scale)
    tl.store(p_bound_scales + i_far * stride_bound_scale + i_head + tl.arange(0, 1), b_scale)
    b_unit = b_scale.to(tl.float32)[:, None]
    m_usable = (b_unit > 0) & (b_unit < float("inf"))
    p_bound = p_bounds + i_far * stride_bound_block + i_head * stride_bound_head
    b_parts = tl.reshape(b_keys, [SUBS, BLOCK_TOKENS // SUBS, BLOCK_KEY])
    o_subs, o_whole = 1 + tl.arange(0, SUBS), tl.arange(0, 1)
    store_bounds(p_bound, tl.max(b_parts, 1), tl.min(b_parts, 1), b_unit, m_usable, o_subs, o_subs > 0, KEY_DIM, BLOCK_KEY)
    b_high, b_low = tl.max(b_keys, 0)[None, :], tl.min(b_keys, 0)[None, :]
    store_bounds(p_bound, b_high, b_low, b_unit, m_usable, o_whole, o_whole == 0, KEY_DIM, BLOCK_KEY)


def demote(key_blocks: Tensor, value_blocks: Tensor, far: FarBlocks, near_ids: Tensor, far_ids: Tensor) -> None:
    """Write full near blocks near_ids [n] into the far blocks far_ids [n]: see `reference_sparse.demote`.

    All tensors on one device, ids integers, bounds contiguous within a head. Reads each block once; at D = Dv = 64 and 8 bits it writes 142
    bytes a token and K/V head. Raises ValueError for another layout.
    """
    if far.bounds[0, 0].is_contiguous() is False or far.bound_scales.stride(1) != 1 or key_blocks.stride(3) != 1 or far.keys.stride(3) != 1:
        raise ValueError("bounds, keys and values of both stores must be contiguous within a head")
    count, kv_heads, tokens, size = near_ids.shape[0], *key_blocks.shape[1:]
    value_size = value_blocks.shape[3]
    levels = 0 if far.key_scales is None else 7 if far.keys.dtype == torch.uint8 else 127
    scales = (far.key_scales, far.value_scales) if levels else (far.keys, far.values)
    scale_strides = far.key_scales.stride()[:2] if far.key_scales is not None else (0, 0)
    if count:
        demote_kernel[(count, kv_heads)](
            key_blocks, value_blocks, far.keys, far.values, *scales, far.bounds, far.bound_scales, near_ids, far_ids,
            *key_blocks.stride()[:3], *value_blocks.stride()[:3], *far.keys.stride()[:3], *far.values.stride()[:3],
            *scale_strides, *far.bounds.stride()[:2], far.bound_scales.stride(0),
            KEY_DIM=size, VALUE_DIM=value_size, BLOCK_KEY=triton.next_power_of_2(size), BLOCK_VALUE=triton.next_power_of_2(value_size),
            BLOCK_TOKENS=tokens, SUBS=far.bounds.shape[2] - 1, LEVELS=levels, num_warps=8,
        )  # fmt: skip


@triton.jit
def score_part(
    p_query, stride_head, p_bounds, p_scales, i_blocks, m_blocks, i_part, GROUP: tl.constexpr, DIM: tl.constexpr, BLOCK_DIM: tl.constexpr
):  # fmt: skip
    """Scores [C] float32 of part i_part of the blocks whose bounds begin at p_bounds + i_blocks [C] and whose scales are p_scales [C], for
    the GROUP heads at p_query that share a K/V head: the highest of theirs."""
    o_dim = tl.arange(0, BLOCK_DIM)
    o_at = i_blocks[:, None] + i_part * (2 * DIM) + o_dim[None, :]
    m_at = m_blocks[:, None] & (o_dim < DIM)[None, :]
    b_high = tl.load(p_bounds + o_at, mask=m_at, other=0).to(tl.float32)
    b_low = tl.load(p_bounds + o_at + DIM, mask=m_at, other=0).to(tl.float32)
    b_total = tl.full([i_blocks.shape[0]], float("-inf"), tl.float32)
    for i_group in tl.static_range(GROUP):
        b_query = tl.load(p_query + i_group * stride_head + o_dim, mask=o_dim < DIM, other=0.0).to(tl.float32)
        b_product = b_high * tl.maximum(b_query, 0.0)[None, :] + b_low * tl.minimum(b_query, 0.0)[None, :]
        b_total = tl.maximum(b_total, tl.sum(b_product, 1))
    return b_total * tl.load(p_scales, mask=m_blocks, other=0.0).to(tl.float32)


@triton.jit
def score_kernel(
    p_query, p_bounds, p_bound_scales, p_tables, p_sequences, p_ends, p_scores, width,
    stride_query_anchor, stride_query_head, stride_bound_block, stride_bound_head, stride_bound_scale, stride_table,
    GROUP: tl.constexpr, DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, SINK_BLOCKS: tl.constexpr, CANDIDATES: tl.constexpr,
):  # fmt: skip
    """One program owns CANDIDATES candidates of one anchor and K/V head: it stores their blocks' scores in p_scores [A, Hkv, width]."""
    i_anchor, i_head = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    o_candidate = tl.program_id(2) * CANDIDATES + tl.arange(0, CANDIDATES)
    end = tl.load(p_ends + i_anchor)
    if SINK_BLOCKS + tl.program_id(2) * CANDIDATES < end:
        m_candidate = SINK_BLOCKS + o_candidate < end
        p_heads = p_query + i_anchor * stride_query_anchor + i_head * GROUP * stride_query_head
        p_table = p_tables + tl.load(p_sequences + i_anchor).to(tl.int64) * stride_table
        i_blocks = tl.load(p_table + SINK_BLOCKS + o_candidate, mask=m_candidate, other=0).to(tl.int64)
        o_bounds = i_blocks * stride_bound_block + i_head * stride_bound_head
        p_scales = p_bound_scales + i_blocks * stride_bound_scale + i_head
        b_scores = score_part(p_heads, stride_query_head, p_bounds, p_scales, o_bounds, m_candidate, 0, GROUP, DIM, BLOCK_DIM)
        tl.store(p_scores + (i_anchor * tl.num_programs(1) + i_head) * width + o_candidate, b_scores, mask=m_candidate)


@triton.jit
def best_of(b_scores, m_valid, count):
    """The mask of the `count` best of b_scores [C] float32 (all valid ones if there are no more); ties go to the lower index.

    Floats are mapped to unsigned integers of the same order; the count-th best is found bit by bit, then what is above it is taken and of
    what equals it the first ones: 32 counts instead of a sort.
    """
    b_bits = b_scores.to(tl.int32, bitcast=True)
    b_keys = tl.where(b_bits < 0, -b_bits.to(tl.int64) - 2147483648, b_bits.to(tl.int64)) + 2147483648
    b_keys = tl.where(m_valid, b_keys, -1)
    threshold = tl.zeros([1], tl.int64)
    for i_bit in range(32):
        b_trial = threshold | (tl.full([1], 2147483648, tl.int64) >> i_bit)
        threshold = tl.where(tl.sum((b_keys >= b_trial).to(tl.int32)) >= count, b_trial, threshold)
    m_above = b_keys > threshold
    m_equal = m_valid & (b_keys == threshold)
    b_rank = tl.cumsum(m_equal.to(tl.int32), 0)
    return m_above | (m_equal & (b_rank <= count - tl.sum(m_above.to(tl.int32))))


@triton.jit
def select_kernel(
    p_query, p_bounds, p_bound_scales, p_tables, p_sequences, p_ends, p_budgets, p_scores, p_kept, p_choices, p_counts, width, most,
    stride_query_anchor, stride_query_head, stride_bound_block, stride_bound_head, stride_bound_scale, stride_table,
    GROUP: tl.constexpr, DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, SINK_BLOCKS: tl.constexpr, SUBS: tl.constexpr,
    FIRST: tl.constexpr, CANDIDATES: tl.constexpr, KEPT: tl.constexpr, MOST: tl.constexpr,
):  # fmt: skip
    """One program owns one anchor and K/V head: the best FIRST · budget candidates by their block, of these the best by a sub-block.

    Scores [CANDIDATES] stay in registers; the indices that the first stage keeps pass through p_kept [A, Hkv, KEPT] in ascending order.
    """
    i_anchor, i_head = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    i_pair = i_anchor * tl.num_programs(1) + i_head
    budget = tl.load(p_budgets + i_anchor)
    candidates = tl.maximum(tl.load(p_ends + i_anchor) - SINK_BLOCKS, 0)
    o_candidate, o_kept, o_most = tl.arange(0, CANDIDATES), tl.arange(0, KEPT), tl.arange(0, MOST)
    m_candidate = o_candidate < candidates
    b_scores = tl.load(p_scores + i_pair * width + o_candidate, mask=m_candidate, other=0.0)
    m_best = best_of(b_scores, m_candidate, tl.minimum(FIRST * budget, candidates))
    b_place = tl.cumsum(m_best.to(tl.int32), 0) - 1
    tl.store(p_kept + i_pair * KEPT + b_place, SINK_BLOCKS + o_candidate, mask=m_best)
    tl.debug_barrier()
    m_kept = o_kept < tl.minimum(FIRST * budget, candidates)
    b_index = tl.load(p_kept + i_pair * KEPT + o_kept, mask=m_kept, other=0)
    p_heads = p_query + i_anchor * stride_query_anchor + i_head * GROUP * stride_query_head
    p_table = p_tables + tl.load(p_sequences + i_anchor).to(tl.int64) * stride_table
    i_blocks = tl.load(p_table + b_index, mask=m_kept, other=0).to(tl.int64)
    o_bounds = i_blocks * stride_bound_block + i_head * stride_bound_head
    p_scales = p_bound_scales + i_blocks * stride_bound_scale + i_head
    b_best = tl.full([KEPT], float("-inf"), tl.float32)
    for i_part in range(1, SUBS + 1):
        b_part = score_part(p_heads, stride_query_head, p_bounds, p_scales, o_bounds, m_kept, i_part, GROUP, DIM, BLOCK_DIM)
        b_best = tl.maximum(b_best, b_part)
    count = tl.minimum(budget, candidates)
    m_chosen = best_of(b_best, m_kept, count)
    p_choice = p_choices + i_pair * most
    tl.store(p_choice + o_most, tl.full([MOST], -1, tl.int32), mask=(o_most >= count) & (o_most < most))
    tl.store(p_choice + tl.cumsum(m_chosen.to(tl.int32), 0) - 1, b_index, mask=m_chosen)
    tl.store(p_counts + i_anchor, count, mask=i_head == 0)


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
    """Choose far blocks for anchor queries [A, Hq, D]: see `reference_sparse.choose_far`; choices int32 [A, Hkv, most], counts int32 [A].

    Reads 2 · D bytes a candidate and K/V head, and (sub-blocks) · 2 · D bytes for each of the best FIRST_STAGE · budget.
    """
    anchors, heads, size = query.shape
    kv_heads, width = far.bounds.shape[1], max(far_tables.shape[1] - sink_blocks, 1)
    choices = torch.empty((anchors, kv_heads, most), dtype=torch.int32, device=query.device)
    counts = torch.empty(anchors, dtype=torch.int32, device=query.device)
    if not anchors:
        return choices, counts
    query = query if query.stride(2) == 1 else query.contiguous()
    scores = torch.empty((anchors, kv_heads, width), dtype=torch.float32, device=query.device)
    kept = triton.next_power_of_2(max(FIRST_STAGE * most, 2))
    indices = torch.empty((anchors, kv_heads, kept), dtype=torch.int32, device=query.device)
    strides = (*query.stride()[:2], *far.bounds.stride()[:2], far.bound_scales.stride(0), far_tables.stride(0))
    tensors = (query, far.bounds, far.bound_scales, far_tables, sequences, candidate_ends)
    options = {"GROUP": heads // kv_heads, "DIM": size, "BLOCK_DIM": triton.next_power_of_2(size), "SINK_BLOCKS": sink_blocks}
    score_kernel[(anchors, kv_heads, triton.cdiv(width, SCORED_BLOCKS))](
        *tensors, scores, width, *strides, CANDIDATES=SCORED_BLOCKS, num_warps=4, **options
    )
    candidates = max(triton.next_power_of_2(width), 2)
    select_kernel[(anchors, kv_heads)](
        *tensors, budgets, scores, indices, choices, counts, width, most, *strides,
        SUBS=far.bounds.shape[2] - 1, FIRST=FIRST_STAGE, CANDIDATES=candidates, KEPT=kept, MOST=max(triton.next_power_of_2(most), 2),
        num_warps=4 if candidates <= 2048 else 8, **options,
    )  # fmt: skip
    return choices, counts
