"""Sampling one token a row in plain PyTorch: this file defines "correct" for the GPU's sampling without a sort.

It does not know seeds, requests or penalties. Invariant: the semantics are those of the engine's sampler on the host; a row's token does
not depend on the rows beside it.
"""

from __future__ import annotations

import torch
from torch import Tensor


def sample(
    logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, numbers: Tensor, greedy_below: float
) -> Tensor:
    """The token of each row of logits [R, V], int64 [R]: −1 where a row has NaN or no finite peak, the first best below `greedy_below`.

    Else logits over temperature, of which top_k (0: all) are kept, ties by the smaller id; then the fewest best that weigh top_p of
    them; then those of at least min_p of the best one's weight; the token is the first id whose cumulative weight exceeds number · total.
    temperature, top_k, top_p, min_p and numbers are [R].
    """
    wide = logits.float()
    peaks, best = wide.max(dim=1)
    cold = temperature < greedy_below
    scores = (wide - peaks[:, None]) / torch.where(cold, 1.0, temperature.float())[:, None]
    order = torch.sort(scores, dim=1, descending=True, stable=True).indices
    weights = scores.gather(1, order).double().exp()
    limits = torch.where(top_k > 0, top_k, weights.shape[1])
    weights = torch.where(torch.arange(weights.shape[1], device=logits.device) < limits[:, None], weights, 0.0)
    before = weights.cumsum(1) - weights
    beyond = (before >= top_p[:, None] * weights.sum(1, keepdim=True)) & (top_p < 1.0)[:, None]
    beyond[:, 0] = False
    weights = torch.where(beyond | (weights < min_p[:, None]), 0.0, weights)
    ends = torch.zeros_like(weights).scatter_(1, order, weights).cumsum(1)
    drawn = (ends > numbers[:, None] * ends[:, -1:]).int().argmax(dim=1)
    first = (wide == peaks[:, None]).int().argmax(dim=1)
    sound = torch.isfinite(peaks) & ~wide.isnan().any(dim=1)
    return torch.where(sound, torch.where(cold, first, drawn), torch.full_like(best, -1))
