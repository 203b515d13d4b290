"""The memory that threads of a compiled kernel read and write: tensors of the process, and what each program shares.

Invariant: an address outside the tensors that a launch was given, or one that the access is not aligned to, ends the launch with an error.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}


class Refused(Exception):
    """What a device would answer with an illegal or misaligned address, or not define."""


class Memory:
    """Pieces of memory, each an array of bytes, by their first address."""

    def __init__(self, pieces: Iterable[tuple[int, NDArray[np.uint8]]]) -> None:
        ordered = sorted(pieces, key=lambda piece: piece[0])
        self._starts = np.array([start for start, _ in ordered], np.uint64)
        self._lengths = np.array([len(piece) for _, piece in ordered], np.int64)
        self._views = [{size: piece[: len(piece) // size * size].view(kind) for size, kind in UNSIGNED.items()} for _, piece in ordered]

    @classmethod
    def of_tensors(cls, tensors: Iterable[Tensor]) -> Memory:
        """The storages of tensors, each as a whole."""
        pieces = {}
        for tensor in tensors:
            storage = tensor.untyped_storage()
            if storage.nbytes():
                pieces[storage.data_ptr()] = torch.empty(0, dtype=torch.uint8).set_(storage).numpy()  # type: ignore[call-overload]
        return cls(pieces.items())

    def load(self, addresses: NDArray[np.uint64], size: int, count: int) -> list[NDArray[np.generic]]:
        """`count` elements of `size` bytes from each address on."""
        found = [np.empty(len(addresses), UNSIGNED[size]) for _ in range(count)]
        for piece, here, elements in self._places(addresses, size, count):
            for number, result in enumerate(found):
                result[here] = self._views[piece][size][elements + number]
        return found

    def store(self, addresses: NDArray[np.uint64], size: int, values: list[NDArray[np.generic]]) -> None:
        """Put the elements of each address there."""
        for piece, here, elements in self._places(addresses, size, len(values)):
            for number, value in enumerate(values):
                self._views[piece][size][elements + number] = value[here]

    def _places(
        self, addresses: NDArray[np.uint64], size: int, count: int
    ) -> Iterable[tuple[int, slice | NDArray[np.bool_], NDArray[np.int64]]]:
        """(piece, which addresses lie in it, their elements there)."""
        if not len(addresses):
            return
        if not len(self._starts):
            raise Refused("there is no memory to access")
        pieces = np.searchsorted(self._starts, addresses, "right") - 1
        if (pieces < 0).any():
            raise Refused(f"an access of {size * count} bytes lies in no tensor of this launch")
        offsets = (addresses - self._starts[pieces]).astype(np.int64)
        beyond = offsets + size * count - self._lengths[pieces]
        if (beyond > 0).any():
            raise Refused(f"an access of {size * count} bytes lies {beyond.max()} bytes beyond a tensor of this launch")
        if (addresses % np.uint64(size * count)).any():
            raise Refused(f"an access of {size * count} bytes is not aligned")
        elements = offsets // size
        if pieces[0] == pieces[-1] and (pieces == pieces[0]).all():
            yield int(pieces[0]), slice(None), elements
        else:
            for piece in np.unique(pieces):
                here = pieces == piece
                yield int(piece), here, elements[here]
