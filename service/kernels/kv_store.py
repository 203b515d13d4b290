"""Write keys and values of new tokens into their blocks.

Blocks are [N, Hkv, B, D]: a block holds B tokens, contiguous for each K/V head. It does not know sequences or which blocks are free.
Invariant: only the named slots are written, in the type of the blocks.
"""

from __future__ import annotations

from torch import Tensor


def write_kv(key: Tensor, value: Tensor, key_blocks: Tensor, value_blocks: Tensor, block_ids: Tensor, offsets: Tensor) -> None:
    """Store key [T, Hkv, D] and value [T, Hkv, Dv] of token t at [block_ids[t], :, offsets[t]].

    block_ids and offsets are int64 [T]; (block, offset) pairs must differ from each other. key_blocks is [N, Hkv, B, D], value_blocks
    [N, Hkv, B, Dv].
    """
    key_blocks[block_ids, :, offsets] = key.to(key_blocks.dtype)
    value_blocks[block_ids, :, offsets] = value.to(value_blocks.dtype)
