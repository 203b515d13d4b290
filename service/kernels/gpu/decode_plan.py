"""The plan of a step whose sequences have one row each, found on the device: a recorded launch stays right for the lengths of its replay.

Only the number of sequences and the longest context are fixed, by the caller. It does not know blocks or how a step is recorded. Invariant:
nothing is read back, and rows are split or tiled as `AttentionPlan` does it, so both give the same bits.
"""

from __future__ import annotations

import torch
from torch import Tensor

from service.kernels.gpu.paged_attention import AttentionPlan, Tile, Work
from service.kernels.splits import SPLIT_TOKENS, most_splits


class DecodePlan(AttentionPlan):
    """Splits, or with `tiled` tiles, of S rows that see context_lengths [S] int32 tokens (on the device), `most_tokens` at most."""

    def __init__(self, context_lengths: Tensor, most_tokens: int, window: int | None, *, tiled: bool) -> None:
        self._lengths = context_lengths
        self._most = most_splits(most_tokens, window)
        self._reach = window
        self._tiled = tiled
        self._each = torch.arange(1, len(context_lengths) + 1, dtype=torch.int32, device=context_lengths.device)
        self._none = torch.zeros_like(self._each)
        self._dense: Work | None = None

    def dense(self, group: int, tile: Tile) -> Work:
        """As in AttentionPlan; `splits` is what the launch has room for. Raises ValueError when no token fits a tile."""
        if group > tile.rows:
            raise ValueError(f"{group} query heads a K/V head do not fit a tile of {tile.rows} rows: use at most {tile.rows}")
        if self._tiled:
            return self._in_tiles()
        if self._dense is None:
            last = (self._lengths - 1).clamp(min=0) // SPLIT_TOKENS
            first = 0 if self._reach is None else (self._lengths - self._reach).clamp(min=0) // SPLIT_TOKENS
            ends = (last - first + 1).cumsum(0).to(torch.int32)
            self._dense = Work(self._none, ends, 0, self._most * len(self._each))
        return self._dense

    def sparse(self, tokens: int, splits: int) -> Work:
        """As in AttentionPlan: every row has one run or the same number of splits."""
        del tokens
        return self._in_tiles() if self._tiled else Work(self._none, self._each * splits, 0, splits * len(self._each))

    def _in_tiles(self) -> Work:
        return Work(self._each, self._none, len(self._each), 0)


def plan_decode(context_lengths: Tensor, *, most_tokens: int, window: int | None) -> DecodePlan:
    """The plan of one step for layers with this window, see `DecodePlan`."""
    return DecodePlan(context_lengths, most_tokens, window, tiled=False)


def plan_decode_tiles(context_lengths: Tensor, *, most_tokens: int, window: int | None) -> DecodePlan:
    """The same with every row in a tile, as `plan_tiles` has them."""
    return DecodePlan(context_lengths, most_tokens, window, tiled=True)
