"""Where a step's tokens are drawn: on a GPU for rows that need no more than filters and a draw, on the host for all others.

It does not know models or blocks. Invariant: what crosses to the host are the tokens of the first kind and the logits of the second only;
what crosses to the device does so before the step is computed.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from service.engine.distribution import Ints
from service.engine.sampler import GREEDY_BELOW, Sampler, Samples
from service.engine.upload import upload
from service.kernels.dispatch import resolve


def draws_on(device: torch.device) -> bool:
    """Whether tokens are drawn where their logits lie."""
    return device.type != "cpu"


class Drawing:
    """The tokens that a step draws for positions [R] of table rows [R], from the states at `last` [R] of its rows. Made before the step is
    computed: between its states and its tokens nothing is waited for.
    """

    def __init__(self, sampler: Sampler, rows: Ints, positions: Ints, last: Ints, device: torch.device) -> None:
        self._sampler, self._rows, self._positions = sampler, rows, positions
        self._plain = sampler.is_plain(rows, positions) if draws_on(device) else np.zeros(len(rows), np.bool_)
        self._others, plain = np.flatnonzero(~self._plain), np.flatnonzero(self._plain)
        columns = sampler.draw_parameters(rows[plain], positions[plain]) if len(plain) else ()
        picks = (plain, self._others) if len(plain) and len(self._others) else ()
        self._last, *there = upload((last, *columns, *picks), device)
        self._columns, self._picks = there[: len(columns)], there[len(columns) :]

    def states(self, hidden: Tensor) -> Tensor:
        """The states [R, dim] that are drawn from, of the step's [T, dim]."""
        return hidden.index_select(0, self._last)

    def tokens(self, logits: Tensor, table: NDArray[np.int32]) -> Samples:
        """What `Sampler.sample` gives for logits [R, V] of those states, which may be overwritten; `table` is the worker's of tokens."""
        if not self._columns:
            return self._sampler.sample(logits.float().cpu().numpy(), self._rows, self._positions, table)
        mixed, chosen, logprobs = len(self._picks) > 0, np.empty(len(self._rows), np.int64), {}
        sample = resolve("sample", logits.device, logits.dtype)
        there = sample(logits.index_select(0, self._picks[0]) if mixed else logits, *self._columns, GREEDY_BELOW)
        if mixed:
            wide = logits.index_select(0, self._picks[1]).float().cpu().numpy()
            found = self._sampler.sample(wide, self._rows[self._others], self._positions[self._others], table)
            chosen[self._others] = found.tokens
            logprobs = {int(self._others[index]): entry for index, entry in found.logprobs.items()}
        chosen[self._plain] = there.cpu().numpy()
        return Samples(chosen, logprobs)
