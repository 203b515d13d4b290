"""Kernels that score far blocks by bounds of them and of their parts, and by keys: for one query's heads, or for a tile of queries.

Queries are whole numbers of 15 bits in a unit that the heads of a K/V head share (`steps_kernel`), bounds and keys of 8 or 4 bits are whole
numbers too, so sums are exact. Invariant: a score has the same bits whichever kernel computes it, alone or in a tile, and those of the
compiled CPU kernels; keys of a store in the model's own type are multiplied in float32, by `product_kernel` alone.
"""

from __future__ import annotations

import triton
import triton.language as tl

from service.kernels.gpu.compiling import kernel
from service.kernels.gpu.far_store import round_half_even
from service.kernels.gpu.sparse_tiles import load_far

# The largest number whose halves are two bytes with signs: 127 · 256 + 127.
LARGEST_STEP = 32639


@triton.jit
def write_steps(
    p_query, p_steps, p_units, stride_query_anchor, stride_query_head, GROUP: tl.constexpr, DIM: tl.constexpr, BLOCK_DIM: tl.constexpr,
    HEADS: tl.constexpr, LARGEST: tl.constexpr,
):  # fmt: skip
    """Store the GROUP heads of this program's query and K/V head in steps, p_steps [A, Hq, BLOCK_DIM] int16, 0 from DIM on, of a unit,
    p_units [A, Hkv] float32; all 0 where the unit is not a positive number."""
    i_anchor, i_head = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    o_head, o_dim = tl.arange(0, HEADS), tl.arange(0, BLOCK_DIM)
    m_head = o_head < GROUP
    o_query = (i_head * GROUP + o_head) * stride_query_head
    m_query = m_head[:, None] & (o_dim < DIM)[None, :]
    b_query = tl.load(p_query + i_anchor * stride_query_anchor + o_query[:, None] + o_dim[None, :], mask=m_query, other=0.0).to(tl.float32)
    unit = tl.math.div_rn(tl.zeros([1], tl.float32) + tl.max(tl.abs(b_query)), LARGEST * 1.0)  # [1]
    m_usable = (unit > 0) & (unit < float("inf"))
    b_ratio = tl.math.div_rn(b_query, tl.zeros_like(b_query) + tl.where(m_usable, unit, 1.0)[:, None])
    b_steps = tl.minimum(tl.maximum(round_half_even(b_ratio), -LARGEST * 1.0), LARGEST * 1.0)
    b_steps = tl.where(m_usable[:, None], b_steps, 0.0).to(tl.int16)
    o_steps = (i_anchor * tl.num_programs(1) + i_head) * GROUP + o_head
    tl.store(p_steps + o_steps[:, None] * BLOCK_DIM + o_dim[None, :], b_steps, mask=m_head[:, None])
    tl.store(p_units + i_anchor * tl.num_programs(1) + i_head + tl.arange(0, 1), tl.where(m_usable, unit, 0.0))


@kernel
def steps_kernel(
    p_query, p_steps, p_units, stride_query_anchor, stride_query_head, GROUP: tl.constexpr, DIM: tl.constexpr, BLOCK_DIM: tl.constexpr,
    HEADS: tl.constexpr, LARGEST: tl.constexpr,
):  # fmt: skip
    """One program owns one query and K/V head, see `write_steps`."""
    write_steps(p_query, p_steps, p_units, stride_query_anchor, stride_query_head, GROUP, DIM, BLOCK_DIM, HEADS, LARGEST)


@triton.jit
def load_bounds(p_bounds, i_blocks, m_blocks, i_part, DIM: tl.constexpr, BLOCK_DIM: tl.constexpr):
    """(highest, lowest) [C, BLOCK_DIM] int8 of part i_part of the blocks whose bounds [parts, 2, DIM] begin at p_bounds + i_blocks [C]."""
    o_dim = tl.arange(0, BLOCK_DIM)
    o_at = i_blocks[:, None] + i_part * (2 * DIM) + o_dim[None, :]
    m_at = m_blocks[:, None] & (o_dim < DIM)[None, :]
    return tl.load(p_bounds + o_at, mask=m_at, other=0), tl.load(p_bounds + o_at + DIM, mask=m_at, other=0)


@triton.jit
def score_part(
    p_steps, unit, p_bounds, p_scales, i_blocks, m_blocks, i_part, GROUP: tl.constexpr, DIM: tl.constexpr, BLOCK_DIM: tl.constexpr
):  # fmt: skip
    """Scores [C] float32 of part i_part of blocks, see `load_bounds`, whose scales are p_scales [C], for the GROUP heads at p_steps that
    share a K/V head and its unit: the highest of theirs."""
    o_dim = tl.arange(0, BLOCK_DIM)
    b_high, b_low = load_bounds(p_bounds, i_blocks, m_blocks, i_part, DIM, BLOCK_DIM)
    b_total = tl.full([i_blocks.shape[0]], -2147483648, tl.int32)
    for i_group in tl.range(0, GROUP, num_stages=1):
        b_steps = tl.load(p_steps + i_group * BLOCK_DIM + o_dim).to(tl.int32)
        b_product = b_high.to(tl.int32) * tl.maximum(b_steps, 0)[None, :] + b_low.to(tl.int32) * tl.minimum(b_steps, 0)[None, :]
        b_total = tl.maximum(b_total, tl.sum(b_product, 1))
    return b_total.to(tl.float32) * (unit * tl.load(p_scales, mask=m_blocks, other=0.0).to(tl.float32))


@triton.jit
def score_parts(
    p_steps, unit, p_bounds, p_scales, i_blocks, m_blocks,
    SUBS: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr, BLOCK_DIM: tl.constexpr,
):  # fmt: skip
    """The highest score [C] of any of the SUBS parts of blocks, see `score_part`."""
    b_best = tl.full([i_blocks.shape[0]], float("-inf"), tl.float32)
    for i_part in range(SUBS):
        b_part = score_part(p_steps, unit, p_bounds, p_scales, i_blocks, m_blocks, i_part, GROUP, DIM, BLOCK_DIM)
        b_best = tl.maximum(b_best, b_part)
    return b_best


@kernel
def score_kernel(
    p_query, p_steps, p_units, p_bounds, p_bound_scales, p_tables, p_sequences, p_ends, p_budgets, p_scores, width,
    stride_query_anchor, stride_query_head,
    stride_bound_block, stride_bound_head, stride_bound_scale_block, stride_bound_scale_head, stride_table,
    GROUP: tl.constexpr, DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, SINK_BLOCKS: tl.constexpr, CANDIDATES: tl.constexpr,
    HEADS: tl.constexpr, LARGEST: tl.constexpr,
):  # fmt: skip
    """One program owns CANDIDATES candidates of one anchor and K/V head: it stores their blocks' scores in p_scores [A, Hkv, width], or
    nothing where the budget covers all candidates. All of an anchor write the same steps, for themselves and for later launches."""
    i_anchor, i_head = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    i_pair = i_anchor * tl.num_programs(1) + i_head
    o_candidate = tl.program_id(2) * CANDIDATES + tl.arange(0, CANDIDATES)
    end = tl.load(p_ends + i_anchor)
    if (SINK_BLOCKS + tl.program_id(2) * CANDIDATES < end) & (end - SINK_BLOCKS > tl.load(p_budgets + i_anchor)):
        m_candidate = SINK_BLOCKS + o_candidate < end
        p_table = p_tables + tl.load(p_sequences + i_anchor).to(tl.int64) * stride_table
        i_blocks = tl.load(p_table + SINK_BLOCKS + o_candidate, mask=m_candidate, other=0).to(tl.int64)
        o_bounds = i_blocks * stride_bound_block + i_head * stride_bound_head
        p_scales = p_bound_scales + i_blocks * stride_bound_scale_block + i_head * stride_bound_scale_head
        write_steps(p_query, p_steps, p_units, stride_query_anchor, stride_query_head, GROUP, DIM, BLOCK_DIM, HEADS, LARGEST)
        tl.debug_barrier()
        p_heads, unit = p_steps + i_pair * (GROUP * BLOCK_DIM), tl.load(p_units + i_pair)
        b_scores = score_part(p_heads, unit, p_bounds, p_scales, o_bounds, m_candidate, 0, GROUP, DIM, BLOCK_DIM)
        tl.store(p_scores + i_pair * width + o_candidate, b_scores, mask=m_candidate)


@triton.jit
def run_length(p_sequences, i_anchor, anchors, TOKENS: tl.constexpr):
    """How many anchors of a tile of TOKENS, side by side, are of the sequence of i_anchor, which is one of them."""
    i_first, o_tile = i_anchor // TOKENS * TOKENS, tl.arange(0, TOKENS)
    b_sequences = tl.load(p_sequences + i_first + o_tile, mask=i_first + o_tile < anchors, other=-1)
    m_other = b_sequences != tl.load(p_sequences + i_anchor)
    i_before = tl.max(tl.where(m_other & (i_first + o_tile < i_anchor), o_tile, -1))
    return tl.min(tl.where(m_other & (i_first + o_tile > i_anchor), o_tile, TOKENS)) - i_before - 1


@kernel
def mark_kept_kernel(
    p_sequences, p_ends, p_budgets, p_kept, p_marks, anchors, width, most,
    SINK_BLOCKS: tl.constexpr, SECOND: tl.constexpr, TOKENS: tl.constexpr, FEWEST: tl.constexpr, MARKED: tl.constexpr,
):  # fmt: skip
    """One program owns one anchor and K/V head: its bit in p_marks [tiles, Hkv, width] at the candidates that it kept, p_kept
    [A, Hkv, most], where it is one of a run of FEWEST in a tile of TOKENS."""
    i_anchor, i_head = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    candidates, budget = tl.maximum(tl.load(p_ends + i_anchor) - SINK_BLOCKS, 0), tl.load(p_budgets + i_anchor)
    alike = run_length(p_sequences, i_anchor, anchors, TOKENS)
    if (alike >= FEWEST) & (candidates > budget):
        o_kept = tl.arange(0, MARKED)
        m_kept = o_kept < tl.minimum(SECOND * budget, candidates)
        i_index = tl.load(p_kept + (i_anchor * tl.num_programs(1) + i_head) * most + o_kept, mask=m_kept, other=0)
        p_tile = p_marks + (i_anchor // TOKENS * tl.num_programs(1) + i_head) * width
        tl.atomic_or(p_tile + i_index, tl.full([MARKED], 1, tl.int32) << (i_anchor % TOKENS), mask=m_kept, sem="relaxed")


@triton.jit
def product_of(
    p_query, p_steps, unit, p_keys, p_scales, stride_query_head, stride_token,
    GROUP: tl.constexpr, DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, BLOCK_TOKENS: tl.constexpr, QUANTISED: tl.constexpr,
    NIBBLES: tl.constexpr,
):  # fmt: skip
    """The highest product of any of GROUP heads with a key of the block's head at p_keys, whose scales are at p_scales."""
    o_tokens, o_dim = tl.arange(0, BLOCK_TOKENS), tl.arange(0, BLOCK_DIM)
    b_keys = load_far(p_keys, o_tokens, stride_token, DIM, BLOCK_DIM, NIBBLES)
    if QUANTISED:
        b_best = tl.full([BLOCK_TOKENS], -2147483648, tl.int32)
        for i_group in tl.static_range(GROUP):
            b_steps = tl.load(p_steps + i_group * BLOCK_DIM + o_dim).to(tl.int32)
            b_best = tl.maximum(b_best, tl.sum(b_keys.to(tl.int32) * b_steps[None, :], 1))
        score = tl.max(b_best.to(tl.float32) * tl.load(p_scales + o_tokens).to(tl.float32)) * unit
    else:
        b_product = tl.full([BLOCK_TOKENS], float("-inf"), tl.float32)
        for i_group in tl.static_range(GROUP):
            b_query = tl.load(p_query + i_group * stride_query_head + o_dim, mask=o_dim < DIM, other=0.0).to(tl.float32)
            b_product = tl.maximum(b_product, tl.sum(b_keys.to(tl.float32) * b_query[None, :], 1))
        score = tl.max(b_product)
    return score


@kernel
def product_kernel(
    p_query, p_steps, p_units, p_far_keys, p_key_scales, p_tables, p_sequences, p_ends, p_budgets, p_kept, p_scores, anchors, most,
    stride_query_anchor, stride_query_head, stride_far_key_block, stride_far_key_head, stride_far_key_token: tl.constexpr,
    stride_scale_block, stride_scale_head, stride_table,
    GROUP: tl.constexpr, DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, SINK_BLOCKS: tl.constexpr, SECOND: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr, QUANTISED: tl.constexpr, NIBBLES: tl.constexpr, TOKENS: tl.constexpr, FEWEST: tl.constexpr,
):  # fmt: skip
    """One program owns every num_programs-th candidate of one anchor and K/V head: their highest products with a key, in p_scores
    [A, Hkv, most]. With TOKENS, anchors of runs of FEWEST in tiles of TOKENS are left to `product_tile_kernel`."""
    i_anchor, i_head = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    if TOKENS > 0:
        alike = run_length(p_sequences, i_anchor, anchors, TOKENS)
        if alike >= FEWEST:
            return
    i_pair = i_anchor * tl.num_programs(1) + i_head
    candidates, budget = tl.maximum(tl.load(p_ends + i_anchor) - SINK_BLOCKS, 0), tl.load(p_budgets + i_anchor)
    p_table = p_tables + tl.load(p_sequences + i_anchor).to(tl.int64) * stride_table
    p_heads = p_query + i_anchor * stride_query_anchor + i_head * GROUP * stride_query_head
    unit = tl.load(p_units + i_pair)
    for i_kept in range(tl.program_id(2), tl.where(candidates > budget, tl.minimum(SECOND * budget, candidates), 0), tl.num_programs(2)):
        i_block = tl.load(p_table + tl.load(p_kept + i_pair * most + i_kept)).to(tl.int64)
        score = product_of(
            p_heads, p_steps + i_pair * (GROUP * BLOCK_DIM), unit,
            p_far_keys + i_block * stride_far_key_block + i_head * stride_far_key_head,
            p_key_scales + i_block * stride_scale_block + i_head * stride_scale_head, stride_query_head, stride_far_key_token,
            GROUP, DIM, BLOCK_DIM, BLOCK_TOKENS, QUANTISED, NIBBLES,
        )  # fmt: skip
        tl.store(p_scores + i_pair * most + i_kept, score)


@triton.jit
def halves(b_steps):
    """(high, low) bytes of whole numbers of 15 bits, both with signs: x = 256 · high + low."""
    b_low = b_steps.to(tl.int8)
    return ((b_steps - b_low.to(tl.int16)) >> 8).to(tl.int8), b_low


@triton.jit
def load_tile(
    p_steps, p_units, anchors, TOKENS: tl.constexpr, GROUP: tl.constexpr, PADDED: tl.constexpr, BLOCK_DIM: tl.constexpr
):  # fmt: skip
    """(anchors [TOKENS] of this program's tile and K/V head, their steps [TOKENS · PADDED, BLOCK_DIM], their units [TOKENS]); a K/V head's
    last query head stands for those that a power of two has more."""
    i_head, heads = tl.program_id(1).to(tl.int64), tl.num_programs(1)
    o_rows, o_dim = tl.arange(0, TOKENS * PADDED), tl.arange(0, BLOCK_DIM)
    o_anchor = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    i_anchor = tl.minimum(tl.program_id(0).to(tl.int64) * TOKENS + o_rows // PADDED, anchors - 1)
    o_steps = ((i_anchor * heads + i_head) * GROUP + tl.minimum(o_rows % PADDED, GROUP - 1)) * BLOCK_DIM
    b_units = tl.load(p_units + o_anchor * heads + i_head, mask=o_anchor < anchors, other=0.0)
    return o_anchor, tl.load(p_steps + o_steps[:, None] + o_dim[None, :]), b_units


@triton.jit
def find_run(p_sequences, o_anchor, i_from, anchors, TOKENS: tl.constexpr):
    """(sequence of anchor i_from of a tile, behind which anchor of the tile those of the same sequence end)."""
    i_first = tl.program_id(0).to(tl.int64) * TOKENS
    i_sequence = tl.load(p_sequences + i_first + i_from).to(tl.int64)
    b_sequences = tl.load(p_sequences + o_anchor, mask=o_anchor < anchors, other=-1).to(tl.int64)
    o_tile = tl.arange(0, TOKENS)
    return i_sequence, tl.min(tl.where((o_tile > i_from) & (b_sequences != i_sequence), o_tile, TOKENS))


@triton.jit
def highest(b_products, TOKENS: tl.constexpr, PADDED: tl.constexpr, COLUMNS: tl.constexpr):
    """The highest [TOKENS, COLUMNS] of what the heads of a K/V head have, [TOKENS · PADDED, COLUMNS]."""
    return tl.max(tl.reshape(b_products, [TOKENS, PADDED, COLUMNS]), 1)


@kernel
def score_tile_kernel(
    p_steps, p_units, p_bounds, p_bound_scales, p_tables, p_sequences, p_ends, p_budgets, p_scores, anchors, width,
    stride_bound_block, stride_bound_head, stride_bound_scale_block, stride_bound_scale_head, stride_table,
    GROUP: tl.constexpr, PADDED: tl.constexpr, DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, SINK_BLOCKS: tl.constexpr,
    CANDIDATES: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """`score_kernel` for TOKENS anchors one after the other, whose candidates are read once where they are of one sequence."""
    i_head, heads = tl.program_id(1).to(tl.int64), tl.num_programs(1)
    o_anchor, b_steps, b_units = load_tile(p_steps, p_units, anchors, TOKENS, GROUP, PADDED, BLOCK_DIM)
    b_plus_high, b_plus_low = halves(tl.maximum(b_steps, 0))
    b_minus_high, b_minus_low = halves(tl.minimum(b_steps, 0))
    o_tile, o_candidate = tl.arange(0, TOKENS), tl.program_id(2) * CANDIDATES + tl.arange(0, CANDIDATES)
    b_ends = tl.load(p_ends + o_anchor, mask=o_anchor < anchors, other=0)
    b_ends = tl.where(b_ends - SINK_BLOCKS > tl.load(p_budgets + o_anchor, mask=o_anchor < anchors, other=0), b_ends, 0)
    i_from, last = 0, tl.minimum(anchors - tl.program_id(0) * TOKENS, TOKENS)
    while i_from < last:
        i_sequence, i_to = find_run(p_sequences, o_anchor, i_from, anchors, TOKENS)
        m_run = (o_tile >= i_from) & (o_tile < i_to)
        end = tl.max(tl.where(m_run, b_ends, 0))
        if SINK_BLOCKS + tl.program_id(2) * CANDIDATES < end:
            m_candidate = SINK_BLOCKS + o_candidate < end
            i_blocks = tl.load(p_tables + i_sequence * stride_table + SINK_BLOCKS + o_candidate, mask=m_candidate, other=0).to(tl.int64)
            o_bounds = i_blocks * stride_bound_block + i_head * stride_bound_head
            b_high, b_low = load_bounds(p_bounds, o_bounds, m_candidate, 0, DIM, BLOCK_DIM)
            b_products = tl.dot(b_plus_high, tl.trans(b_high), out_dtype=tl.int32)
            b_products += tl.dot(b_minus_high, tl.trans(b_low), out_dtype=tl.int32)
            b_products = b_products * 256 + tl.dot(b_plus_low, tl.trans(b_high), out_dtype=tl.int32)
            b_products += tl.dot(b_minus_low, tl.trans(b_low), out_dtype=tl.int32)
            p_scales = p_bound_scales + i_blocks * stride_bound_scale_block + i_head * stride_bound_scale_head
            b_scales = tl.load(p_scales, mask=m_candidate, other=0.0).to(tl.float32)
            b_scores = highest(b_products, TOKENS, PADDED, CANDIDATES).to(tl.float32) * (b_units[:, None] * b_scales[None, :])
            o_score = ((o_anchor * heads + i_head) * width)[:, None] + o_candidate[None, :]
            tl.store(p_scores + o_score, b_scores, mask=m_run[:, None] & (SINK_BLOCKS + o_candidate[None, :] < b_ends[:, None]))
        i_from = i_to


@kernel
def product_tile_kernel(
    p_steps, p_units, p_far_keys, p_key_scales, p_tables, p_sequences, p_indices, p_readers, p_visits, p_scores, anchors, most_visits, most,
    stride_far_key_block, stride_far_key_head, stride_far_key_token: tl.constexpr, stride_scale_block, stride_scale_head, stride_table,
    GROUP: tl.constexpr, PADDED: tl.constexpr, DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, BLOCK_TOKENS: tl.constexpr,
    NIBBLES: tl.constexpr, TOKENS: tl.constexpr, FEWEST: tl.constexpr,
):  # fmt: skip
    """`product_kernel` for TOKENS anchors one after the other and a store of 8 or 4 bits: a block that several ask for is read once.

    The tile's visits are the candidates that any anchor has kept, upwards, by table index; each anchor meets its own in the order of its
    list, so how many it has met tells where the score belongs. Runs of fewer than FEWEST anchors of a sequence are left to
    `product_kernel`: for each the tile would go through all visits.
    """
    i_head, heads = tl.program_id(1).to(tl.int64), tl.num_programs(1)
    o_anchor, b_steps, b_units = load_tile(p_steps, p_units, anchors, TOKENS, GROUP, PADDED, BLOCK_DIM)
    b_high, b_low = halves(b_steps)
    o_tile, o_tokens = tl.arange(0, TOKENS), tl.arange(0, BLOCK_TOKENS)
    p_key, p_scale = p_far_keys + i_head * stride_far_key_head, p_key_scales + i_head * stride_scale_head
    i_place = tl.program_id(0).to(tl.int64) * heads + i_head
    visits, i_visits = tl.load(p_visits + i_place), i_place * most_visits
    o_score = (o_anchor * heads + i_head) * most
    i_from, last = 0, tl.minimum(anchors - tl.program_id(0) * TOKENS, TOKENS)
    while i_from < last:
        i_sequence, i_to = find_run(p_sequences, o_anchor, i_from, anchors, TOKENS)
        m_run = (o_tile >= i_from) & (o_tile < i_to)
        for i_visit in tl.range(0, tl.where(i_to - i_from >= FEWEST, visits, 0)):
            i_readers = tl.load(p_readers + i_visits + i_visit)
            m_reads = m_run & ((i_readers >> o_tile) & 1 != 0)
            # Where no anchor of this sequence asks for it the index is not one of its table.
            m_any = tl.max(m_reads.to(tl.int32)) != 0
            i_index = tl.load(p_indices + i_visits + i_visit)
            i_block = tl.load(p_tables + i_sequence * stride_table + i_index, mask=m_any, other=0).to(tl.int64)
            b_keys = load_far(p_key + i_block * stride_far_key_block, o_tokens, stride_far_key_token, DIM, BLOCK_DIM, NIBBLES)
            b_scales = tl.load(p_scale + i_block * stride_scale_block + o_tokens).to(tl.float32)
            b_products = tl.dot(b_high, tl.trans(b_keys), out_dtype=tl.int32) * 256 + tl.dot(b_low, tl.trans(b_keys), out_dtype=tl.int32)
            b_best = highest(b_products, TOKENS, PADDED, BLOCK_TOKENS).to(tl.float32) * b_scales[None, :]
            tl.store(p_scores + o_score, tl.max(b_best, 1) * b_units, mask=m_reads)
            o_score += m_reads.to(tl.int64)
        i_from = i_to
