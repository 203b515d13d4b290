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
