"""Scratch memory of the CPU kernels, kept from call to call.

Fresh tensors of megabytes come as untouched pages, whose first use costs more than the arithmetic on them: attention at 32 rows of 176
tokens took 2 to 5 times longer with fresh buffers. It does not know which kernel asks. Invariant: each thread has its own buffers, and a
buffer is only valid until the same name is taken again.
"""

from __future__ import annotations

import math
import threading

import torch
from torch import Tensor


class Workspace(threading.local):
    """Named float32 CPU buffers that grow to the largest shape asked for."""

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}

    def take(self, name: str, *shape: int) -> Tensor:
        """An uninitialised tensor of `shape` in the buffer `name`."""
        count = math.prod(shape)
        buffer = self._buffers.get(name)
        if buffer is None or buffer.numel() < count:
            # A tensor made in inference mode could not be written outside it.
            with torch.inference_mode(False):
                buffer = torch.empty(count)
            self._buffers[name] = buffer
        return buffer[:count].view(shape)

    @property
    def bytes(self) -> int:
        """Bytes this thread holds."""
        return sum(buffer.nbytes for buffer in self._buffers.values())
