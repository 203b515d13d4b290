"""Documents as one row of token ids, and sequences cut from it in an order that is a function of (seed, length, index).

It does not know text, models or the schedule. Invariants: a batch depends on the position alone, so a resumed run sees what an
uninterrupted one would; within one length every sequence of an epoch is seen once before any is seen twice (aligned ones may overlap).
"""

from __future__ import annotations

import random

import numpy as np
import numpy.typing as npt

Tokens = npt.NDArray[np.int64]


class TokenStream:
    """Packed documents. `documents` are id lists without the end token, which is put after each.

    `aligned`: a sequence begins with the first document that begins in what it would be, where there is one.
    """

    def __init__(self, documents: list[list[int]], end_id: int, seed: int, *, aligned: bool = False) -> None:
        order = list(range(len(documents)))
        random.Random(seed).shuffle(order)
        ids: list[int] = [end_id]
        begins = []
        for index in order:
            begins.append(len(ids))
            ids.extend(documents[index])
            ids.append(end_id)
        self.tokens: npt.NDArray[np.uint16] = np.asarray(ids, dtype=np.uint16)
        self._begins = np.asarray(begins if aligned else [], dtype=np.int64)
        self._seed = seed
        self._orders: dict[tuple[int, int], npt.NDArray[np.int64]] = {}

    def __len__(self) -> int:
        return len(self.tokens)

    def batch(self, position: int, sequences: int, length: int) -> tuple[Tokens, Tokens]:
        """Inputs and targets [sequences * length] int64 of the sequences that begin after `position` tokens were consumed."""
        first = position // length
        starts = [self._start(index, length) for index in range(first, first + sequences)]
        rows = np.stack([self.tokens[start : start + length + 1] for start in starts]).astype(np.int64)
        return rows[:, :-1].reshape(-1), rows[:, 1:].reshape(-1)

    def one_pass(self, position: int, tokens: int, length: int) -> tuple[Tokens, Tokens, int]:
        """Inputs and targets of a pass of `tokens` in sequences of `length`, and the length that its sequences have."""
        return *self.batch(position, tokens // length, length), length

    def _start(self, index: int, length: int) -> int:
        """Where sequence `index` begins. An epoch's sequences tile the row from a shifted start, in a shuffled order."""
        per_epoch = (len(self.tokens) - 1) // length - 1
        if per_epoch < 1:
            raise ValueError(f"{len(self.tokens)} tokens are too few for sequences of {length}")
        epoch, within = divmod(index, per_epoch)
        shift = random.Random(f"{self._seed}:{epoch}:{length}").randrange(length)
        return self._aligned(int(self._order(epoch, length, per_epoch)[within]) * length + shift, length)

    def _aligned(self, start: int, length: int) -> int:
        """Where the document begins that a sequence from `start` is to begin with: at its first token, as prompts do."""
        found = int(np.searchsorted(self._begins, start))
        begin = int(self._begins[found]) if found < len(self._begins) else start
        return begin if begin - start < length and begin + length < len(self.tokens) else start

    def _order(self, epoch: int, length: int, count: int) -> npt.NDArray[np.int64]:
        key = (epoch, length)
        if key not in self._orders:
            order = list(range(count))
            random.Random(f"order:{self._seed}:{epoch}:{length}").shuffle(order)
            self._orders = {key: np.asarray(order, dtype=np.int64)}
        return self._orders[key]
