"""Where a step's tokens are drawn: on a GPU for rows that need no more than filters and a draw, on the host for all others.

It does not know models or blocks. Invariant: what crosses to the host are the tokens of the first kind and the logits of the second only.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from service.engine.distribution import Ints
from service.engine.sampler import GREEDY_BELOW, Sampler, Samples
from service.kernels.dispatch import resolve


def draw_tokens(sampler: Sampler, logits: Tensor, rows: Ints, positions: Ints, tokens: NDArray[np.int32]) -> Samples:
    """`Sampler.sample` of logits [R, V] on any device; `tokens` is the worker's table."""
    if logits.device.type == "cpu":
        return sampler.sample(logits.float().numpy(), rows, positions, tokens)
    return draw_on_device(sampler, logits, rows, positions, tokens)


def draw_on_device(sampler: Sampler, logits: Tensor, rows: Ints, positions: Ints, tokens: NDArray[np.int32]) -> Samples:
    """The same where the logits lie: plain rows by the device's sampling, the others on the host."""
    plain = sampler.is_plain(rows, positions)
    chosen = np.empty(len(rows), np.int64)
    there = None
    if plain.any():
        picked = logits if plain.all() else logits.index_select(0, _tensor(np.flatnonzero(plain), logits.device))
        columns = sampler.draw_parameters(rows[plain], positions[plain])
        sample = resolve("sample", logits.device, logits.dtype)
        there = sample(picked, *(_tensor(column, logits.device) for column in columns), GREEDY_BELOW)
    logprobs = {}
    if not plain.all():
        others = np.flatnonzero(~plain)
        wide = logits.index_select(0, _tensor(others, logits.device)).float().cpu().numpy()
        found = sampler.sample(wide, rows[others], positions[others], tokens)
        chosen[others] = found.tokens
        logprobs = {int(others[index]): entry for index, entry in found.logprobs.items()}
    if there is not None:
        chosen[plain] = there.cpu().numpy()
    return Samples(chosen, logprobs)


def _tensor(array: NDArray[Any], device: torch.device) -> Tensor:
    return torch.from_numpy(array).to(device)
