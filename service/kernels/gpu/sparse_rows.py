"""Kernel of attention over two stores for decoding rows: the splits of what a row reads side by side.

A row reads sinks, chosen far blocks upwards, and the near blocks from the window's start; its splits are those of a prompt's tile
(`sparse_tiles.far_span`). Invariant: what a program reads, and in which order, is a function of its row's position and of the choice made
at its anchor; shapes and plans are the business of `window_sparse.py`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from service.kernels.gpu.compiling import kernel
from service.kernels.gpu.dense_tiles import find_sequence, walk_blocks
from service.kernels.gpu.online_softmax import add_tile, score_tile, start_rows
from service.kernels.gpu.sparse_tiles import far_span, load_scaled, near_start


@triton.jit
def walk_far(
    p_keys, p_values, p_key_scales, p_value_scales, p_table, p_choices, b_query, b_max, b_sum, b_acc, i_from, i_to, scale, cap,
    stride_key_block, stride_key_token, stride_value_block, stride_value_token, stride_scale_block,
    KEY_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_KEY: tl.constexpr, BLOCK_VALUE: tl.constexpr, BLOCK_TOKENS: tl.constexpr,
    CAPPED: tl.constexpr, QUANTISED: tl.constexpr, NIBBLES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The rows' state after choices i_from … i_to − 1, each a whole block that all rows see."""
    o_tokens = tl.arange(0, BLOCK_TOKENS)
    # The next block's id and the index after it are loaded while this one is computed.
    i_next = tl.load(p_table + tl.load(p_choices + i_from, mask=i_from < i_to, other=0), mask=i_from < i_to, other=0)
    i_index = tl.load(p_choices + i_from + 1, mask=i_from + 1 < i_to, other=0)
    for i_choice in tl.range(i_from, i_to, disable_licm=True):
        i_block = i_next.to(tl.int64)
        i_next = tl.load(p_table + i_index, mask=i_choice + 1 < i_to, other=0)
        i_index = tl.load(p_choices + i_choice + 2, mask=i_choice + 2 < i_to, other=0)
        b_keys, b_key_scale = load_scaled(
            p_keys + i_block * stride_key_block, p_key_scales + i_block * stride_scale_block, o_tokens, stride_key_token,
            KEY_DIM, BLOCK_KEY, QUANTISED, NIBBLES,
        )  # fmt: skip
        b_values, b_value_scale = load_scaled(
            p_values + i_block * stride_value_block, p_value_scales + i_block * stride_scale_block, o_tokens, stride_value_token,
            VALUE_DIM, BLOCK_VALUE, QUANTISED, NIBBLES,
        )  # fmt: skip
        b_scores = score_tile(b_query, b_keys, b_key_scale, scale, CAPPED, QUANTISED, PRECISION)
        b_max, b_sum, b_acc = add_tile(
            b_scores, b_values, b_value_scale, b_max, b_sum, b_acc, scale, cap, CAPPED, QUANTISED, PRECISION, b_query.dtype
        )
    return b_max, b_sum, b_acc


@triton.jit
def attend_split(
    p_keys, p_values, p_table, p_far_keys, p_far_values, p_key_scales, p_value_scales, p_far_table, p_choices,
    b_query, o_position, position, i_sink, i_sinks, i_choice, i_choices, i_near, i_nears, scale, cap,
    stride_key_block, stride_key_token, stride_value_block, stride_value_token,
    stride_far_key_block, stride_far_key_token, stride_far_value_block, stride_far_value_token, stride_scale_block,
    ROWS: tl.constexpr, KEY_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_KEY: tl.constexpr, BLOCK_VALUE: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr, CAPPED: tl.constexpr, QUANTISED: tl.constexpr, NIBBLES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The state of the rows at `position` after sinks i_sink … i_sinks − 1, choices i_choice … i_choices − 1, and near blocks i_near …
    i_nears − 1."""
    b_max, b_sum, b_acc = start_rows(ROWS, BLOCK_VALUE)
    b_max, b_sum, b_acc, _, _, _ = walk_blocks(
        p_keys, p_values, p_table, b_query, o_position, position, position, b_max, b_sum, b_acc, b_max, b_sum, b_acc,
        i_sink, i_sinks, 0, scale, cap, stride_key_block, stride_key_token, stride_value_block, stride_value_token,
        KEY_DIM, VALUE_DIM, BLOCK_KEY, BLOCK_VALUE, BLOCK_TOKENS, 0, 0, CAPPED, PRECISION,
    )  # fmt: skip
    b_max, b_sum, b_acc = walk_far(
        p_far_keys, p_far_values, p_key_scales, p_value_scales, p_far_table, p_choices, b_query, b_max, b_sum, b_acc,
        i_choice, i_choices, scale, cap,
        stride_far_key_block, stride_far_key_token, stride_far_value_block, stride_far_value_token, stride_scale_block,
        KEY_DIM, VALUE_DIM, BLOCK_KEY, BLOCK_VALUE, BLOCK_TOKENS, CAPPED, QUANTISED, NIBBLES, PRECISION,
    )  # fmt: skip
    b_max, b_sum, b_acc, _, _, _ = walk_blocks(
        p_keys, p_values, p_table, b_query, o_position, position, position, b_max, b_sum, b_acc, b_max, b_sum, b_acc,
        i_near, i_nears, 0, scale, cap, stride_key_block, stride_key_token, stride_value_block, stride_value_token,
        KEY_DIM, VALUE_DIM, BLOCK_KEY, BLOCK_VALUE, BLOCK_TOKENS, 0, 0, CAPPED, PRECISION,
    )  # fmt: skip
    return b_max, b_sum, b_acc


@triton.jit
def find_split(
    i_item, position, i_start, span, HAS_FAR: tl.constexpr, SINK_BLOCKS: tl.constexpr, BLOCK_TOKENS: tl.constexpr,
    SPLIT_BLOCKS: tl.constexpr,
):  # fmt: skip
    """(first block and end among sinks and far blocks, first block and end among near ones) of split i_item of the row at `position`.

    Splits before the window come first; the last of them goes on in the window where the first of those begins at the same block.
    """
    i_end = i_start if HAS_FAR else tl.minimum(i_start, SINK_BLOCKS)
    before, i_group = tl.cdiv(i_end, span), i_start // SPLIT_BLOCKS
    i_group += i_item - before + ((before > 0) & ((before - 1) * span == i_group * SPLIT_BLOCKS)).to(tl.int32)
    i_blocks = tl.where(position < 0, 0, position // BLOCK_TOKENS + 1)
    i_near, i_nears = tl.maximum(i_group * SPLIT_BLOCKS, i_start), tl.minimum((i_group + 1) * SPLIT_BLOCKS, i_blocks)
    return i_item * span, tl.minimum((i_item + 1) * span, i_end), i_near, i_nears


@triton.jit
def find_choices(p_anchors, p_counts, p_choices, i_row, i_from, i_to, stride_choice_anchor, COUNTED: tl.constexpr):
    """(the choices of a row, ascending, and which of them are blocks i_from … i_to − 1: the first and the end)."""
    i_anchor = tl.load(p_anchors + i_row).to(tl.int64)
    chosen = tl.load(p_counts + i_anchor, mask=i_anchor >= 0, other=0)
    p_choices += i_anchor * stride_choice_anchor
    i_choice, i_choices = tl.cast(0, tl.int32), tl.cast(0, tl.int32)
    for i_some in range(0, chosen, COUNTED):
        o_choice = i_some + tl.arange(0, COUNTED)
        b_index = tl.load(p_choices + o_choice, mask=o_choice < chosen, other=2147483647)
        i_choice += tl.sum((b_index < i_from).to(tl.int32))
        i_choices += tl.sum((b_index < i_to).to(tl.int32))
    return p_choices, i_choice, i_choices


@kernel
def sparse_row_kernel(
    p_query, p_keys, p_values, p_tables, p_query_starts, p_context_lengths, p_ends, p_peaks, p_sums, p_parts,
    p_far_keys, p_far_values, p_key_scales, p_value_scales, p_counts, p_anchors, p_far_tables, p_choices, sequences, scale, cap,
    stride_query_token, stride_query_head, stride_table, stride_key_block, stride_key_head, stride_key_token: tl.constexpr,
    stride_value_block, stride_value_head, stride_value_token: tl.constexpr, stride_far_key_block, stride_far_key_head,
    stride_far_key_token: tl.constexpr, stride_far_value_block, stride_far_value_head, stride_far_value_token: tl.constexpr,
    stride_scale_block, stride_scale_head, stride_far_table, stride_choice_anchor, stride_choice_head,
    SEQUENCES: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr,
    KEY_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_KEY: tl.constexpr, BLOCK_VALUE: tl.constexpr, BLOCK_TOKENS: tl.constexpr,
    SPLIT_BLOCKS: tl.constexpr, WINDOW: tl.constexpr, REFRESH: tl.constexpr, SINK_BLOCKS: tl.constexpr, HAS_FAR: tl.constexpr,
    BUDGET: tl.constexpr, QUANTISED: tl.constexpr, NIBBLES: tl.constexpr, CAPPED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program owns one split of one decoding row and one K/V head; it leaves peaks and sums [items, Hq] and parts [items, Hq, Dv] for
    `reduce_kernel`, empty where the row has fewer splits."""
    i_head = tl.program_id(1).to(tl.int64)
    i_sequence, i_first = find_sequence(p_ends, tl.program_id(0), sequences, SEQUENCES)
    i_item = tl.program_id(0) - i_first
    i_row = tl.load(p_query_starts + i_sequence).to(tl.int64)
    position = tl.load(p_context_lengths + i_sequence) - 1
    o_rows, o_key, o_value = tl.arange(0, ROWS), tl.arange(0, BLOCK_KEY), tl.arange(0, BLOCK_VALUE)
    m_rows, o_head = o_rows < GROUP, i_head * GROUP + o_rows
    o_query = (i_row * stride_query_token + o_head * stride_query_head)[:, None] + o_key[None, :]
    b_query = tl.load(p_query + o_query, mask=m_rows[:, None] & (o_key < KEY_DIM)[None, :], other=0.0)  # [ROWS, BLOCK_KEY]
    i_start = near_start(position, WINDOW, REFRESH, BLOCK_TOKENS)
    span = far_span(position, HAS_FAR, BUDGET, WINDOW, REFRESH, SINK_BLOCKS, BLOCK_TOKENS, SPLIT_BLOCKS)
    i_far, i_end, i_near, i_nears = find_split(i_item, position, i_start, span, HAS_FAR, SINK_BLOCKS, BLOCK_TOKENS, SPLIT_BLOCKS)
    b_max, b_sum, b_acc = start_rows(ROWS, BLOCK_VALUE)
    # A row may have fewer splits than are launched; what loops do before their first block is not little.
    if (i_far < i_end) | (i_near < i_nears):
        p_choices, i_choice, i_choices = p_choices + i_head * stride_choice_head, tl.cast(0, tl.int32), tl.cast(0, tl.int32)
        if HAS_FAR:
            p_choices, i_choice, i_choices = find_choices(p_anchors, p_counts, p_choices, i_row, i_far, i_end, stride_choice_anchor, 32)
        b_max, b_sum, b_acc = attend_split(
            p_keys + i_head * stride_key_head, p_values + i_head * stride_value_head, p_tables + i_sequence.to(tl.int64) * stride_table,
            p_far_keys + i_head * stride_far_key_head, p_far_values + i_head * stride_far_value_head,
            p_key_scales + i_head * stride_scale_head, p_value_scales + i_head * stride_scale_head,
            p_far_tables + i_sequence.to(tl.int64) * stride_far_table, p_choices, b_query, tl.where(m_rows, position, -1), position,
            i_far, tl.minimum(i_end, SINK_BLOCKS), i_choice, i_choices, i_near, i_nears, scale, cap,
            stride_key_block, stride_key_token, stride_value_block, stride_value_token,
            stride_far_key_block, stride_far_key_token, stride_far_value_block, stride_far_value_token, stride_scale_block,
            ROWS, KEY_DIM, VALUE_DIM, BLOCK_KEY, BLOCK_VALUE, BLOCK_TOKENS, CAPPED, QUANTISED, NIBBLES, PRECISION,
        )  # fmt: skip
    o_part = tl.program_id(0).to(tl.int64) * (tl.num_programs(1) * GROUP) + o_head
    tl.store(p_peaks + o_part, b_max, mask=m_rows)
    tl.store(p_sums + o_part, b_sum, mask=m_rows)
    tl.store(p_parts + o_part[:, None] * VALUE_DIM + o_value[None, :], b_acc, mask=m_rows[:, None] & (o_value < VALUE_DIM)[None, :])
