"""Which far blocks queries read, on a GPU: bounds of blocks, bounds of their sub-blocks, keys, and the best by each.

Many anchors of a sequence are scored in tiles, which read a block once for all of them. It does not know positions. Invariant: a choice
depends on the anchor's query and its candidates alone, whatever company it has; ties go to the lower index.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from service.kernels.gpu.choice_scores import (
    LARGEST_STEP,
    mark_kept_kernel,
    product_kernel,
    product_tile_kernel,
    score_kernel,
    score_parts,
    score_tile_kernel,
    steps_kernel,
)
from service.kernels.gpu.compiling import kernel
from service.kernels.gpu.paged_attention import REGISTERS, capability
from service.kernels.gpu.tile_visits import MOST_TOKENS, Visits, gather_visits
from service.kernels.reference_sparse import FIRST_STAGE, SECOND_STAGE, FarBlocks

# Candidates that one program of the first stage scores, and one of the second at a time.
SCORED_BLOCKS = 32
# Rows of queries that a tile of anchors has, and how many anchors of a sequence, side by side, make it worth its while.
TILE_ROWS, FEWEST_ANCHORS = 64, 4
# Programs that share the candidates of an anchor and K/V head whose keys are compared.
COMPARING = 128


@triton.jit
def best_of(b_scores, m_valid, count):
    """The mask of the `count` best of b_scores [C] float32 (all valid ones if there are no more); ties go to the lower index.

    Floats are mapped to unsigned integers of the same order. Up to 128 are compared each with each; of more the count-th best is found
    three bits at a time, of thousands bit by bit, and what is above it is taken, and of what equals it the first ones: 1, 11 or 32 sums
    over all, one after the other, instead of a sort.
    """
    b_bits = (b_scores + 0.0).to(tl.int32, bitcast=True)
    b_keys = tl.where(b_bits < 0, ~b_bits, b_bits | -2147483648).to(tl.uint32, bitcast=True)
    b_keys = tl.where(m_valid, b_keys, 0)
    if b_scores.shape[0] <= 128:
        o_index = tl.arange(0, b_scores.shape[0])
        m_before = (b_keys[None, :] > b_keys[:, None]) | ((b_keys[None, :] == b_keys[:, None]) & (o_index[None, :] < o_index[:, None]))
        m_best = m_valid & (tl.sum((m_before & m_valid[None, :]).to(tl.int32), 1) < count)
    else:
        threshold = tl.zeros([1], tl.uint32)
        if b_scores.shape[0] <= 2048:
            threshold = raise_threshold(b_keys, threshold, count, 30, 4)
            for i_pass in range(10):
                threshold = raise_threshold(b_keys, threshold, count, 27 - 3 * i_pass, 8)
        else:
            for i_bit in range(32):
                threshold = raise_threshold(b_keys, threshold, count, 31 - i_bit, 2)
        m_above, m_equal = b_keys > threshold, m_valid & (b_keys == threshold)
        b_rank = tl.cumsum(m_equal.to(tl.int32), 0)
        m_best = m_above | (m_equal & (b_rank <= count - tl.sum(m_above.to(tl.int32))))
    return m_best


@triton.jit
def raise_threshold(b_keys, threshold, count, shift, TRIALS: tl.constexpr):
    """The threshold [1] with its next bits, from `shift` on: the highest of TRIALS that at least `count` of b_keys [C] reach."""
    if TRIALS == 2:
        b_trial = threshold | (tl.full([1], 1, tl.uint32) << shift)
        threshold = tl.where(tl.sum((b_keys >= b_trial).to(tl.int32)) >= count, b_trial, threshold)
    else:
        b_trials = threshold + (tl.arange(0, TRIALS).to(tl.uint32) << shift)
        b_reached = tl.sum((b_keys[None, :] >= b_trials[:, None]).to(tl.int32), 1)  # The first trial is the threshold itself.
        threshold += tl.maximum(tl.sum((b_reached >= count).to(tl.int32)) - 1, 0).to(tl.uint32) << shift
    return threshold


@kernel
def select_kernel(
    p_steps, p_units, p_part_bounds, p_bound_scales, p_tables, p_sequences, p_ends, p_budgets, p_scores, p_kept, p_choices, width, most,
    stride_part_block, stride_part_head, stride_bound_scale_block, stride_bound_scale_head, stride_table,
    GROUP: tl.constexpr, DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, SINK_BLOCKS: tl.constexpr, SUBS: tl.constexpr,
    FIRST: tl.constexpr, SECOND: tl.constexpr, CANDIDATES: tl.constexpr, KEPT: tl.constexpr, SCORED: tl.constexpr,
):  # fmt: skip
    """One program owns one anchor and K/V head: the best FIRST · budget candidates by their block, of these the best SECOND · budget by a
    sub-block, in p_choices [A, Hkv, most] in ascending order.

    The indices that the first stage keeps pass through p_kept [A, Hkv, KEPT] in ascending order, their scores, SCORED at a time, through
    p_scores, which is read before. Who may choose all candidates leaves nothing.
    """
    i_anchor, i_head = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    i_pair = i_anchor * tl.num_programs(1) + i_head
    budget = tl.load(p_budgets + i_anchor)
    candidates = tl.maximum(tl.load(p_ends + i_anchor) - SINK_BLOCKS, 0)
    if candidates <= budget:
        return
    o_candidate, o_kept = tl.arange(0, CANDIDATES), tl.arange(0, KEPT)
    m_candidate = o_candidate < candidates
    b_scores = tl.load(p_scores + i_pair * width + o_candidate, mask=m_candidate, other=0.0)
    m_best = best_of(b_scores, m_candidate, tl.minimum(FIRST * budget, candidates))
    b_place = tl.cumsum(m_best.to(tl.int32), 0) - 1
    tl.store(p_kept + i_pair * KEPT + b_place, SINK_BLOCKS + o_candidate, mask=m_best)
    tl.debug_barrier()
    kept = tl.minimum(FIRST * budget, candidates)
    p_heads, unit = p_steps + i_pair * (GROUP * BLOCK_DIM), tl.load(p_units + i_pair)
    p_table = p_tables + tl.load(p_sequences + i_anchor).to(tl.int64) * stride_table
    for i_first in tl.range(0, KEPT, SCORED, num_stages=1):
        o_scored = i_first + tl.arange(0, SCORED)
        m_scored = o_scored < kept
        b_index = tl.load(p_kept + i_pair * KEPT + o_scored, mask=m_scored, other=0)
        i_blocks = tl.load(p_table + b_index, mask=m_scored, other=0).to(tl.int64)
        o_bounds = i_blocks * stride_part_block + i_head * stride_part_head
        p_scales = p_bound_scales + i_blocks * stride_bound_scale_block + i_head * stride_bound_scale_head
        b_best = score_parts(p_heads, unit, p_part_bounds, p_scales, o_bounds, m_scored, SUBS, GROUP, DIM, BLOCK_DIM)
        tl.store(p_scores + i_pair * width + o_scored, b_best, mask=m_scored)
    tl.debug_barrier()
    m_kept = o_kept < kept
    b_best = tl.load(p_scores + i_pair * width + o_kept, mask=m_kept, other=0.0)
    b_index = tl.load(p_kept + i_pair * KEPT + o_kept, mask=m_kept, other=0)
    m_chosen = best_of(b_best, m_kept, tl.minimum(SECOND * budget, candidates))
    tl.store(p_choices + i_pair * most + tl.cumsum(m_chosen.to(tl.int32), 0) - 1, b_index, mask=m_chosen)


@kernel
def pick_kernel(
    p_ends, p_budgets, p_kept, p_scores, p_choices, p_counts, compared, most,
    SINK_BLOCKS: tl.constexpr, SECOND: tl.constexpr, KEPT: tl.constexpr, MOST: tl.constexpr,
):  # fmt: skip
    """One program owns one anchor and K/V head: of the candidates that were compared, p_kept and p_scores [A, Hkv, compared], the best; all
    candidates where the budget covers them, and nothing was compared."""
    i_anchor, i_head = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    i_pair = i_anchor * tl.num_programs(1) + i_head
    budget = tl.load(p_budgets + i_anchor)
    candidates = tl.maximum(tl.load(p_ends + i_anchor) - SINK_BLOCKS, 0)
    o_kept, o_most, count = tl.arange(0, KEPT), tl.arange(0, MOST), tl.minimum(budget, candidates)
    p_choice = p_choices + i_pair * most
    tl.store(p_counts + i_anchor, count, mask=i_head == 0)
    tl.store(p_choice + o_most, tl.where(o_most < count, SINK_BLOCKS + o_most, -1), mask=o_most < most)
    if candidates <= budget:
        return
    tl.debug_barrier()
    m_kept = o_kept < tl.minimum(SECOND * budget, candidates)
    b_index = tl.load(p_kept + i_pair * compared + o_kept, mask=m_kept, other=0)
    m_chosen = best_of(tl.load(p_scores + i_pair * compared + o_kept, mask=m_kept, other=0.0), m_kept, count)
    tl.store(p_choice + tl.cumsum(m_chosen.to(tl.int32), 0) - 1, b_index, mask=m_chosen)


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

    Queries are rounded to 15 bits, so near ties may fall otherwise. Reads 2 · D bytes a candidate and K/V head, (sub-blocks) · 2 · D bytes
    for each of the best FIRST_STAGE · budget, and the keys of the best SECOND_STAGE · budget; of these and of candidates in tiles, what
    some anchor of a tile asks for.
    """
    kv_heads = far.bounds.shape[1]
    choices = torch.empty((len(query), kv_heads, most), dtype=torch.int32, device=query.device)
    counts = torch.empty(len(query), dtype=torch.int32, device=query.device)
    if not len(query):
        return choices, counts
    query = query if query.stride(2) == 1 else query.contiguous()
    asked = _Asked(query, far, far_tables, sequences, candidate_ends, budgets, sink_blocks, SECOND_STAGE * max(most, 1))
    steps = _steps(asked)
    kept = _keep_by_bounds(asked, steps)
    products = _compare_keys(asked, steps, kept)
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
    def pairs(self) -> tuple[int, int]:
        """Anchors and K/V heads."""
        return len(self.query), self.far.bounds.shape[1]

    @property
    def options(self) -> dict[str, int]:
        """Constants of every kernel that reads queries; a product of bytes takes 32 dimensions at least."""
        return {"GROUP": self.query.shape[1] // self.pairs[1], "DIM": self.query.shape[2], "BLOCK_DIM": self.block_dim}

    @property
    def block_dim(self) -> int:
        """Dimensions of a query in steps."""
        return max(32, triton.next_power_of_2(self.query.shape[2]))

    @property
    def tile(self) -> int:
        """Anchors of a tile, 0 where all are scored one by one: one for each sequence, or keys that are not whole numbers."""
        tokens = min(MOST_TOKENS, TILE_ROWS // self.padded)
        return 0 if self.far.key_scales is None or len(self.query) <= len(self.tables) or tokens < FEWEST_ANCHORS else tokens

    @property
    def padded(self) -> int:
        """Rows of an anchor in a tile."""
        return triton.next_power_of_2(self.query.shape[1] // self.pairs[1])


def _steps(asked: _Asked) -> tuple[Tensor, Tensor]:
    """Room for queries in steps, int16 [A, Hq, block_dim], and the units of these, float32 [A, Hkv]."""
    steps = torch.empty((*asked.query.shape[:2], asked.block_dim), dtype=torch.int16, device=asked.query.device)
    return steps, torch.empty(asked.pairs, dtype=torch.float32, device=steps.device)


def _keep_by_bounds(asked: _Asked, steps: tuple[Tensor, Tensor]) -> Tensor:
    """Candidates that two stages of bounds keep, ascending, int32 [A, Hkv, compared]; nothing behind the last. Fills the steps."""
    query, far, tables = asked.query, asked.far, asked.tables
    device = query.device
    pairs, width = asked.pairs, max(tables.shape[1] - asked.sink_blocks, 1)
    scores = torch.empty((*pairs, width), dtype=torch.float32, device=device)
    first = triton.next_power_of_2(FIRST_STAGE * asked.compared // SECOND_STAGE)
    indices = torch.empty((*pairs, first), dtype=torch.int32, device=device)
    kept = torch.empty((*pairs, asked.compared), dtype=torch.int32, device=device)
    whose = (far.bound_scales, tables, asked.sequences, asked.ends, asked.budgets)
    strides = (*far.bound_scales.stride(), tables.stride(0))
    options = asked.options | {"SINK_BLOCKS": asked.sink_blocks}
    bounds, how = (*steps, far.bounds, *whose, scores), {"HEADS": asked.padded, "LARGEST": LARGEST_STEP}
    if asked.tile:
        steps_kernel[pairs](query, *steps, *query.stride()[:2], num_warps=1, **asked.options, **how)
        scored = tile_candidates(asked.block_dim, capability(query.device))
        score_tile_kernel[(triton.cdiv(pairs[0], asked.tile), pairs[1], triton.cdiv(width, scored))](
            *bounds, pairs[0], width, *far.bounds.stride()[:2], *strides,
            CANDIDATES=scored, TOKENS=asked.tile, PADDED=asked.padded, num_warps=4, **options,
        )  # fmt: skip
    else:
        score_kernel[(*pairs, triton.cdiv(width, SCORED_BLOCKS))](
            query, *bounds, width, *query.stride()[:2], *far.bounds.stride()[:2], *strides,
            CANDIDATES=SCORED_BLOCKS, num_warps=4, **options, **how,
        )  # fmt: skip
    candidates = max(triton.next_power_of_2(width), 2)
    warps = _select_warps(candidates)
    select_kernel[pairs](
        *steps, far.part_bounds, *whose, scores, indices, kept, width, asked.compared,
        *far.part_bounds.stride()[:2], *strides, SUBS=far.part_bounds.shape[2], FIRST=FIRST_STAGE, SECOND=SECOND_STAGE,
        CANDIDATES=candidates, KEPT=first, SCORED=min(SCORED_BLOCKS, first), num_warps=warps, maxnreg=select_registers(warps), **options,
    )  # fmt: skip
    return kept


def _compare_keys(asked: _Asked, steps: tuple[Tensor, Tensor], kept: Tensor) -> Tensor:
    """The highest product of each candidate that was kept with a key, float32 [A, Hkv, compared]."""
    query, far, tables = asked.query, asked.far, asked.tables
    products = torch.empty(kept.shape, dtype=torch.float32, device=query.device)
    key_scales = far.keys if far.key_scales is None else far.key_scales
    scale_strides = (0, 0) if far.key_scales is None else far.key_scales.stride()[:2]
    strides = (*far.keys.stride()[:3], *scale_strides, tables.stride(0))
    options = asked.options | {"BLOCK_TOKENS": far.keys.shape[2], "NIBBLES": far.keys.dtype == torch.uint8, "num_warps": 4}
    options |= {"TOKENS": asked.tile, "FEWEST": FEWEST_ANCHORS}
    if asked.tile:
        visits = _tile_visits(asked, kept)
        product_tile_kernel[visits.counts.shape](
            *steps, far.keys, key_scales, tables, asked.sequences, visits.indices, visits.readers, visits.counts, products,
            len(query), visits.indices.shape[2], asked.compared, *strides, PADDED=asked.padded, **options,
        )  # fmt: skip
    # With tiles a program for what is left over; most find that nothing is.
    product_kernel[(*asked.pairs, 1 if asked.tile else min(asked.compared, COMPARING))](
        query, *steps, far.keys, key_scales, tables, asked.sequences, asked.ends, asked.budgets, kept, products,
        len(query), asked.compared, *query.stride()[:2], *strides, SINK_BLOCKS=asked.sink_blocks, SECOND=SECOND_STAGE,
        QUANTISED=far.key_scales is not None, **options,
    )  # fmt: skip
    return products


def _tile_visits(asked: _Asked, kept: Tensor) -> Visits:
    """The blocks that some anchor of a tile has kept; anchors that are left to `product_kernel` take no part."""
    anchors, kv_heads = asked.pairs
    width = asked.tables.shape[1]
    marks = torch.zeros((triton.cdiv(anchors, asked.tile), kv_heads, width), dtype=torch.int32, device=kept.device)
    mark_kept_kernel[asked.pairs](
        asked.sequences, asked.ends, asked.budgets, kept, marks, anchors, width, asked.compared, SINK_BLOCKS=asked.sink_blocks,
        SECOND=SECOND_STAGE, TOKENS=asked.tile, FEWEST=FEWEST_ANCHORS, MARKED=triton.next_power_of_2(asked.compared), num_warps=1,
    )  # fmt: skip
    return gather_visits(marks, asked.tile * asked.compared)


def tile_candidates(block_dim: int, chip: int) -> int:
    """Candidates that a tile of anchors scores at a time on sm_`chip`, without spills."""
    if block_dim > 128:
        return 16
    return 64 if chip >= 90 or block_dim <= 64 else 32


def _pick_warps(candidates: int) -> int:
    """Warps with which pick_kernel spills on no chip; `--prefill dense` picks from 8,192 at 128K."""
    return 4 if candidates <= 2048 else 8


def select_registers(warps: int) -> int | None:
    """Registers that a thread of select_kernel may have: few warps spill with what the assembler allows by itself, many with more."""
    return REGISTERS if warps == 4 else None


def _select_warps(candidates: int) -> int:
    """Warps with which select_kernel spills on no chip."""
    if candidates <= 2048:
        return 4
    return 16 if candidates <= 8192 else 8
