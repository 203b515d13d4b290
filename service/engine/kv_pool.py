"""The physical KV blocks: one allocation of keys and one of values for every group of layers.

A block of a layer is [Hkv, block_tokens, D], contiguous for each K/V head; far groups keep theirs quantised, with bounds of the keys. It
does not know who owns a block. Invariants: block 0 is the
null block, never written and never read; memory that the budget names is really taken, in the background while no step runs.
"""

from __future__ import annotations

import ctypes
import sys
import threading
import time
from typing import NamedTuple

import torch
from torch import Tensor

from service.kernels.dispatch import resolve
from service.kernels.native.decoder import FarLayer
from service.kernels.reference_sparse import FarBlocks
from service.types.kv_layout import FarSpec, FarStore, KvGroup, KvLayout

_MADV_HUGEPAGE, _MADV_POPULATE_WRITE = 14, 23
_STEP_BYTES = 2 << 20
# How long a worker must have had no step before memory is taken in. Doing it between the steps of one sequence of a 385 M model, which
# leave a third of a millisecond, made a step take 16.1 instead of 10.7 ms.
REST_S = 0.05


class KvPool:
    """Blocks of all groups in `dtype`, for kernels that `compute` in a type (that of the blocks unless it is given), which `place` names.

    `group_blocks` are the usable ids: 1 … n. `groups`, `stores` and `far_layers`: `group_of`, `blocks_of` and the far store of every layer.
    """

    def __init__(
        self,
        layout: KvLayout,
        group_blocks: tuple[int, ...],
        dtype: torch.dtype,
        device: torch.device,
        compute: torch.dtype | None = None,
    ) -> None:
        self.layout = layout
        self.place = device, compute or dtype
        self._near: dict[int, tuple[Tensor, Tensor]] = {}
        self._far: dict[int, FarBlocks] = {}
        self._places: dict[int, tuple[int, int]] = {}
        self._far_places: dict[int, tuple[int, int]] = {}
        for index, (group, count) in enumerate(zip(layout.groups, group_blocks, strict=True)):
            empty = _Empty((len(group.layers), count + 1, group.kv_heads), dtype, device)
            if group.source is not None and group.far is not None:
                self._far[index] = _far_blocks(group, group.far, layout.block_tokens, empty)
            else:
                self._near[index] = empty(layout.block_tokens, group.key_dim), empty(layout.block_tokens, group.value_dim)
            places = self._places if group.source is None else self._far_places
            places.update({layer: (index, at) for at, layer in enumerate(group.layers)})
        self._demote = resolve("demote", *self.place)
        layers = range(len(self._places))
        self.groups = tuple(self.group_of(layer) for layer in layers)
        self.stores = tuple(self.blocks_of(layer) for layer in layers)
        self.far_layers = tuple(self._far_layer(layer) for layer in layers)

    def group_of(self, layer: int) -> int:
        """The index of the layer's group in the layout: the near one where there are two."""
        return self._places[layer][0]

    def far_group_of(self, layer: int) -> int | None:
        """The index of the layer's far group, or None."""
        return self._far_places[layer][0] if layer in self._far_places else None

    def blocks_of(self, layer: int) -> tuple[Tensor, Tensor]:
        """The layer's keys [N, Hkv, block_tokens, D] and values [N, Hkv, block_tokens, Dv]; writing to them writes the pool."""
        group, at = self._places[layer]
        keys, values = self._near[group]
        return keys[at], values[at]

    def far_of(self, layer: int) -> FarBlocks:
        """The layer's far store; it must have one."""
        found = self.far_layers[layer]
        if found is None:
            raise KeyError(layer)
        return found.blocks

    def _far_layer(self, layer: int) -> FarLayer | None:
        if layer not in self._far_places:
            return None
        group, at = self._far_places[layer]
        store = self._far[group]
        key_scales = None if store.key_scales is None else store.key_scales[at]
        value_scales = None if store.value_scales is None else store.value_scales[at]
        bounds = store.bounds[at], store.part_bounds[at], store.bound_scales[at]
        blocks = FarBlocks(store.keys[at], store.values[at], key_scales, value_scales, *bounds)
        return FarLayer(blocks, group, at)

    def demote(self, group: int, sources: Tensor, targets: Tensor) -> None:
        """Copy blocks `sources` [n] int64 of a far group's near group into its blocks `targets` [n], for every layer."""
        for layer in self.layout.groups[group].layers:
            self._demote(*self.blocks_of(layer), self.far_of(layer), sources, targets)

    @property
    def reserved_bytes(self) -> int:
        """Bytes of all blocks, the null blocks included."""
        return sum(tensor.nbytes for tensor in self._tensors())

    def _tensors(self) -> list[Tensor]:
        stores = (*self._near.values(), *self._far.values())
        return [tensor for store in stores for tensor in store if tensor is not None]

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
        for tensor in self._tensors():
            if tensor.device.type != "cpu":
                continue
            first = -(-tensor.data_ptr() // page) * page
            end = (tensor.data_ptr() + tensor.nbytes) // page * page
            libc.madvise(ctypes.c_void_p(first), ctypes.c_size_t(end - first), _MADV_HUGEPAGE)
            for at in range(first, end, _STEP_BYTES):
                if not idle.is_set():
                    _wait_for_rest(idle)
                size = min(_STEP_BYTES, end - at)
                if libc.madvise(ctypes.c_void_p(at), ctypes.c_size_t(size), _MADV_POPULATE_WRITE) != 0:
                    return


def _wait_for_rest(idle: threading.Event) -> None:
    """Wait until no step has run for REST_S: between the steps of a generation there is no time to take memory in."""
    while True:
        idle.wait()
        time.sleep(REST_S)
        if idle.is_set():
            return


class _Empty(NamedTuple):
    """Makes uninitialised tensors of all layers, blocks and heads of one group."""

    heads: tuple[int, int, int]
    dtype: torch.dtype
    device: torch.device

    def __call__(self, *shape: int, kind: torch.dtype | None = None) -> Tensor:
        return torch.empty((*self.heads, *shape), dtype=kind or self.dtype, device=self.device)

    def by_head(self, *shape: int, kind: torch.dtype) -> Tensor:
        """The same, with the blocks of a head one after the other in memory."""
        layers, blocks, heads = self.heads
        return torch.empty((layers, heads, blocks, *shape), dtype=kind, device=self.device).transpose(1, 2)


def _far_blocks(group: KvGroup, spec: FarSpec, tokens: int, empty: _Empty) -> FarBlocks:
    parts = empty(tokens // spec.sub_block_tokens, 2, group.key_dim, kind=torch.int8)
    bounds = empty.by_head(2, group.key_dim, kind=torch.int8), parts, empty.by_head(kind=torch.float16)
    if spec.store is FarStore.NATIVE:
        return FarBlocks(empty(tokens, group.key_dim), empty(tokens, group.value_dim), None, None, *bounds)
    kind, share = (torch.uint8, 2) if spec.store is FarStore.INT4 else (torch.int8, 1)
    keys, values = (empty(tokens, size // share, kind=kind) for size in (group.key_dim, group.value_dim))
    return FarBlocks(keys, values, empty(tokens, kind=torch.float16), empty(tokens, kind=torch.float16), *bounds)
