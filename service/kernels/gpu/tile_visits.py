"""Which far blocks a tile of tokens visits: every block that some of them read, upwards, and which tokens those are.

Blocks are marked with the bits of their readers (here for attention, by `choose_far.py` for its comparison of keys), then put side by side.
Invariant: nothing is read back; a tile's visits are what its own tokens read and nothing else, so a token reads what it would read alone.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from service.kernels.gpu.compiling import kernel
from service.kernels.gpu.paged_attention import sequence_room
from service.kernels.gpu.sparse_tiles import find_tile
from service.kernels.reference_sparse import ChosenFar

# Tokens of a tile at most: each is a bit of 32.
MOST_TOKENS = 32
# Choices marked, and blocks put side by side, at a time.
MARKED, GATHERED = 32, 128


class Visits(NamedTuple):
    """Far blocks that tiles visit, for each K/V head: `indices` of a table, upwards, and by bits of tokens their `readers`, int32 [tiles,
    Hkv, most]; `counts` [tiles, Hkv] int32."""

    indices: Tensor
    readers: Tensor
    counts: Tensor


@kernel
def mark_kernel(
    p_query_starts, p_context_lengths, p_ends, p_counts, p_anchors, p_choices, p_marks, sequences, width,
    stride_choice_anchor, stride_choice_head, SEQUENCES: tl.constexpr, TOKENS: tl.constexpr, MARKED: tl.constexpr,
):  # fmt: skip
    """One program owns a tile and one K/V head: bits of its tokens in p_marks [tiles, Hkv, width], by table index."""
    i_tile, i_head, heads = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.num_programs(1)
    _, i_origin, first_position, last_position = find_tile(p_ends, p_query_starts, p_context_lengths, i_tile, sequences, SEQUENCES, TOKENS)
    p_readers = p_marks + (i_tile.to(tl.int64) * heads + i_head) * width
    for i_token in range(0, last_position - first_position + 1):
        i_anchor = tl.load(p_anchors + i_origin + first_position + i_token).to(tl.int64)
        chosen = tl.load(p_counts + i_anchor, mask=i_anchor >= 0, other=0)
        p_chosen = p_choices + i_anchor * stride_choice_anchor + i_head * stride_choice_head
        for i_from in range(0, chosen, MARKED):
            o_choice = i_from + tl.arange(0, MARKED)
            m_choice = o_choice < chosen
            i_index = tl.load(p_chosen + o_choice, mask=m_choice, other=0)
            tl.atomic_or(p_readers + i_index, tl.full([MARKED], 1, tl.int32) << i_token, mask=m_choice, sem="relaxed")


@kernel
def gather_kernel(p_marks, p_indices, p_readers, p_visits, width, most_visits, GATHERED: tl.constexpr):
    """One program owns a tile and one K/V head: what is marked of it, p_marks [tiles, Hkv, width], as Visits."""
    i_place = tl.program_id(0).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    p_marked = p_marks + i_place * width
    i_visit = i_place * most_visits
    count = tl.zeros([1], tl.int32)
    for i_from in range(0, width, GATHERED):
        o_index = i_from + tl.arange(0, GATHERED)
        b_readers = tl.load(p_marked + o_index, mask=o_index < width, other=0)
        m_read = b_readers != 0
        o_visit = i_visit + count + tl.cumsum(m_read.to(tl.int32), 0) - 1
        tl.store(p_indices + o_visit, o_index, mask=m_read)
        tl.store(p_readers + o_visit, b_readers, mask=m_read)
        count += tl.sum(m_read.to(tl.int32))
    tl.store(p_visits + i_place + tl.arange(0, 1), count)


def find_visits(lengths: tuple[Tensor, Tensor, Tensor], tiles: int, tokens: int, far: ChosenFar) -> Visits:
    """The visits of `tiles` tiles of at most `tokens` ≤ MOST_TOKENS tokens each; `lengths` are the starts of queries [S + 1], context
    lengths [S] and running totals of tiles [S], int32.

    Marks take 4 bytes for each block of the widest table, tile and K/V head.
    """
    kv_heads, width, sequences = far.choices.shape[1], far.tables.shape[1], len(lengths[1])
    marks = torch.zeros((tiles, kv_heads, width), dtype=torch.int32, device=far.tables.device)
    options: dict[str, Any] = {"SEQUENCES": sequence_room(sequences), "TOKENS": tokens, "MARKED": MARKED}
    mark_kernel[tiles, kv_heads](
        *lengths, far.counts, far.anchors, far.choices, marks, sequences, width, *far.choices.stride()[:2], num_warps=1, **options
    )
    return gather_visits(marks, tokens * far.choices.shape[2])


def gather_visits(marks: Tensor, most: int) -> Visits:
    """Marks of readers, int32 [tiles, Hkv, width], side by side; a tile has `most` at most."""
    tiles, kv_heads, width = marks.shape
    found = torch.empty((2, tiles, kv_heads, min(most, width)), dtype=torch.int32, device=marks.device)
    counts = torch.empty((tiles, kv_heads), dtype=torch.int32, device=marks.device)
    gather_kernel[tiles, kv_heads](marks, *found, counts, width, found.shape[3], GATHERED=GATHERED, num_warps=1)
    return Visits(found[0], found[1], counts)
