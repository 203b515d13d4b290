"""Kernel of attention over two stores for prompts: tiles of rows that walk what any of them reads, each block once for all of them.

A row reads sinks, its chosen far blocks upwards, and the near blocks from its window's start; rows of a tile are masked where they do not
read a block. A split is what a row reads among blocks that follow each other in the context (`far_span`), so with nothing far it is that
of dense attention. Invariant: what a row sums, and in which order, is a function of its position and of its anchor's choice, and all rows
of a tile begin their splits at the same blocks; shapes and plans are the business of `window_sparse.py`, visits that of `tile_visits.py`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from service.kernels.gpu.compiling import kernel
from service.kernels.gpu.dense_tiles import find_sequence, load_block
from service.kernels.gpu.online_softmax import add_tile, finish_rows, merge_rows, score_tile, start_rows


@triton.jit
def find_tile(p_ends, p_query_starts, p_context_lengths, i_tile, sequences, SEQUENCES: tl.constexpr, TOKENS: tl.constexpr):
    """(sequence, row of position 0, first position, last position) of a tile: a run of TOKENS aligned positions, as far as it is asked for.

    Volatile, so that what is found again after a loop is not kept in registers through it.
    """
    i_sequence, i_first = find_sequence(p_ends, i_tile, sequences, SEQUENCES)
    i_row = tl.load(p_query_starts + i_sequence, volatile=True)
    count = tl.load(p_query_starts + i_sequence + 1, volatile=True) - i_row
    shift = tl.load(p_context_lengths + i_sequence, volatile=True) - count  # position = row + shift
    i_run = (tl.maximum(shift, 0) // TOKENS + i_tile - i_first) * TOKENS
    return i_sequence, i_row - shift, tl.maximum(i_run, shift), tl.minimum(i_run + TOKENS, shift + count) - 1


@triton.jit
def near_start(position, WINDOW: tl.constexpr, REFRESH: tl.constexpr, BLOCK_TOKENS: tl.constexpr):
    """The table index of the first block in the window of the row at `position`."""
    return tl.maximum(position // REFRESH * REFRESH - WINDOW + 1, 0) // BLOCK_TOKENS


@triton.jit
def far_span(
    position, HAS_FAR: tl.constexpr, BUDGET: tl.constexpr, WINDOW: tl.constexpr, REFRESH: tl.constexpr, SINK_BLOCKS: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr, SPLIT_BLOCKS: tl.constexpr,
):  # fmt: skip
    """Splits of sinks and far blocks begin at multiples of this many blocks of the context, for all rows of the block of `position`.

    A power of two: SPLIT_BLOCKS, as among near blocks, while a row may choose all candidates; then doubled until candidates make at most a
    quarter as many splits as a row chooses blocks.
    """
    span = tl.cast(SPLIT_BLOCKS, tl.int32)
    if HAS_FAR:
        candidates = near_start(position // BLOCK_TOKENS * BLOCK_TOKENS, WINDOW, REFRESH, BLOCK_TOKENS) - SINK_BLOCKS
        while (candidates > BUDGET) & (4 * candidates > BUDGET * span):
            span *= 2
    return span


@triton.jit
def load_far(p_block, o_tokens, stride_token, DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, NIBBLES: tl.constexpr):
    """One head's [BLOCK_TOKENS, BLOCK_DIM] of a far block as stored; 4-bit values, two a byte, come back as int8."""
    if NIBBLES:
        o_dim = tl.arange(0, BLOCK_DIM // 2)
        o_block = (o_tokens[:, None] * stride_token + o_dim[None, :]).to(tl.uint32)
        b_packed = tl.load(p_block + o_block, mask=(o_dim < DIM // 2)[None, :], other=0)
        b_low, b_high = (b_packed & 15).to(tl.int8), (b_packed >> 4).to(tl.int8)
        b_block = tl.interleave((b_low ^ 8) - 8, (b_high ^ 8) - 8)
    else:
        o_dim = tl.arange(0, BLOCK_DIM)
        o_block = (o_tokens[:, None] * stride_token + o_dim[None, :]).to(tl.uint32)
        b_block = tl.load(p_block + o_block) if DIM == BLOCK_DIM else tl.load(p_block + o_block, mask=(o_dim < DIM)[None, :], other=0)
    return b_block


@triton.jit
def load_scaled(
    p_block, p_scales, o_tokens, stride_token, DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, QUANTISED: tl.constexpr, NIBBLES: tl.constexpr
):  # fmt: skip
    """(`load_far`, the scales of its tokens [BLOCK_TOKENS] float32, or 1 where it has none)."""
    b_scale = 1.0
    if QUANTISED:
        b_scale = tl.load(p_scales + o_tokens).to(tl.float32)
    return load_far(p_block, o_tokens, stride_token, DIM, BLOCK_DIM, NIBBLES), b_scale


@triton.jit
def walk_near(
    p_keys, p_values, p_table, b_query, o_position, b_start, first_position, last_position, i_split, span,
    b_max, b_sum, b_acc, b_all_max, b_all_sum, b_all_acc, i_from, i_to, i_whole, scale, cap,
    stride_key_block, stride_key_token, stride_value_block, stride_value_token,
    KEY_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_KEY: tl.constexpr, BLOCK_VALUE: tl.constexpr, BLOCK_TOKENS: tl.constexpr,
    SINK_BLOCKS: tl.constexpr, CAPPED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """(block that the split at hand begins at, the rows' states) after near blocks i_from … i_to − 1, of which a row reads the sinks and
    those from b_start [M] on, and from i_whole on all rows each.

    As `walk_blocks`: one loop, and one branch between the two products for what few blocks need.
    """
    o_tokens = tl.arange(0, BLOCK_TOKENS)
    o_key, o_value = tl.arange(0, BLOCK_KEY), tl.arange(0, BLOCK_VALUE)
    o_keys = (o_tokens[:, None] * stride_key_token + o_key[None, :]).to(tl.uint32)
    o_values = (o_tokens[:, None] * stride_value_token + o_value[None, :]).to(tl.uint32)
    i_cut = (first_position + 1) // BLOCK_TOKENS
    i_next = tl.load(p_table + i_from, mask=i_from < i_to, other=0)
    for i_entry in tl.range(i_from, i_to, disable_licm=True):
        i_block = i_next.to(tl.int64)
        i_next = tl.load(p_table + i_entry + 1, mask=i_entry + 1 < i_to, other=0)
        m_owned = last_position - i_entry * BLOCK_TOKENS - o_tokens >= 0
        b_keys = load_block(p_keys + i_block * stride_key_block, o_keys, o_key, m_owned, KEY_DIM, BLOCK_KEY)
        b_values = load_block(p_values + i_block * stride_value_block, o_values, o_value, m_owned, VALUE_DIM, BLOCK_VALUE)
        b_scores = score_tile(b_query, b_keys, 1.0, scale, CAPPED, False, PRECISION)
        i_begin = i_entry & -span
        if (i_begin != i_split) | (i_entry >= i_cut) | (i_entry < i_whole):
            m_reads = (b_start <= i_entry) | (i_entry < SINK_BLOCKS)
            m_seen = ((o_position - i_entry * BLOCK_TOKENS)[:, None] - o_tokens[None, :] >= 0) & m_reads[:, None]  # [M, B]
            b_scores = tl.where(m_seen, b_scores, float("-inf"))
            if i_begin != i_split:
                b_all_max, b_all_sum, b_all_acc = merge_rows(b_all_max, b_all_sum, b_all_acc, b_max, b_sum, b_acc)
                b_max = tl.full(b_max.shape, float("-inf"), tl.float32)  # Sum and accumulator begin anew: they are shrunk by 0.
        i_split = i_begin
        b_max, b_sum, b_acc = add_tile(b_scores, b_values, 1.0, b_max, b_sum, b_acc, scale, cap, CAPPED, False, PRECISION, b_query.dtype)
    return i_split, b_max, b_sum, b_acc, b_all_max, b_all_sum, b_all_acc


@triton.jit
def walk_visits(
    p_keys, p_values, p_key_scales, p_value_scales, p_table, p_indices, p_readers, visits, b_query, o_token, i_split, span,
    b_max, b_sum, b_acc, b_all_max, b_all_sum, b_all_acc, scale, cap,
    stride_key_block, stride_key_token, stride_value_block, stride_value_token, stride_scale_block,
    TOKENS: tl.constexpr, KEY_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_KEY: tl.constexpr, BLOCK_VALUE: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr, CAPPED: tl.constexpr, QUANTISED: tl.constexpr, NIBBLES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """As `walk_near`, after the tile's visits of far blocks, see `tile_visits.Visits`; rows are those of the tile's tokens o_token [M]."""
    o_tokens = tl.arange(0, BLOCK_TOKENS)
    # The next block's id and the index after it are loaded while this one is computed.
    i_here = tl.load(p_indices, mask=visits > 0, other=0)
    i_next = tl.load(p_table + i_here, mask=visits > 0, other=0)
    i_index = tl.load(p_indices + 1, mask=visits > 1, other=0)
    for i_visit in tl.range(0, visits, disable_licm=True):
        i_block = i_next.to(tl.int64)
        i_begin = i_here & -span
        i_here = i_index
        i_next = tl.load(p_table + i_index, mask=i_visit + 1 < visits, other=0)
        i_index = tl.load(p_indices + i_visit + 2, mask=i_visit + 2 < visits, other=0)
        i_readers = tl.load(p_readers + i_visit)
        b_keys, b_key_scale = load_scaled(
            p_keys + i_block * stride_key_block, p_key_scales + i_block * stride_scale_block, o_tokens, stride_key_token,
            KEY_DIM, BLOCK_KEY, QUANTISED, NIBBLES,
        )  # fmt: skip
        b_values = load_far(p_values + i_block * stride_value_block, o_tokens, stride_value_token, VALUE_DIM, BLOCK_VALUE, NIBBLES)
        b_scores = score_tile(b_query, b_keys, b_key_scale, scale, CAPPED, QUANTISED, PRECISION)
        # All ones where every token of a whole tile reads the block.
        if (i_begin != i_split) | (i_readers != (-1 if TOKENS == 32 else (1 << TOKENS) - 1)):
            b_scores = tl.where(((i_readers >> o_token) & 1 != 0)[:, None], b_scores, float("-inf"))
            if i_begin != i_split:
                b_all_max, b_all_sum, b_all_acc = merge_rows(b_all_max, b_all_sum, b_all_acc, b_max, b_sum, b_acc)
                b_max = tl.full(b_max.shape, float("-inf"), tl.float32)
        i_split = i_begin
        # Not before: the scales of a block's scores and of its weights would take registers at once.
        b_value_scale = tl.load(p_value_scales + i_block * stride_scale_block + o_tokens).to(tl.float32) if QUANTISED else 1.0
        b_max, b_sum, b_acc = add_tile(
            b_scores, b_values, b_value_scale, b_max, b_sum, b_acc, scale, cap, CAPPED, QUANTISED, PRECISION, b_query.dtype
        )
    return i_split, b_max, b_sum, b_acc, b_all_max, b_all_sum, b_all_acc


@triton.jit
def attend_lists(
    p_keys, p_values, p_table, p_far_keys, p_far_values, p_key_scales, p_value_scales, p_far_table, p_indices, p_readers, visits,
    b_query, o_position, o_token, first_position, last_position, scale, cap,
    stride_key_block, stride_key_token, stride_value_block, stride_value_token,
    stride_far_key_block, stride_far_key_token, stride_far_value_block, stride_far_value_token, stride_scale_block,
    ROWS: tl.constexpr, TOKENS: tl.constexpr, KEY_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_KEY: tl.constexpr,
    BLOCK_VALUE: tl.constexpr, BLOCK_TOKENS: tl.constexpr, SPLIT_BLOCKS: tl.constexpr, WINDOW: tl.constexpr, REFRESH: tl.constexpr,
    SINK_BLOCKS: tl.constexpr, HAS_FAR: tl.constexpr, BUDGET: tl.constexpr, CAPPED: tl.constexpr, QUANTISED: tl.constexpr,
    NIBBLES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The state of rows at o_position [ROWS], first_position … last_position, all of one block, after what they read."""
    b_max, b_sum, b_acc = start_rows(ROWS, BLOCK_VALUE)
    b_all_max, b_all_sum, b_all_acc, i_split = b_max, b_sum, b_acc, tl.cast(0, tl.int32)
    span = far_span(first_position, HAS_FAR, BUDGET, WINDOW, REFRESH, SINK_BLOCKS, BLOCK_TOKENS, SPLIT_BLOCKS)
    i_least = near_start(first_position, WINDOW, REFRESH, BLOCK_TOKENS)
    if SINK_BLOCKS > 0:
        i_split, b_max, b_sum, b_acc, b_all_max, b_all_sum, b_all_acc = walk_near(
            p_keys, p_values, p_table, b_query, o_position, tl.zeros([ROWS], tl.int32), first_position, last_position, i_split, span,
            b_max, b_sum, b_acc, b_all_max, b_all_sum, b_all_acc, 0, tl.minimum(i_least, SINK_BLOCKS), 0, scale, cap,
            stride_key_block, stride_key_token, stride_value_block, stride_value_token,
            KEY_DIM, VALUE_DIM, BLOCK_KEY, BLOCK_VALUE, BLOCK_TOKENS, SINK_BLOCKS, CAPPED, PRECISION,
        )  # fmt: skip
    if HAS_FAR:
        i_split, b_max, b_sum, b_acc, b_all_max, b_all_sum, b_all_acc = walk_visits(
            p_far_keys, p_far_values, p_key_scales, p_value_scales, p_far_table, p_indices, p_readers, visits, b_query, o_token,
            i_split, span, b_max, b_sum, b_acc, b_all_max, b_all_sum, b_all_acc, scale, cap,
            stride_far_key_block, stride_far_key_token, stride_far_value_block, stride_far_value_token, stride_scale_block,
            TOKENS, KEY_DIM, VALUE_DIM, BLOCK_KEY, BLOCK_VALUE, BLOCK_TOKENS, CAPPED, QUANTISED, NIBBLES, PRECISION,
        )  # fmt: skip
    # Where a window begins among the sinks, those that are left of them come with the near blocks.
    i_split, b_max, b_sum, b_acc, b_all_max, b_all_sum, b_all_acc = walk_near(
        p_keys, p_values, p_table, b_query, o_position, near_start(o_position, WINDOW, REFRESH, BLOCK_TOKENS),
        first_position, last_position, i_split, SPLIT_BLOCKS, b_max, b_sum, b_acc, b_all_max, b_all_sum, b_all_acc,
        i_least, last_position // BLOCK_TOKENS + 1, near_start(last_position, WINDOW, REFRESH, BLOCK_TOKENS), scale, cap,
        stride_key_block, stride_key_token, stride_value_block, stride_value_token,
        KEY_DIM, VALUE_DIM, BLOCK_KEY, BLOCK_VALUE, BLOCK_TOKENS, SINK_BLOCKS, CAPPED, PRECISION,
    )  # fmt: skip
    return merge_rows(b_all_max, b_all_sum, b_all_acc, b_max, b_sum, b_acc)


@kernel
def sparse_tile_kernel(
    p_query, p_keys, p_values, p_out, p_tables, p_query_starts, p_context_lengths, p_ends, p_sinks,
    p_far_keys, p_far_values, p_key_scales, p_value_scales, p_far_tables, p_indices, p_readers, p_visits,
    sequences, scale, cap, most_visits, stride_query_token, stride_query_head, stride_out_token, stride_out_head, stride_table,
    stride_key_block, stride_key_head, stride_key_token: tl.constexpr, stride_value_block, stride_value_head,
    stride_value_token: tl.constexpr, stride_far_key_block, stride_far_key_head, stride_far_key_token: tl.constexpr,
    stride_far_value_block, stride_far_value_head, stride_far_value_token: tl.constexpr, stride_scale_block, stride_scale_head,
    stride_far_table, SEQUENCES: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, TOKENS: tl.constexpr, KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr, BLOCK_KEY: tl.constexpr, BLOCK_VALUE: tl.constexpr, BLOCK_TOKENS: tl.constexpr, SPLIT_BLOCKS: tl.constexpr,
    WINDOW: tl.constexpr, REFRESH: tl.constexpr, SINK_BLOCKS: tl.constexpr, HAS_FAR: tl.constexpr, BUDGET: tl.constexpr,
    QUANTISED: tl.constexpr, NIBBLES: tl.constexpr, CAPPED: tl.constexpr, SINKS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program owns a tile's rows, TOKENS · GROUP of them, for one K/V head."""
    i_head, i_tile = tl.program_id(1).to(tl.int64), tl.program_id(0)
    i_sequence, i_origin, first_position, last_position = find_tile(
        p_ends, p_query_starts, p_context_lengths, i_tile, sequences, SEQUENCES, TOKENS
    )
    o_rows, o_key, o_value = tl.arange(0, ROWS), tl.arange(0, BLOCK_KEY), tl.arange(0, BLOCK_VALUE)
    o_head = i_head * GROUP + o_rows % GROUP
    o_token = tl.minimum(o_rows // GROUP, TOKENS - 1)
    # Rows past the last one are rows of the last token that nobody stores.
    o_position = tl.minimum(first_position + o_token, last_position)
    o_query = (i_origin + o_position).to(tl.int64) * stride_query_token + o_head * stride_query_head
    b_query = tl.load(p_query + o_query[:, None] + o_key[None, :], mask=(o_key < KEY_DIM)[None, :], other=0.0)  # [ROWS, BLOCK_KEY]
    i_place = i_tile.to(tl.int64) * tl.num_programs(1) + i_head
    visits = tl.load(p_visits + i_place) if HAS_FAR else 0
    i_visits = i_place * most_visits
    b_max, b_sum, b_acc = attend_lists(
        p_keys + i_head * stride_key_head, p_values + i_head * stride_value_head, p_tables + i_sequence.to(tl.int64) * stride_table,
        p_far_keys + i_head * stride_far_key_head, p_far_values + i_head * stride_far_value_head,
        p_key_scales + i_head * stride_scale_head, p_value_scales + i_head * stride_scale_head,
        p_far_tables + i_sequence.to(tl.int64) * stride_far_table, p_indices + i_visits, p_readers + i_visits, visits,
        b_query, o_position, o_token, first_position, last_position, scale, cap,
        stride_key_block, stride_key_token, stride_value_block, stride_value_token,
        stride_far_key_block, stride_far_key_token, stride_far_value_block, stride_far_value_token, stride_scale_block,
        ROWS, TOKENS, KEY_DIM, VALUE_DIM, BLOCK_KEY, BLOCK_VALUE, BLOCK_TOKENS, SPLIT_BLOCKS, WINDOW, REFRESH,
        SINK_BLOCKS, HAS_FAR, BUDGET, CAPPED, QUANTISED, NIBBLES, PRECISION,
    )  # fmt: skip
    _, i_origin, first_position, last_position = find_tile(p_ends, p_query_starts, p_context_lengths, i_tile, sequences, SEQUENCES, TOKENS)
    o_position = first_position + o_rows // GROUP
    m_out = (o_position <= last_position)[:, None] & (o_value < VALUE_DIM)[None, :]
    b_sinks = tl.load(p_sinks + o_head) if SINKS else 0.0
    o_out = ((i_origin + o_position).to(tl.int64) * stride_out_token + o_head * stride_out_head)[:, None] + o_value[None, :]
    tl.store(p_out + o_out, finish_rows(b_max, b_sum, b_acc, b_sinks, SINKS), mask=m_out)
