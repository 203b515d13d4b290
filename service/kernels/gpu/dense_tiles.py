"""Kernels of dense paged attention: prefill tiles, split decode rows, and the reduction over a row's splits.

They walk block tables and write outputs; shapes are checked, plans are made and grids are chosen in `paged_attention.py`. Invariant: only
blocks that some row of a program sees are read, and in them only positions of the sequence; splits begin at multiples of SPLIT_BLOCKS.
"""

from __future__ import annotations

import triton
import triton.language as tl

from service.kernels.gpu.online_softmax import attend_tile, finish_rows, merge_rows, start_rows


@triton.jit
def find_sequence(p_ends, i_item, sequences, SEQUENCES: tl.constexpr):
    """(sequence that owns work item i, the first item of that sequence), from the running totals p_ends [sequences]."""
    o_sequences = tl.arange(0, SEQUENCES)
    b_ends = tl.load(p_ends + o_sequences, mask=o_sequences < sequences, other=2147483647)
    return tl.sum((b_ends <= i_item).to(tl.int32)), tl.max(tl.where(b_ends <= i_item, b_ends, 0))


@triton.jit
def load_block(p_block, o_block, o_dim, m_tokens, DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, MASKED: tl.constexpr):
    """One head's [BLOCK_TOKENS, BLOCK_DIM] of a block; 0 beyond DIM and, when MASKED, for tokens not in m_tokens."""
    if MASKED:
        m_block = m_tokens[:, None] if DIM == BLOCK_DIM else m_tokens[:, None] & (o_dim < DIM)[None, :]
        return tl.load(p_block + o_block, mask=m_block, other=0.0)
    if DIM == BLOCK_DIM:
        return tl.load(p_block + o_block)
    return tl.load(p_block + o_block, mask=(o_dim < DIM)[None, :], other=0.0)


@triton.jit
def walk_blocks(
    p_keys, p_values, p_table, b_query, o_position, first_position, last_position, b_max, b_sum, b_acc, i_from, i_to, scale, cap,
    stride_key_block, stride_key_token, stride_value_block, stride_value_token,
    KEY_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_KEY: tl.constexpr, BLOCK_VALUE: tl.constexpr, BLOCK_TOKENS: tl.constexpr,
    WINDOW: tl.constexpr, CAPPED: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The rows' state after table entries i_from … i_to − 1; rows stand at o_position [M]. Without MASKED all rows see all of them.

    The id of the next block is loaded while this one is computed: a table load inside the loop would cost the pipeline its buffers.
    """
    o_tokens = tl.arange(0, BLOCK_TOKENS)
    o_key, o_value = tl.arange(0, BLOCK_KEY), tl.arange(0, BLOCK_VALUE)
    o_keys = o_tokens[:, None] * stride_key_token + o_key[None, :]
    o_values = o_tokens[:, None] * stride_value_token + o_value[None, :]
    i_next = tl.load(p_table + i_from, mask=i_from < i_to, other=0).to(tl.int64)
    # Few blocks are cut: buffers for them would only take registers from the others, as would invariants moved out of the three loops.
    for i_entry in tl.range(i_from, i_to, num_stages=1 if MASKED else None, disable_licm=True):
        i_block = i_next
        i_next = tl.load(p_table + i_entry + 1, mask=i_entry + 1 < i_to, other=0).to(tl.int64)
        m_seen = True
        if MASKED:
            o_at = i_entry * BLOCK_TOKENS + o_tokens
            m_seen = o_at[None, :] <= o_position[:, None]  # [M, B]
            if WINDOW > 0:
                m_seen = m_seen & (o_at[None, :] > o_position[:, None] - WINDOW)
            # A value that nobody sees may be NaN, which a weight of 0 would keep.
            m_owned = (o_at <= last_position) & (o_at > first_position - WINDOW) if WINDOW > 0 else o_at <= last_position
        else:
            m_owned = True
        b_keys = load_block(p_keys + i_block * stride_key_block, o_keys, o_key, m_owned, KEY_DIM, BLOCK_KEY, MASKED)
        b_values = load_block(p_values + i_block * stride_value_block, o_values, o_value, m_owned, VALUE_DIM, BLOCK_VALUE, MASKED)
        b_max, b_sum, b_acc = attend_tile(
            b_query, b_keys, b_values, 1.0, 1.0, m_seen, b_max, b_sum, b_acc, scale, cap, CAPPED, MASKED, False, PRECISION
        )
    return b_max, b_sum, b_acc


@triton.jit
def attend_split(
    p_keys, p_values, p_table, b_query, o_position, i_from, i_to, first_position, last_position, scale, cap,
    stride_key_block, stride_key_token, stride_value_block, stride_value_token,
    ROWS: tl.constexpr, KEY_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_KEY: tl.constexpr, BLOCK_VALUE: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr, WINDOW: tl.constexpr, CAPPED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The state of rows at positions first_position … last_position after entries i_from … i_to − 1 of one split.

    Masks are computed only where they cut: at the window's start and at the end; what lies between is seen whole by every row.
    """
    b_max, b_sum, b_acc = start_rows(ROWS, BLOCK_VALUE)
    i_whole = i_from
    if WINDOW > 0:
        i_whole = tl.minimum(tl.maximum(tl.cdiv(tl.maximum(last_position - WINDOW + 1, 0), BLOCK_TOKENS), i_from), i_to)
        b_max, b_sum, b_acc = walk_blocks(
            p_keys, p_values, p_table, b_query, o_position, first_position, last_position, b_max, b_sum, b_acc, i_from, i_whole, scale, cap,
            stride_key_block, stride_key_token, stride_value_block, stride_value_token,
            KEY_DIM, VALUE_DIM, BLOCK_KEY, BLOCK_VALUE, BLOCK_TOKENS, WINDOW, CAPPED, True, PRECISION,
        )  # fmt: skip
    i_cut = tl.minimum(tl.maximum((first_position + 1) // BLOCK_TOKENS, i_whole), i_to)
    b_max, b_sum, b_acc = walk_blocks(
        p_keys, p_values, p_table, b_query, o_position, first_position, last_position, b_max, b_sum, b_acc, i_whole, i_cut, scale, cap,
        stride_key_block, stride_key_token, stride_value_block, stride_value_token,
        KEY_DIM, VALUE_DIM, BLOCK_KEY, BLOCK_VALUE, BLOCK_TOKENS, WINDOW, CAPPED, False, PRECISION,
    )  # fmt: skip
    b_max, b_sum, b_acc = walk_blocks(
        p_keys, p_values, p_table, b_query, o_position, first_position, last_position, b_max, b_sum, b_acc, i_cut, i_to, scale, cap,
        stride_key_block, stride_key_token, stride_value_block, stride_value_token,
        KEY_DIM, VALUE_DIM, BLOCK_KEY, BLOCK_VALUE, BLOCK_TOKENS, WINDOW, CAPPED, True, PRECISION,
    )  # fmt: skip
    return b_max, b_sum, b_acc


@triton.jit
def prefill_kernel(
    p_query, p_keys, p_values, p_out, p_tables, p_query_starts, p_context_lengths, p_tile_ends, p_sinks, sequences, scale, cap,
    stride_query_token, stride_query_head, stride_out_token, stride_out_head, stride_table,
    stride_key_block, stride_key_head, stride_key_token, stride_value_block, stride_value_head, stride_value_token,
    SEQUENCES: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, KEY_DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    BLOCK_KEY: tl.constexpr, BLOCK_VALUE: tl.constexpr, BLOCK_TOKENS: tl.constexpr, SPLIT_BLOCKS: tl.constexpr,
    WINDOW: tl.constexpr, CAPPED: tl.constexpr, SINKS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program owns a tile of query rows of one sequence and one K/V head: ROWS // GROUP tokens times the GROUP heads that share it.

    It loops over the splits that its rows see and, in each, over blocks; queries and two float32 accumulators (this split's and the one
    of the splits before it) stay in registers.
    """
    i_head = tl.program_id(1).to(tl.int64)
    i_sequence, i_first_tile = find_sequence(p_tile_ends, tl.program_id(0), sequences, SEQUENCES)
    i_row = tl.load(p_query_starts + i_sequence)
    count = tl.load(p_query_starts + i_sequence + 1) - i_row
    shift = tl.load(p_context_lengths + i_sequence) - count  # position = token + shift
    i_token = (tl.program_id(0) - i_first_tile) * (ROWS // GROUP)
    o_rows, o_key, o_value = tl.arange(0, ROWS), tl.arange(0, BLOCK_KEY), tl.arange(0, BLOCK_VALUE)
    o_token, o_head = i_token + o_rows // GROUP, i_head * GROUP + o_rows % GROUP
    m_rows = (o_rows < (ROWS // GROUP) * GROUP) & (o_token < count)
    o_position = tl.where(m_rows, o_token + shift, -1)
    o_query = (i_row + o_token).to(tl.int64) * stride_query_token + o_head * stride_query_head
    m_query = m_rows[:, None] & (o_key < KEY_DIM)[None, :]
    b_query = tl.load(p_query + o_query[:, None] + o_key[None, :], mask=m_query, other=0.0)  # [ROWS, BLOCK_KEY]
    first_position, last_position = i_token + shift, tl.minimum(i_token + ROWS // GROUP, count) - 1 + shift
    i_end = tl.where(last_position < 0, 0, last_position // BLOCK_TOKENS + 1)
    i_start = tl.maximum(first_position - WINDOW + 1, 0) // BLOCK_TOKENS if WINDOW > 0 else 0
    b_max, b_sum, b_acc = start_rows(ROWS, BLOCK_VALUE)
    for i_split in range(i_start // SPLIT_BLOCKS, tl.cdiv(i_end, SPLIT_BLOCKS)):
        b_split_max, b_split_sum, b_split_acc = attend_split(
            p_keys + i_head * stride_key_head, p_values + i_head * stride_value_head, p_tables + i_sequence.to(tl.int64) * stride_table,
            b_query, o_position, tl.maximum(i_split * SPLIT_BLOCKS, i_start), tl.minimum((i_split + 1) * SPLIT_BLOCKS, i_end),
            tl.maximum(first_position, -1), last_position, scale, cap,
            stride_key_block, stride_key_token, stride_value_block, stride_value_token,
            ROWS, KEY_DIM, VALUE_DIM, BLOCK_KEY, BLOCK_VALUE, BLOCK_TOKENS, WINDOW, CAPPED, PRECISION,
        )  # fmt: skip
        b_max, b_sum, b_acc = merge_rows(b_max, b_sum, b_acc, b_split_max, b_split_sum, b_split_acc)
    b_sinks = tl.load(p_sinks + o_head) * 1.4426950408889634 if SINKS else 0.0
    b_out = finish_rows(b_max, b_sum, b_acc, b_sinks, SINKS)
    b_out = tl.where((o_position >= 0)[:, None], b_out, 0.0)
    o_out = (i_row + o_token).to(tl.int64) * stride_out_token + o_head * stride_out_head
    tl.store(p_out + o_out[:, None] + o_value[None, :], b_out, mask=m_rows[:, None] & (o_value < VALUE_DIM)[None, :])
