"""Arrays of the host brought to where a step is computed: in one copy, which nobody waits for.

It does not know what they are. Invariant: nothing that is still being copied is written.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

# Compiled kernels count on where their arguments begin, and are compiled again where that changes.
_ALIGNED_BYTES = 16


def upload(arrays: Sequence[NDArray[Any]], device: torch.device) -> list[Tensor]:
    """Tensors on `device` with the values, shapes and types of contiguous arrays.

    On a CPU they share memory. For a device they are packed into ordinary memory, which is copied aside before the call returns; the copy
    to the device follows what was sent there before.
    """
    if device.type == "cpu":
        return [torch.from_numpy(array) for array in arrays]
    sizes = [-(-array.nbytes // _ALIGNED_BYTES) * _ALIGNED_BYTES for array in arrays]
    host, at = np.zeros(sum(sizes), np.uint8), 0
    for size, array in zip(sizes, arrays, strict=True):
        host[at : at + array.nbytes] = array.reshape(-1).view(np.uint8)
        at += size
    parts = torch.split(torch.from_numpy(host).to(device, non_blocking=True), sizes)
    return [_as(array, part) for array, part in zip(arrays, parts, strict=True)]


def _as(array: NDArray[Any], part: Tensor) -> Tensor:
    """Bytes as values of the array's type and shape."""
    return part[: array.nbytes].view(torch.from_numpy(array).dtype).view(array.shape)


class FixedRoom:
    """Room for `size` values of int32 at a fixed place on a device, where a recorded step finds them, and on the host, where they are
    written before they are sent.
    """

    def __init__(self, size: int, device: torch.device) -> None:
        on_gpu = device.type == "cuda"
        self.device = torch.zeros(size, dtype=torch.int32, device=device)
        self.host = torch.zeros(size, dtype=torch.int32, pin_memory=on_gpu)
        self._sent = torch.cuda.Event() if on_gpu else None  # type: ignore[no-untyped-call]

    def wait(self) -> None:
        """Until what was sent last has arrived: only then may the host's room be written."""
        if self._sent is not None:
            self._sent.synchronize()

    def send(self, size: int) -> None:
        """Copy the first `size` values to the device."""
        self.device[:size].copy_(self.host[:size], non_blocking=True)
        if self._sent is not None:
            self._sent.record()
