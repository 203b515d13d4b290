"""The physical KV blocks: one allocation of keys and one of values for every group of layers.

A block of a layer is [Hkv, block_tokens, D], contiguous for each K/V head. It does not know who owns a block. Invariants: block 0 is the
null block, never written and never read; memory that the budget names is really taken, in the background while no step runs.
"""

from __future__ import annotations

import ctypes
import sys
import threading

import torch
from torch import Tensor

from service.types.model_spec import KvLayout

_MADV_HUGEPAGE, _MADV_POPULATE_WRITE = 14, 23
_STEP_BYTES = 2 << 20


class KvPool:
    """Blocks of all groups. `group_blocks` are the usable ids: 1 … n."""

    def __init__(self, layout: KvLayout, group_blocks: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
        self.layout = layout
        self._keys: list[Tensor] = []
        self._values: list[Tensor] = []
        for group, count in zip(layout.groups, group_blocks, strict=True):
            shape = (len(group.layers), count + 1, group.kv_heads, layout.block_tokens)
            self._keys.append(torch.empty((*shape, group.key_dim), dtype=dtype, device=device))
            self._values.append(torch.empty((*shape, group.value_dim), dtype=dtype, device=device))
        self._places = {layer: (g, at) for g, group in enumerate(layout.groups) for at, layer in enumerate(group.layers)}

    def group_of(self, layer: int) -> int:
        """The index of the layer's group in the layout."""
        return self._places[layer][0]

    def blocks_of(self, layer: int) -> tuple[Tensor, Tensor]:
        """The layer's keys [N, Hkv, block_tokens, D] and values [N, Hkv, block_tokens, Dv]; writing to them writes the pool."""
        group, at = self._places[layer]
        return self._keys[group][at], self._values[group][at]

    @property
    def reserved_bytes(self) -> int:
        """Bytes of all blocks, the null blocks included."""
        return sum(tensor.nbytes for tensor in (*self._keys, *self._values))

    def populate(self, idle: threading.Event) -> threading.Thread:
        """Have the kernel back all blocks with memory, 2 MiB at a time while `idle` is set; contents stay as they are.

        A pool that is only reserved would be found not to fit when traffic is highest. First use of memory can cost milliseconds a MiB
        on a virtual machine: too much to wait for at the start, and to pay within steps. Where the kernel cannot do it (before Linux
        5.14) or the blocks are on a device, nothing happens and pages come as they are written.
        """
        thread = threading.Thread(target=self._populate, args=(idle,), name="kv-populate", daemon=True)
        thread.start()
        return thread

    def _populate(self, idle: threading.Event) -> None:
        if sys.platform != "linux":
            return
        libc = ctypes.CDLL(None, use_errno=True)
        page = 4096
        for tensor in (*self._keys, *self._values):
            if tensor.device.type != "cpu":
                continue
            first = -(-tensor.data_ptr() // page) * page
            end = (tensor.data_ptr() + tensor.nbytes) // page * page
            libc.madvise(ctypes.c_void_p(first), ctypes.c_size_t(end - first), _MADV_HUGEPAGE)
            for at in range(first, end, _STEP_BYTES):
                idle.wait()
                size = min(_STEP_BYTES, end - at)
                if libc.madvise(ctypes.c_void_p(at), ctypes.c_size_t(size), _MADV_POPULATE_WRITE) != 0:
                    return
