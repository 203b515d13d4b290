"""Write keys and values of new tokens into their blocks on a GPU: one launch for both.

It does not know sequences or which blocks are free. Invariant: only the named places are written, in the type of the blocks.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def write_kernel(
    p_key, p_value, p_key_blocks, p_value_blocks, p_block_ids, p_offsets,
    stride_key_token, stride_key_head, stride_value_token, stride_value_head,
    stride_key_block, stride_key_block_head, stride_key_block_token,
    stride_value_block, stride_value_block_head, stride_value_block_token,
    KEY_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program owns one token and K/V head: it copies the key, then the value, converting to the type of the blocks."""
    i_token, i_head = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    i_block, i_offset = tl.load(p_block_ids + i_token).to(tl.int64), tl.load(p_offsets + i_token).to(tl.int64)
    o_dim = tl.arange(0, BLOCK)
    b_key = tl.load(p_key + i_token * stride_key_token + i_head * stride_key_head + o_dim, mask=o_dim < KEY_DIM)  # [BLOCK]
    o_key = i_block * stride_key_block + i_head * stride_key_block_head + i_offset * stride_key_block_token
    tl.store(p_key_blocks + o_key + o_dim, b_key, mask=o_dim < KEY_DIM)
    b_value = tl.load(p_value + i_token * stride_value_token + i_head * stride_value_head + o_dim, mask=o_dim < VALUE_DIM)
    o_value = i_block * stride_value_block + i_head * stride_value_block_head + i_offset * stride_value_block_token
    tl.store(p_value_blocks + o_value + o_dim, b_value, mask=o_dim < VALUE_DIM)


def write_kv(key: Tensor, value: Tensor, key_blocks: Tensor, value_blocks: Tensor, block_ids: Tensor, offsets: Tensor) -> None:
    """Store key [T, Hkv, D] and value [T, Hkv, Dv] of token t at [block_ids[t], :, offsets[t]].

    block_ids and offsets are integers [T]; (block, offset) pairs must differ from each other. key_blocks is [N, Hkv, B, D], value_blocks
    [N, Hkv, B, Dv]; last dimensions are contiguous. Moves each value twice. Raises ValueError for other strides.
    """
    if any(tensor.stride(-1) != 1 for tensor in (key, value, key_blocks, value_blocks)):
        raise ValueError("the last dimension of keys, values and their blocks must be contiguous")
    tokens, heads, size = key.shape
    if tokens:
        block = triton.next_power_of_2(max(size, value.shape[2]))
        write_kernel[(tokens, heads)](
            key, value, key_blocks, value_blocks, block_ids, offsets, *key.stride()[:2], *value.stride()[:2],
            *key_blocks.stride()[:3], *value_blocks.stride()[:3], KEY_DIM=size, VALUE_DIM=value.shape[2], BLOCK=block, num_warps=1,
        )  # fmt: skip
