"""The pool's shapes, its bytes, and that populating it takes memory and changes nothing."""

from __future__ import annotations

import ctypes
import mmap
import sys
import threading
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from service.engine.kv_pool import KvPool
from service.kernels.reference_sparse import dequantise
from service.types.kv_layout import FarSpec, FarStore, KvGroup, KvLayout

LAYOUT = KvLayout((KvGroup("full", (0, 2), 2, 8, 6), KvGroup("window70", (1,), 1, 4, 4, 70)), block_tokens=16)
CPU = torch.device("cpu")


def test_every_layer_has_its_own_blocks_of_its_groups_shape() -> None:
    pool = KvPool(LAYOUT, (5, 3), torch.float32, CPU)
    assert [pool.group_of(layer) for layer in range(3)] == [0, 1, 0]
    assert [tuple(tensor.shape) for tensor in pool.blocks_of(2)] == [(6, 2, 16, 8), (6, 2, 16, 6)]
    assert [tuple(tensor.shape) for tensor in pool.blocks_of(1)] == [(4, 1, 16, 4), (4, 1, 16, 4)]
    for layer in range(3):
        for tensor in pool.blocks_of(layer):
            tensor.fill_(layer)
    assert all(bool((tensor == layer).all()) for layer in range(3) for tensor in pool.blocks_of(layer))
    sizes = [LAYOUT.block_bytes(group, 4) * blocks for group, blocks in zip(LAYOUT.groups, (6, 4), strict=True)]
    assert pool.reserved_bytes == sum(sizes)


@pytest.mark.parametrize("store", [FarStore.INT8, FarStore.INT4, FarStore.NATIVE])
def test_far_groups_take_their_bytes_and_are_filled_from_near_blocks(store: FarStore) -> None:
    spec = FarSpec(store=store, sub_block_tokens=4)
    near = KvGroup("near", (0, 2), 2, 8, 6, 40, spec)
    layout = KvLayout((KvGroup("full", (1,), 2, 8, 6), near, replace(near, name="far", source=1)), block_tokens=16)
    pool = KvPool(layout, (2, 3, 4), torch.float32, CPU)
    assert [pool.group_of(layer) for layer in range(3)] == [1, 0, 1]
    assert [pool.far_group_of(layer) for layer in range(3)] == [2, None, 2]
    sizes = [layout.block_bytes(group, 4) * blocks for group, blocks in zip(layout.groups, (3, 4, 5), strict=True)]
    assert pool.reserved_bytes == sum(sizes)
    for layer in (0, 2):
        for blocks in pool.blocks_of(layer):
            blocks.normal_(generator=torch.Generator().manual_seed(layer))
    pool.demote(2, torch.tensor([3, 1]), torch.tensor([2, 4]))
    for layer in (0, 2):
        far, (keys, values) = pool.far_of(layer), pool.blocks_of(layer)
        # What a choice reads of all candidates lies side by side: a head's blocks one after the other.
        assert far.bounds[:, 1].is_contiguous() and far.bound_scales[:, 1].is_contiguous()
        for source, target in ((3, 2), (1, 4)):
            for stored, scales, blocks in ((far.keys, far.key_scales, keys), (far.values, far.value_scales, values)):
                back = dequantise(stored[target], None if scales is None else scales[target])
                off = (back - blocks[source]).abs().max()
                assert off == 0 if store is FarStore.NATIVE else 0 < off < (0.02 if store is FarStore.INT8 else 0.4)


def resident(tensors: tuple[Tensor, ...]) -> float:
    """The share of the pages within tensors that memory backs: of these alone, whatever else the process takes or gives back."""
    libc, found = ctypes.CDLL(None, use_errno=True), bytearray()
    for tensor in tensors:
        first = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
        pages = (tensor.data_ptr() + tensor.nbytes - first) // mmap.PAGESIZE
        there = (ctypes.c_ubyte * pages)()
        assert libc.mincore(ctypes.c_void_p(first), ctypes.c_size_t(pages * mmap.PAGESIZE), there) == 0
        found += bytes(there)
    return sum(page & 1 for page in found) / len(found)


@pytest.mark.skipif(sys.platform != "linux", reason="pages are counted by Linux")
def test_populating_waits_for_idleness_takes_the_memory_and_keeps_contents() -> None:
    layout = KvLayout((KvGroup("full", (0,), 4, 64, 64),))
    # Twice 50 MiB: the C library takes what is larger than 32 from the system, not from memory that the process gave back before.
    pool = KvPool(layout, (800,), torch.float32, CPU)
    blocks = keys, _ = pool.blocks_of(0)
    keys[7] = 3.0
    before = resident(blocks)
    idle = threading.Event()
    thread = pool.populate(idle)
    thread.join(timeout=0.05)
    assert thread.is_alive()
    # The kernel may make a huge page of 2 MiB around what was written.
    assert resident(blocks) - before < 0.1
    idle.set()
    thread.join(timeout=60)
    assert resident(blocks) == 1.0
    assert bool((keys[7] == 3.0).all())
