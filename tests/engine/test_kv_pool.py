"""The pool's shapes, its bytes, and that populating it takes memory and changes nothing."""

from __future__ import annotations

import threading

import torch

from service.engine.kv_pool import KvPool
from service.engine.memory import resident_bytes
from service.types.kv_layout import KvGroup, KvLayout

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


def test_populating_waits_for_idleness_takes_the_memory_and_keeps_contents() -> None:
    layout = KvLayout((KvGroup("full", (0,), 4, 64, 64),))
    pool = KvPool(layout, (400,), torch.float32, CPU)  # 50 MiB
    keys, _ = pool.blocks_of(0)
    keys[7] = 3.0
    before = resident_bytes()
    idle = threading.Event()
    thread = pool.populate(idle)
    thread.join(timeout=0.05)
    assert thread.is_alive()
    assert resident_bytes() - before < 20 << 20
    idle.set()
    thread.join(timeout=60)
    assert resident_bytes() - before > 0.9 * pool.reserved_bytes
    assert bool((keys[7] == 3.0).all())
