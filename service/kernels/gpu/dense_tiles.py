"""Kernels of dense paged attention: the walk over a block table that tiles and decode rows share, and the prefill tiles.

They write outputs; shapes are checked, plans are made and grids are chosen in `paged_attention.py`. Invariant: only blocks that some row of
a program sees are read, and in them only positions of the sequence; splits begin at multiples of SPLIT_BLOCKS.
"""

from __future__ import annotations

import triton
import triton.language as tl

from service.kernels.gpu.compiling import kernel
from service.kernels.gpu.online_softmax import add_tile, finish_rows, merge_rows, score_tile, start_rows


@triton.jit
def find_sequence(p_ends, i_item, sequences, SEQUENCES: tl.constexpr):
    """(sequence that owns work item i, the first item of that sequence), from the running totals p_ends [sequences]."""
    o_sequences = tl.arange(0, SEQUENCES)
    b_ends = tl.load(p_ends + o_sequences, mask=o_sequences < sequences, other=2147483647)
    return tl.sum((b_ends <= i_item).to(tl.int32)), tl.max(tl.where(b_ends <= i_item, b_ends, 0))


@triton.jit
def load_block(p_block, o_block, o_dim, m_tokens, DIM: tl.constexpr, BLOCK_DIM: tl.constexpr):
    """One head's [BLOCK_TOKENS, BLOCK_DIM] of a block; 0 beyond DIM and for tokens not in m_tokens."""
    m_block = m_tokens[:, None] if DIM == BLOCK_DIM else m_tokens[:, None] & (o_dim < DIM)[None, :]
    return tl.load(p_block + o_block, mask=m_block, other=0.0)


@triton.jit
def walk_blocks(
    p_keys, p_values, p_table, b_query, o_position, first_position, last_position, b_max, b_sum, b_acc, b_all_max, b_all_sum, b_all_acc,
    i_from, i_to, i_list, scale, cap, stride_key_block, stride_key_token, stride_value_block, stride_value_token,
    KEY_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_KEY: tl.constexpr, BLOCK_VALUE: tl.constexpr, BLOCK_TOKENS: tl.constexpr,
    SPLIT_BLOCKS: tl.constexpr, WINDOW: tl.constexpr, CAPPED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The states after table entries i_from … i_to − 1 of rows that stand at o_position [M], first_position … last_position.

    One is that of the split at hand, the other, "all", that of the splits before it; the first is merged into the second and begins anew
    where entry + i_list is a multiple of SPLIT_BLOCKS (with 0: nowhere). One loop, so that blocks are fetched ahead across splits. What few
    blocks need, the mask and the merge, lies in one branch between the two products: it uses the scores, so it cannot be moved before the
    first of them, which must not wait for the second one of the block before.
    """
    o_tokens = tl.arange(0, BLOCK_TOKENS)
    o_key, o_value = tl.arange(0, BLOCK_KEY), tl.arange(0, BLOCK_VALUE)
    # Unsigned: the upper halves of signed offsets would take a register each.
    o_keys = (o_tokens[:, None] * stride_key_token + o_key[None, :]).to(tl.uint32)
    o_values = (o_tokens[:, None] * stride_value_token + o_value[None, :]).to(tl.uint32)
    i_cut = (first_position + 1) // BLOCK_TOKENS
    i_whole = tl.cdiv(tl.maximum(last_position - WINDOW + 1, 0), BLOCK_TOKENS) if WINDOW > 0 else i_from
    # The next block's id is loaded while this one is computed. As int32: widened, it would be loaded when it is needed.
    i_next = tl.load(p_table + i_from, mask=i_from < i_to, other=0)
    for i_entry in tl.range(i_from, i_to, disable_licm=True):
        i_block = i_next.to(tl.int64)
        i_next = tl.load(p_table + i_entry + 1, mask=i_entry + 1 < i_to, other=0)
        # A value that nobody sees may be NaN, which a weight of 0 would keep.
        o_left = last_position - i_entry * BLOCK_TOKENS - o_tokens
        m_owned = o_left.to(tl.uint32) < (last_position - first_position + WINDOW).to(tl.uint32) if WINDOW > 0 else o_left >= 0
        b_keys = load_block(p_keys + i_block * stride_key_block, o_keys, o_key, m_owned, KEY_DIM, BLOCK_KEY)
        b_values = load_block(p_values + i_block * stride_value_block, o_values, o_value, m_owned, VALUE_DIM, BLOCK_VALUE)
        b_scores = score_tile(b_query, b_keys, 1.0, scale, CAPPED, False, PRECISION)
        m_split = (i_entry + i_list) % SPLIT_BLOCKS == 0 if SPLIT_BLOCKS > 0 else False
        if m_split | (i_entry >= i_cut) | (i_entry < i_whole):
            o_back = (o_position - i_entry * BLOCK_TOKENS)[:, None] - o_tokens[None, :]  # [M, B]
            m_seen = o_back.to(tl.uint32) < WINDOW if WINDOW > 0 else o_back >= 0
            b_scores = tl.where(m_seen, b_scores, float("-inf"))
            if m_split:
                b_all_max, b_all_sum, b_all_acc = merge_rows(b_all_max, b_all_sum, b_all_acc, b_max, b_sum, b_acc)
                b_max = tl.full(b_max.shape, float("-inf"), tl.float32)  # Sum and accumulator begin anew: they are shrunk by 0.
        b_max, b_sum, b_acc = add_tile(b_scores, b_values, 1.0, b_max, b_sum, b_acc, scale, cap, CAPPED, False, PRECISION, b_query.dtype)
    return b_max, b_sum, b_acc, b_all_max, b_all_sum, b_all_acc


@triton.jit
def tile_rows(p_query_starts, p_context_lengths, i_sequence, i_token, ROWS: tl.constexpr, GROUP: tl.constexpr):
    """(rows of queries [ROWS], which of them there are, their positions or −1, first position, last one) of a tile from token i_token on.

    Volatile, so that what is found again after a loop is not kept in registers through it.
    """
    i_row = tl.load(p_query_starts + i_sequence, volatile=True)
    count = tl.load(p_query_starts + i_sequence + 1, volatile=True) - i_row
    shift = tl.load(p_context_lengths + i_sequence, volatile=True) - count  # position = token + shift
    o_rows = tl.arange(0, ROWS)
    o_token = i_token + o_rows // GROUP
    m_rows = (o_rows < (ROWS // GROUP) * GROUP) & (o_token < count)
    o_position = tl.where(m_rows, o_token + shift, -1)
    return (i_row + o_token).to(tl.int64), m_rows, o_position, i_token + shift, tl.minimum(i_token + ROWS // GROUP, count) - 1 + shift


@kernel
def prefill_kernel(
    p_query, p_keys, p_values, p_out, p_tables, p_query_starts, p_context_lengths, p_tile_ends, p_sinks, sequences, scale, cap,
    stride_query_token, stride_query_head, stride_out_token, stride_out_head, stride_table,
    stride_key_block, stride_key_head, stride_key_token: tl.constexpr, stride_value_block, stride_value_head,
    stride_value_token: tl.constexpr,
    SEQUENCES: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, KEY_DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    BLOCK_KEY: tl.constexpr, BLOCK_VALUE: tl.constexpr, BLOCK_TOKENS: tl.constexpr, SPLIT_BLOCKS: tl.constexpr,
    WINDOW: tl.constexpr, CAPPED: tl.constexpr, SINKS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program owns a tile of query rows of one sequence and one K/V head: ROWS // GROUP tokens times the GROUP heads that share it.

    It loops over the blocks that its rows see; two float32 accumulators, of the split at hand and of those before it, stay in registers.
    """
    i_head = tl.program_id(1).to(tl.int64)
    i_tile = tl.num_programs(0) - 1 - tl.program_id(0)  # The last tiles of a sequence see most, so they start first.
    i_sequence, i_first_tile = find_sequence(p_tile_ends, i_tile, sequences, SEQUENCES)
    i_token = (i_tile - i_first_tile) * (ROWS // GROUP)
    o_head = i_head * GROUP + tl.arange(0, ROWS) % GROUP
    o_key, o_value = tl.arange(0, BLOCK_KEY), tl.arange(0, BLOCK_VALUE)
    o_row, m_rows, o_position, first_position, last_position = tile_rows(
        p_query_starts, p_context_lengths, i_sequence, i_token, ROWS, GROUP
    )
    o_query = o_row * stride_query_token + o_head * stride_query_head
    m_query = m_rows[:, None] & (o_key < KEY_DIM)[None, :]
    b_query = tl.load(p_query + o_query[:, None] + o_key[None, :], mask=m_query, other=0.0)  # [ROWS, BLOCK_KEY]
    i_start = tl.maximum(first_position - WINDOW + 1, 0) // BLOCK_TOKENS if WINDOW > 0 else 0
    # One block at least, all of it masked where rows see nothing: around a loop that may be empty the assembler lets products wait.
    i_end = tl.maximum(last_position // BLOCK_TOKENS, i_start) + 1
    tl.assume(i_start < i_end)
    b_max, b_sum, b_acc = start_rows(ROWS, BLOCK_VALUE)
    b_max, b_sum, b_acc, b_all_max, b_all_sum, b_all_acc = walk_blocks(
        p_keys + i_head * stride_key_head, p_values + i_head * stride_value_head, p_tables + i_sequence.to(tl.int64) * stride_table,
        b_query, o_position, first_position, last_position, b_max, b_sum, b_acc, b_max, b_sum, b_acc, i_start, i_end, 0,
        scale, cap, stride_key_block, stride_key_token, stride_value_block, stride_value_token,
        KEY_DIM, VALUE_DIM, BLOCK_KEY, BLOCK_VALUE, BLOCK_TOKENS, SPLIT_BLOCKS, WINDOW, CAPPED, PRECISION,
    )  # fmt: skip
    b_max, b_sum, b_acc = merge_rows(b_all_max, b_all_sum, b_all_acc, b_max, b_sum, b_acc)
    o_row, m_rows, o_position, _, _ = tile_rows(p_query_starts, p_context_lengths, i_sequence, i_token, ROWS, GROUP)
    b_sinks = tl.load(p_sinks + o_head) if SINKS else 0.0
    b_out = tl.where((o_position >= 0)[:, None], finish_rows(b_max, b_sum, b_acc, b_sinks, SINKS), 0.0)
    o_out = o_row * stride_out_token + o_head * stride_out_head
    tl.store(p_out + o_out[:, None] + o_value[None, :], b_out, mask=m_rows[:, None] & (o_value < VALUE_DIM)[None, :])
