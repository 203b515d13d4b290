"""Batches that belong to nobody, for the first use of kernels while a model is loaded: every token lies in block 1 of its group.

It does not know kernels. Invariant: of a batch only shapes and positions mean something; what its tokens see is whatever block 1 holds.
"""

from __future__ import annotations

import numpy as np

from service.engine.batch import Batch
from service.types.kv_layout import KvLayout

# Tokens of a slice that many anchors choose for, and tokens of plain contexts that decoding reads in more than one piece.
SLICE_TOKENS, CONTEXT_TOKENS = 48, 1200


def idle_batch(layout: KvLayout, start: int, tokens: int) -> Batch:
    """One slice of `tokens` tokens from position `start` on: of a prompt, or one token that was generated."""
    width, positions = layout.block_tokens, np.arange(start, start + tokens)
    groups, ids = len(layout.groups), np.ones(tokens, np.int64)
    return Batch(
        rows=np.zeros(1, np.int64),
        starts=np.full(1, start),
        lengths=np.full(1, tokens),
        tokens=np.zeros(tokens, np.int64),
        positions=positions,
        query_starts=np.array([0, tokens], np.int32),
        context_lengths=np.array([start + tokens], np.int32),
        block_tables=(np.ones((1, -(-(start + tokens) // width)), np.int32),) * groups,
        block_ids=(ids,) * groups,
        offsets=positions % width,
        sampled=np.zeros(1, np.int64),
        scored=np.zeros(0, np.int64),
        prompt_tokens=np.full(1, start + tokens if tokens > 1 else start),
    )


def idle_batches(layout: KvLayout, most_tokens: int) -> list[Batch]:
    """A slice within all windows, one behind them in which every token has more far blocks than it may choose, and a decoding row there,
    twice: the second time it may be replayed. As far as `most_tokens` reach."""
    begin = CONTEXT_TOKENS
    for group in layout.groups:
        if group.far is not None and group.window is not None:
            far = group.far
            begin = max(begin, group.window + (far.sink_blocks + far.budget(0) + 2) * layout.block_tokens)
    begin = max(min(begin, most_tokens - SLICE_TOKENS), 0)
    length = min(SLICE_TOKENS, most_tokens)
    return [idle_batch(layout, 0, length), idle_batch(layout, begin, length), *[idle_batch(layout, begin, 1)] * 2]
