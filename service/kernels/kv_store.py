"""Write keys and values of new tokens into their blocks.

Blocks are [N, Hkv, B, D]: a block holds B tokens, contiguous for each K/V head. In 8 bits a token's row is D steps and behind them, in the
bytes of a float32, what a step is: [N, Hkv, B, D + 4] int8. It does not know sequences or which blocks are free. Invariant: only the named
slots are written, in the type of the blocks, and a row's bytes depend on the row alone.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Bytes behind the steps of a row in 8 bits.
SCALE_BYTES = 4


def row_size(blocks: Tensor) -> int:
    """The D of blocks, whatever their type."""
    return blocks.shape[-1] - (SCALE_BYTES if blocks.dtype == torch.int8 else 0)


def quantise_rows(x: Tensor) -> Tensor:
    """x [..., D] as int8 [..., D + 4]: steps −127 … 127 of the row's largest magnitude, then the bytes of one step in float32.

    A row with NaN or infinity gets steps of 0 and a scale that is not finite.
    """
    x = x.float()
    largest = x.abs().amax(dim=-1, keepdim=True)
    sound = (largest > 0) & (largest < torch.inf)
    # Not 127 / largest: torch makes that a reciprocal times 127, which rounds twice.
    inverse = torch.where(sound, torch.full_like(largest, 127.0) / largest, 0.0)
    steps = torch.where(sound, (x * inverse).round_(), 0.0).to(torch.int8)
    return torch.cat((steps, (largest / 127).view(torch.int8)), dim=-1)


def widen_rows(blocks: Tensor) -> Tensor:
    """int8 [..., D + 4] as `quantise_rows` makes it -> float32 [..., D]."""
    size = row_size(blocks)
    return blocks[..., :size].float() * blocks[..., size:].contiguous().view(torch.float32)


def widened(rows: Tensor) -> Tensor:
    """Rows of blocks of any type [..., D], in 8 bits with their scale behind, in float32."""
    return widen_rows(rows) if rows.dtype == torch.int8 else rows.float()


def write_kv(key: Tensor, value: Tensor, key_blocks: Tensor, value_blocks: Tensor, block_ids: Tensor, offsets: Tensor) -> None:
    """Store key [T, Hkv, D] and value [T, Hkv, Dv] of token t at [block_ids[t], :, offsets[t]].

    block_ids and offsets are int64 [T]; (block, offset) pairs must differ from each other. key_blocks is [N, Hkv, B, D], value_blocks
    [N, Hkv, B, Dv], or both int8 with 4 bytes more.
    """
    if key_blocks.dtype == torch.int8:
        key, value = quantise_rows(key), quantise_rows(value)
    key_blocks[block_ids, :, offsets] = key.to(key_blocks.dtype)
    value_blocks[block_ids, :, offsets] = value.to(value_blocks.dtype)
