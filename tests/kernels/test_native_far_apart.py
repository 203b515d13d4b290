"""Compiled kernels of two stores where int32 cannot count the elements before a block: memory that is never touched costs nothing.

A far store is contiguous, so its blocks are as large as they come, 65,536 numbers of 8 bits: block 32,768 begins at element 2^31.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from service.kernels import reference_sparse
from service.kernels.native import far_store, window_sparse
from service.kernels.reference_sparse import FarBlocks
from tests.kernels.conftest import needs_native, untouched
from tests.kernels.sparse_batches import SparseBatch, make_sparse, make_store

pytestmark = needs_native
FIRST, SIZE = 32768, 256


def far_on(store: FarBlocks) -> FarBlocks:
    """A store whose blocks from FIRST on are copies of these, and whose others nothing has written."""
    return FarBlocks(*(None if tensor is None else placed(tensor) for tensor in store))


def placed(blocks: Tensor) -> Tensor:
    there = untouched(FIRST + len(blocks), *blocks.shape[1:], dtype=blocks.dtype)
    there[FIRST:] = blocks
    return there


def apart(blocks: Tensor) -> Tensor:
    """The same of near blocks, which may lie by any stride."""
    stride = 2**31 // FIRST
    storage = untouched((FIRST + len(blocks)) * stride, dtype=blocks.dtype)
    inner = blocks[0].contiguous().stride()
    there = torch.as_strided(storage, (FIRST + len(blocks), *blocks.shape[1:]), (stride, *inner))
    there[FIRST:] = blocks
    return there


def shifted(tables: Tensor, blocks: int) -> Tensor:
    return torch.where((tables > 0) & (tables < blocks), tables + FIRST, tables)


def batch_of_wide_blocks() -> SparseBatch:
    """Blocks of 4 heads and 64 tokens; some far blocks are chosen and some are not."""
    sizes = {"heads": 4, "kv_heads": 4, "size": SIZE, "block_tokens": 64, "sub_blocks": 4}
    return make_sparse([450], [1], window=64, refresh=1, budget=2, dtype=torch.bfloat16, **sizes)


def test_attention_and_choice() -> None:
    batch = batch_of_wide_blocks()
    far, call = batch.far, batch.choosing
    assert far is not None and call is not None and far.counts.tolist() == [2]
    blocks = far_on(far.blocks)
    assert blocks.keys[0].numel() * FIRST == 2**31
    tables = shifted(far.tables, len(far.blocks.keys))
    near = {"key_blocks": apart(batch.key_blocks), "value_blocks": apart(batch.value_blocks)}
    near["near_tables"] = shifted(batch.near_tables, len(batch.key_blocks))
    moved = replace(batch, far=far._replace(blocks=blocks, tables=tables), **near)
    attend = window_sparse.window_sparse_attention
    assert torch.equal(moved.run(attend), batch.run(attend))
    for ours, theirs in zip(replace(call, blocks=blocks, tables=tables).run(window_sparse.choose_far), call.run(), strict=True):
        assert torch.equal(ours, theirs)


def test_demotion() -> None:
    generator = torch.Generator().manual_seed(0)
    keys, values = (torch.randn(3, 4, 64, SIZE, generator=generator).bfloat16() for _ in range(2))
    expected, near, target = make_store(4, 4, 64, (SIZE, SIZE), "int8", 4, torch.bfloat16), torch.tensor([2, 1]), torch.tensor([1, 3])
    found = far_on(expected)
    far_store.demote(apart(keys), apart(values), found, near + FIRST, target + FIRST)
    reference_sparse.demote(keys, values, expected, near, target)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours is not None and theirs is not None
        assert torch.equal(ours[FIRST:].reshape(-1).view(torch.uint8), theirs.reshape(-1).view(torch.uint8))
