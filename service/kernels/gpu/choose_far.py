"""Which far blocks queries read, on a GPU: bounds of blocks, bounds of their sub-blocks, keys, and the best by each.

It does not know sequences. Invariant: a choice depends on the anchor's query and its candidates alone; ties go to the lower index.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from service.kernels.reference_sparse import FIRST_STAGE, SECOND_STAGE, FarBlocks

# Candidates that one program of the first stage scores, and one of the second at a time.
SCORED_BLOCKS = 32


@triton.jit
def score_part(
    p_query, stride_head, p_bounds, p_scales, i_blocks, m_blocks, i_part, GROUP: tl.constexpr, DIM: tl.constexpr, BLOCK_DIM: tl.constexpr
):  # fmt: skip
    """Scores [C] float32 of part i_part of the blocks whose bounds [parts, 2, DIM] begin at p_bounds + i_blocks [C] and whose scales are
    p_scales [C], for the GROUP heads at p_query that share a K/V head: the highest of theirs."""
    o_dim = tl.arange(0, BLOCK_DIM)
    o_at = i_blocks[:, None] + i_part * (2 * DIM) + o_dim[None, :]
    m_at = m_blocks[:, None] & (o_dim < DIM)[None, :]
    b_high = tl.load(p_bounds + o_at, mask=m_at, other=0).to(tl.float32)
    b_low = tl.load(p_bounds + o_at + DIM, mask=m_at, other=0).to(tl.float32)
    b_total = tl.full([i_blocks.shape[0]], float("-inf"), tl.float32)
    for i_group in tl.range(0, GROUP, num_stages=1):
        b_query = tl.load(p_query + i_group * stride_head + o_dim, mask=o_dim < DIM, other=0.0).to(tl.float32)
        b_product = b_high * tl.maximum(b_query, 0.0)[None, :] + b_low * tl.minimum(b_query, 0.0)[None, :]
        b_total = tl.maximum(b_total, tl.sum(b_product, 1))
    return b_total * tl.load(p_scales, mask=m_blocks, other=0.0).to(tl.float32)


@triton.jit
def score_kernel(
    p_query, p_bounds, p_bound_scales, p_tables, p_sequences, p_ends, p_scores, width,
    stride_query_anchor, stride_query_head, stride_bound_block, stride_bound_head,
    stride_bound_scale_block, stride_bound_scale_head, stride_table,
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
        p_scales = p_bound_scales + i_blocks * stride_bound_scale_block + i_head * stride_bound_scale_head
        b_scores = score_part(p_heads, stride_query_head, p_bounds, p_scales, o_bounds, m_candidate, 0, GROUP, DIM, BLOCK_DIM)
        tl.store(p_scores + (i_anchor * tl.num_programs(1) + i_head) * width + o_candidate, b_scores, mask=m_candidate)


@triton.jit
def best_of(b_scores, m_valid, count):
    """The mask of the `count` best of b_scores [C] float32 (all valid ones if there are no more); ties go to the lower index.

    Floats are mapped to unsigned integers of the same order; the count-th best is found bit by bit, then what is above it is taken and of
    what equals it the first ones: 32 counts instead of a sort.
    """
    b_bits = (b_scores + 0.0).to(tl.int32, bitcast=True)
    b_keys = tl.where(b_bits < 0, ~b_bits, b_bits | -2147483648).to(tl.uint32, bitcast=True)
    b_keys = tl.where(m_valid, b_keys, 0)
    threshold = tl.zeros([1], tl.uint32)
    for i_bit in range(32):
        b_trial = threshold | (tl.full([1], 2147483648, tl.uint32) >> i_bit)
        threshold = tl.where(tl.sum((b_keys >= b_trial).to(tl.int32)) >= count, b_trial, threshold)
    m_above = b_keys > threshold
    m_equal = m_valid & (b_keys == threshold)
    b_rank = tl.cumsum(m_equal.to(tl.int32), 0)
    return m_above | (m_equal & (b_rank <= count - tl.sum(m_above.to(tl.int32))))


@triton.jit
def select_kernel(
    p_query, p_part_bounds, p_bound_scales, p_tables, p_sequences, p_ends, p_budgets, p_scores, p_kept, p_choices, width, most,
    stride_query_anchor, stride_query_head, stride_part_block, stride_part_head,
    stride_bound_scale_block, stride_bound_scale_head, stride_table,
    GROUP: tl.constexpr, DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, SINK_BLOCKS: tl.constexpr, SUBS: tl.constexpr,
    FIRST: tl.constexpr, SECOND: tl.constexpr, CANDIDATES: tl.constexpr, KEPT: tl.constexpr, SCORED: tl.constexpr,
):  # fmt: skip
    """One program owns one anchor and K/V head: the best FIRST · budget candidates by their block, of these the best SECOND · budget by a
    sub-block, in p_choices [A, Hkv, most] in ascending order.

    The indices that the first stage keeps pass through p_kept [A, Hkv, KEPT] in ascending order, their scores, SCORED at a time, through
    p_scores, which is read before.
    """
    i_anchor, i_head = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    i_pair = i_anchor * tl.num_programs(1) + i_head
    budget = tl.load(p_budgets + i_anchor)
    candidates = tl.maximum(tl.load(p_ends + i_anchor) - SINK_BLOCKS, 0)
    o_candidate, o_kept = tl.arange(0, CANDIDATES), tl.arange(0, KEPT)
    m_candidate = o_candidate < candidates
    b_scores = tl.load(p_scores + i_pair * width + o_candidate, mask=m_candidate, other=0.0)
    m_best = best_of(b_scores, m_candidate, tl.minimum(FIRST * budget, candidates))
    b_place = tl.cumsum(m_best.to(tl.int32), 0) - 1
    tl.store(p_kept + i_pair * KEPT + b_place, SINK_BLOCKS + o_candidate, mask=m_best)
    tl.debug_barrier()
    kept = tl.minimum(FIRST * budget, candidates)
    p_heads = p_query + i_anchor * stride_query_anchor + i_head * GROUP * stride_query_head
    p_table = p_tables + tl.load(p_sequences + i_anchor).to(tl.int64) * stride_table
    for i_first in tl.range(0, KEPT, SCORED, num_stages=1):
        o_scored = i_first + tl.arange(0, SCORED)
        m_scored = o_scored < kept
        b_index = tl.load(p_kept + i_pair * KEPT + o_scored, mask=m_scored, other=0)
        i_blocks = tl.load(p_table + b_index, mask=m_scored, other=0).to(tl.int64)
        o_bounds = i_blocks * stride_part_block + i_head * stride_part_head
        p_scales = p_bound_scales + i_blocks * stride_bound_scale_block + i_head * stride_bound_scale_head
        b_best = tl.full([SCORED], float("-inf"), tl.float32)
        for i_part in range(SUBS):
            b_part = score_part(p_heads, stride_query_head, p_part_bounds, p_scales, o_bounds, m_scored, i_part, GROUP, DIM, BLOCK_DIM)
            b_best = tl.maximum(b_best, b_part)
        tl.store(p_scores + i_pair * width + o_scored, b_best, mask=m_scored)
    tl.debug_barrier()
    m_kept = o_kept < kept
    b_best = tl.load(p_scores + i_pair * width + o_kept, mask=m_kept, other=0.0)
    b_index = tl.load(p_kept + i_pair * KEPT + o_kept, mask=m_kept, other=0)
    m_chosen = best_of(b_best, m_kept, tl.minimum(SECOND * budget, candidates))
    tl.store(p_choices + i_pair * most + tl.cumsum(m_chosen.to(tl.int32), 0) - 1, b_index, mask=m_chosen)


@triton.jit
def load_keys(p_keys, o_tokens, stride_token, DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, NIBBLES: tl.constexpr):
    """Keys [B, BLOCK_DIM] float32 of a block's head as they are kept, without their scales."""
    if NIBBLES:
        o_dim = tl.arange(0, BLOCK_DIM // 2)
        b_packed = tl.load(p_keys + o_tokens[:, None] * stride_token + o_dim[None, :], mask=(o_dim < DIM // 2)[None, :], other=0).to(
            tl.int32
        )
        b_low, b_high = ((b_packed & 15) ^ 8) - 8, ((b_packed >> 4) ^ 8) - 8
        b_keys = tl.reshape(tl.join(b_low, b_high), [o_tokens.shape[0], BLOCK_DIM]).to(tl.float32)
    else:
        o_dim = tl.arange(0, BLOCK_DIM)
        b_keys = tl.load(p_keys + o_tokens[:, None] * stride_token + o_dim[None, :], mask=(o_dim < DIM)[None, :], other=0).to(tl.float32)
    return b_keys


@triton.jit
def product_kernel(
    p_query, p_far_keys, p_key_scales, p_tables, p_sequences, p_ends, p_budgets, p_kept, p_scores, most,
    stride_query_anchor, stride_query_head, stride_far_key_block, stride_far_key_head, stride_far_key_token,
    stride_scale_block, stride_scale_head, stride_table,
    GROUP: tl.constexpr, DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, SINK_BLOCKS: tl.constexpr, SECOND: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr, QUANTISED: tl.constexpr, NIBBLES: tl.constexpr,
):  # fmt: skip
    """One program owns one candidate of one anchor and K/V head: its highest product with a key, in p_scores [A, Hkv, most]."""
    i_anchor, i_head, i_kept = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64), tl.program_id(2)
    candidates = tl.maximum(tl.load(p_ends + i_anchor) - SINK_BLOCKS, 0)
    if i_kept < tl.minimum(SECOND * tl.load(p_budgets + i_anchor), candidates):
        o_kept = (i_anchor * tl.num_programs(1) + i_head) * most + i_kept
        p_table = p_tables + tl.load(p_sequences + i_anchor).to(tl.int64) * stride_table
        i_block = tl.load(p_table + tl.load(p_kept + o_kept)).to(tl.int64)
        o_tokens, o_dim = tl.arange(0, BLOCK_TOKENS), tl.arange(0, BLOCK_DIM)
        p_key = p_far_keys + i_block * stride_far_key_block + i_head * stride_far_key_head
        b_keys = load_keys(p_key, o_tokens, stride_far_key_token, DIM, BLOCK_DIM, NIBBLES)
        if QUANTISED:
            b_keys *= tl.load(p_key_scales + i_block * stride_scale_block + i_head * stride_scale_head + o_tokens).to(tl.float32)[:, None]
        p_heads = p_query + i_anchor * stride_query_anchor + i_head * GROUP * stride_query_head
        b_best = tl.full([BLOCK_TOKENS], float("-inf"), tl.float32)
        for i_group in tl.static_range(GROUP):
            b_query = tl.load(p_heads + i_group * stride_query_head + o_dim, mask=o_dim < DIM, other=0.0).to(tl.float32)
            b_best = tl.maximum(b_best, tl.sum(b_keys * b_query[None, :], 1))
        tl.store(p_scores + o_kept, tl.max(b_best))


@triton.jit
def pick_kernel(
    p_ends, p_budgets, p_kept, p_scores, p_choices, p_counts, compared, most,
    SINK_BLOCKS: tl.constexpr, SECOND: tl.constexpr, KEPT: tl.constexpr, MOST: tl.constexpr,
):  # fmt: skip
    """One program owns one anchor and K/V head: of the candidates that were compared, p_kept and p_scores [A, Hkv, compared], the best."""
    i_anchor, i_head = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    i_pair = i_anchor * tl.num_programs(1) + i_head
    budget = tl.load(p_budgets + i_anchor)
    candidates = tl.maximum(tl.load(p_ends + i_anchor) - SINK_BLOCKS, 0)
    o_kept, o_most, count = tl.arange(0, KEPT), tl.arange(0, MOST), tl.minimum(budget, candidates)
    m_kept = o_kept < tl.minimum(SECOND * budget, candidates)
    b_index = tl.load(p_kept + i_pair * compared + o_kept, mask=m_kept, other=0)
    m_chosen = best_of(tl.load(p_scores + i_pair * compared + o_kept, mask=m_kept, other=0.0), m_kept, count)
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

    Reads 2 · D bytes a candidate and K/V head, (sub-blocks) · 2 · D bytes for each of the best FIRST_STAGE · budget, and the keys of the
    best SECOND_STAGE · budget.
    """
    kv_heads = far.bounds.shape[1]
    choices = torch.empty((len(query), kv_heads, most), dtype=torch.int32, device=query.device)
    counts = torch.empty(len(query), dtype=torch.int32, device=query.device)
    if not len(query):
        return choices, counts
    query = query if query.stride(2) == 1 else query.contiguous()
    asked = _Asked(query, far, far_tables, sequences, candidate_ends, budgets, sink_blocks, SECOND_STAGE * max(most, 1))
    kept = _keep_by_bounds(asked)
    products = torch.empty(kept.shape, dtype=torch.float32, device=query.device)
    key_scales = far.keys if far.key_scales is None else far.key_scales
    scale_strides = (0, 0) if far.key_scales is None else far.key_scales.stride()[:2]
    product_kernel[kept.shape](
        query, far.keys, key_scales, far_tables, sequences, candidate_ends, budgets, kept, products, asked.compared,
        *query.stride()[:2], *far.keys.stride()[:3], *scale_strides, far_tables.stride(0),
        SECOND=SECOND_STAGE, BLOCK_TOKENS=far.keys.shape[2], QUANTISED=far.key_scales is not None, NIBBLES=far.keys.dtype == torch.uint8,
        num_warps=4, **asked.options,
    )  # fmt: skip
    candidates = triton.next_power_of_2(asked.compared)
    pick_kernel[kept.shape[:2]](
        candidate_ends, budgets, kept, products, choices, counts, asked.compared, most, SINK_BLOCKS=sink_blocks, SECOND=SECOND_STAGE,
        KEPT=candidates, MOST=max(triton.next_power_of_2(most), 2), num_warps=_pick_warps(candidates),
    )  # fmt: skip
    return choices, counts


class _Asked(NamedTuple):
    """The arguments of one call, and how many candidates' keys are compared at most."""

    query: Tensor
    far: FarBlocks
    tables: Tensor
    sequences: Tensor
    ends: Tensor
    budgets: Tensor
    sink_blocks: int
    compared: int

    @property
    def options(self) -> dict[str, int]:
        """Constants of every kernel that reads queries."""
        heads, size = self.query.shape[1:]
        group = heads // self.far.bounds.shape[1]
        return {"GROUP": group, "DIM": size, "BLOCK_DIM": triton.next_power_of_2(size), "SINK_BLOCKS": self.sink_blocks}


def _keep_by_bounds(asked: _Asked) -> Tensor:
    """Candidates that two stages of bounds keep, ascending, int32 [A, Hkv, compared]; nothing behind the last."""
    query, far, tables = asked.query, asked.far, asked.tables
    pairs, width = (len(query), far.bounds.shape[1]), max(tables.shape[1] - asked.sink_blocks, 1)
    scores = torch.empty((*pairs, width), dtype=torch.float32, device=query.device)
    first = triton.next_power_of_2(FIRST_STAGE * asked.compared // SECOND_STAGE)
    indices = torch.empty((*pairs, first), dtype=torch.int32, device=query.device)
    kept = torch.empty((*pairs, asked.compared), dtype=torch.int32, device=query.device)
    whose, strides = (far.bound_scales, tables, asked.sequences, asked.ends), (*far.bound_scales.stride(), tables.stride(0))
    score_kernel[(*pairs, triton.cdiv(width, SCORED_BLOCKS))](
        query, far.bounds, *whose, scores, width, *query.stride()[:2], *far.bounds.stride()[:2], *strides,
        CANDIDATES=SCORED_BLOCKS, num_warps=4, **asked.options,
    )  # fmt: skip
    candidates = max(triton.next_power_of_2(width), 2)
    select_kernel[pairs](
        query, far.part_bounds, *whose, asked.budgets, scores, indices, kept, width, asked.compared,
        *query.stride()[:2], *far.part_bounds.stride()[:2], *strides,
        SUBS=far.part_bounds.shape[2], FIRST=FIRST_STAGE, SECOND=SECOND_STAGE, CANDIDATES=candidates, KEPT=first,
        SCORED=min(SCORED_BLOCKS, first), num_warps=_select_warps(candidates), **asked.options,
    )  # fmt: skip
    return kept


def _pick_warps(candidates: int) -> int:
    """Warps with which pick_kernel spills on no chip; `--prefill dense` picks from 8,192 at 128K."""
    return 4 if candidates <= 2048 else 8


def _select_warps(candidates: int) -> int:
    """Warps with which select_kernel spills on no chip."""
    if candidates <= 2048:
        return 4
    return 16 if candidates <= 8192 else 8
