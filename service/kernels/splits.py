"""The fixed pieces of a context that a row which decodes is computed in on a GPU. Plain arithmetic, no torch.

Invariant: where pieces begin is a function of positions alone, so a row's sums are made in one order whatever its company.
"""

from __future__ import annotations

# Part of the arithmetic, so a constant and never a tuning parameter.
SPLIT_TOKENS = 512


def most_splits(most_tokens: int, window: int | None) -> int:
    """The most pieces that one row of a context up to `most_tokens` is decoded in, where it sees a window or everything."""
    whole = max(-(-most_tokens // SPLIT_TOKENS), 1)
    return whole if window is None else min(whole, (window + SPLIT_TOKENS - 2) // SPLIT_TOKENS + 1)


def most_sparse_splits(window: int, refresh: int, block_tokens: int, sink_blocks: int, budget: int | None, table_blocks: int) -> int:
    """The same over two stores, two at least: the splits of the window of a row's anchor and of what follows up to the row, and those
    before it: of all candidates, of which rows choose `budget` blocks at least, or without a far store (None) of the sinks.

    Candidates have at most a quarter as many as the budget, or what they need while they are no more than it (`far_span` in
    gpu/sparse_tiles.py). One block more: a window may begin one later than that of the first row of its block. A context of `table_blocks`
    has no more than its pieces, and one that the window's start takes apart.
    """
    blocks = SPLIT_TOKENS // block_tokens
    near = (window - 1 + refresh + block_tokens - 1) // block_tokens + 1
    before = sink_blocks if budget is None else max(budget, -(-budget * blocks // 4)) + sink_blocks + 1
    return max(2, min(-(-before // blocks) + (near + blocks - 2) // blocks + 1, -(-table_blocks // blocks) + 1))
