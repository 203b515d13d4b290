"""Kernels of dense paged attention for sequences with one query row: the splits of a row side by side, then their reduction.

Invariant: a split is 1 of the fixed pieces of a context, whatever the batch, so a row's bits do not depend on its company; the number
of work items is read on the device, so a launch recorded in a graph stays right when sequences grow.
"""

from __future__ import annotations

import triton.language as tl

from service.kernels.gpu.compiling import kernel
from service.kernels.gpu.dense_tiles import find_sequence, walk_blocks
from service.kernels.gpu.online_softmax import finish_rows, merge_rows, start_rows


@kernel
def decode_kernel(
    p_query, p_keys, p_values, p_out, p_tables, p_query_starts, p_context_lengths, p_split_ends, p_sinks, p_peaks, p_sums, p_parts,
    sequences, scale, cap, stride_query_token, stride_query_head, stride_out_token, stride_out_head, stride_table,
    stride_key_block, stride_key_head, stride_key_token: tl.constexpr, stride_value_block, stride_value_head,
    stride_value_token: tl.constexpr, SEQUENCES: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr, BLOCK_KEY: tl.constexpr, BLOCK_VALUE: tl.constexpr, BLOCK_TOKENS: tl.constexpr,
    SPLIT_BLOCKS: tl.constexpr, WINDOW: tl.constexpr, CAPPED: tl.constexpr, SINKS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program takes every num_programs-th work item, a (sequence, split), for one K/V head; its rows are the GROUP query heads.

    It loops over the split's blocks; queries, running maximum and sum, and the accumulator stay in registers. A row of one split is
    finished here; the others leave peaks and sums [items, Hq] and parts [items, Hq, Dv] in float32 for `reduce_kernel`.
    """
    i_head = tl.program_id(1).to(tl.int64)
    o_rows, o_key, o_value = tl.arange(0, ROWS), tl.arange(0, BLOCK_KEY), tl.arange(0, BLOCK_VALUE)
    m_rows, o_head = o_rows < GROUP, i_head * GROUP + o_rows
    m_out = m_rows[:, None] & (o_value < VALUE_DIM)[None, :]
    heads = tl.num_programs(1) * GROUP
    i_total, i_item = tl.load(p_split_ends + sequences - 1), tl.program_id(0)
    while i_item < i_total:
        i_sequence, i_first = find_sequence(p_split_ends, i_item, sequences, SEQUENCES)
        splits = tl.load(p_split_ends + i_sequence) - i_first
        position = tl.load(p_context_lengths + i_sequence) - 1
        i_row = tl.load(p_query_starts + i_sequence).to(tl.int64)
        o_query = i_row * stride_query_token + o_head * stride_query_head
        m_query = m_rows[:, None] & (o_key < KEY_DIM)[None, :]
        b_query = tl.load(p_query + o_query[:, None] + o_key[None, :], mask=m_query, other=0.0)  # [ROWS, BLOCK_KEY]
        i_end = tl.where(position < 0, 0, position // BLOCK_TOKENS + 1)
        i_start = tl.maximum(position - WINDOW + 1, 0) // BLOCK_TOKENS if WINDOW > 0 else 0
        i_split = i_start // SPLIT_BLOCKS + i_item - i_first
        b_max, b_sum, b_acc = start_rows(ROWS, BLOCK_VALUE)
        b_max, b_sum, b_acc, _, _, _ = walk_blocks(
            p_keys + i_head * stride_key_head, p_values + i_head * stride_value_head, p_tables + i_sequence.to(tl.int64) * stride_table,
            b_query, tl.where(m_rows, position, -1), position, position, b_max, b_sum, b_acc, b_max, b_sum, b_acc,
            tl.maximum(i_split * SPLIT_BLOCKS, i_start), tl.minimum((i_split + 1) * SPLIT_BLOCKS, i_end), 0, scale, cap,
            stride_key_block, stride_key_token, stride_value_block, stride_value_token,
            KEY_DIM, VALUE_DIM, BLOCK_KEY, BLOCK_VALUE, BLOCK_TOKENS, 0, WINDOW, CAPPED, PRECISION,
        )  # fmt: skip
        if splits == 1:
            b_sinks = tl.load(p_sinks + o_head, mask=m_rows, other=0.0) if SINKS else 0.0
            b_out = finish_rows(b_max, b_sum, b_acc, b_sinks, SINKS)
            b_out = tl.where(position < 0, 0.0, b_out)
            o_out = i_row * stride_out_token + o_head * stride_out_head
            tl.store(p_out + o_out[:, None] + o_value[None, :], b_out, mask=m_out)
        else:
            o_part = i_item.to(tl.int64) * heads + o_head
            tl.store(p_peaks + o_part, b_max, mask=m_rows)
            tl.store(p_sums + o_part, b_sum, mask=m_rows)
            tl.store(p_parts + o_part[:, None] * VALUE_DIM + o_value[None, :], b_acc, mask=m_out)
        i_item += tl.num_programs(0)


@kernel
def reduce_kernel(
    p_out, p_query_starts, p_split_ends, p_sinks, p_peaks, p_sums, p_parts, stride_out_token, stride_out_head,
    VALUE_DIM: tl.constexpr, BLOCK_VALUE: tl.constexpr, SINKS: tl.constexpr,
):  # fmt: skip
    """One program owns one sequence and one query head: it merges the parts of its splits in ascending order and finishes the row."""
    i_sequence, i_head, heads = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    o_value = tl.arange(0, BLOCK_VALUE)
    i_from = tl.load(p_split_ends + i_sequence - 1, mask=i_sequence > 0, other=0)
    i_to = tl.load(p_split_ends + i_sequence)
    if i_to - i_from > 1:
        b_max, b_sum, b_acc = start_rows(1, BLOCK_VALUE)
        for i_item in range(i_from, i_to):
            o_part = (tl.zeros([1], tl.int64) + i_item) * heads + i_head
            b_part = tl.load(p_parts + o_part[:, None] * VALUE_DIM + o_value[None, :], mask=(o_value < VALUE_DIM)[None, :], other=0.0)
            b_max, b_sum, b_acc = merge_rows(b_max, b_sum, b_acc, tl.load(p_peaks + o_part), tl.load(p_sums + o_part), b_part)
        b_sinks = tl.load(p_sinks + i_head + tl.zeros([1], tl.int64)) if SINKS else 0.0
        b_out = finish_rows(b_max, b_sum, b_acc, b_sinks, SINKS)
        i_row = tl.load(p_query_starts + i_sequence).to(tl.int64)
        o_out = i_row * stride_out_token + i_head.to(tl.int64) * stride_out_head
        tl.store(p_out + o_out + o_value[None, :], b_out, mask=(o_value < VALUE_DIM)[None, :])
