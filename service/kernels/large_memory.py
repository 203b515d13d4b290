"""Memory for weights in pieces of 128 MiB that the kernel is asked to back with pages of 2 MiB.

A decode step reads every weight once, which is bound by how fast addresses are translated when the pages are small: 344 MB of int8
products took 9.2 ms over pages of 4 KiB and 6.3 ms over those of 2 MiB (AMD EPYC, virtual machine). It does not know weights. Invariants:
tensors do not overlap; a piece is freed when the last tensor in it is; where the kernel cannot do it the memory is ordinary.
"""

from __future__ import annotations

import ctypes
import math
import sys

import torch
from torch import Tensor

# The last large page of a piece is seldom full: with pieces of 32 MiB, 368 MiB of int8 weights took 14 MiB more than with these.
PIECE_BYTES = 128 << 20
_LARGE_BYTES = 2 << 20
_LINE_BYTES = 64
_MADV_HUGEPAGE = 14


class LargeMemory:
    """Hands out uninitialised CPU tensors one after the other."""

    def __init__(self) -> None:
        self._piece = torch.empty(0, dtype=torch.uint8)
        self._used_bytes = 0

    def take(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """An uninitialised contiguous tensor, aligned to 64 bytes."""
        size = math.prod(shape) * dtype.itemsize
        room = -(-size // _LINE_BYTES) * _LINE_BYTES
        # A tensor made in inference mode could not be written outside it.
        with torch.inference_mode(False):
            if room > PIECE_BYTES:
                return _piece(room)[:size].view(dtype).view(shape)
            if self._used_bytes + room > self._piece.numel():
                self._piece, self._used_bytes = _piece(PIECE_BYTES), 0
            taken = self._piece[self._used_bytes : self._used_bytes + size]
            self._used_bytes += room
            return taken.view(dtype).view(shape)

    def keep(self, tensor: Tensor) -> Tensor:
        """A contiguous copy of a CPU tensor in this memory."""
        return self.take(tuple(tensor.shape), tensor.dtype).copy_(tensor)


def _piece(size: int) -> Tensor:
    """Bytes that begin at a multiple of 2 MiB. What is beyond them and never touched takes no memory."""
    memory = torch.empty(size + 2 * _LARGE_BYTES, dtype=torch.uint8)
    first = -memory.data_ptr() % _LARGE_BYTES
    whole = -(-size // _LARGE_BYTES) * _LARGE_BYTES
    if sys.platform == "linux":
        ctypes.CDLL(None).madvise(ctypes.c_void_p(memory.data_ptr() + first), ctypes.c_size_t(whole), _MADV_HUGEPAGE)
    return memory[first : first + size]
