"""Arrays of the host brought to where a step is computed: in one copy, which nobody waits for.

It does not know what they are. Invariant: what is sent is not written again; torch gives its memory to somebody else when it has arrived.
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


def sendable(values: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Memory of the host, uninitialised, from which a copy to the device is not waited for: pinned for a GPU."""
    return torch.empty(values, dtype=dtype, pin_memory=device.type == "cuda")


def upload(arrays: Sequence[NDArray[Any]], device: torch.device) -> list[Tensor]:
    """Tensors on `device` with the values, shapes and types of arrays; on a CPU, where these must be contiguous, they share memory."""
    if device.type == "cpu":
        return [torch.from_numpy(array) for array in arrays]
    sizes = [-(-array.nbytes // _ALIGNED_BYTES) * _ALIGNED_BYTES for array in arrays]
    sent, at = sendable(sum(sizes), torch.uint8, device), 0
    for size, array in zip(sizes, arrays, strict=True):
        sent.numpy()[at : at + array.nbytes] = array.reshape(-1).view(np.uint8)
        at += size
    parts = torch.split(sent.to(device, non_blocking=True), sizes)
    return [_as(array, part) for array, part in zip(arrays, parts, strict=True)]


def _as(array: NDArray[Any], part: Tensor) -> Tensor:
    """Bytes as values of the array's type and shape."""
    return part[: array.nbytes].view(torch.from_numpy(array).dtype).view(array.shape)
