"""Write keys and values of new tokens into their blocks on a GPU: one launch for both, or for both and the rotation of all heads before.

It does not know sequences or which blocks are free. Invariant: only the named places are written, in the type of the blocks.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from service.kernels.gpu.compiling import kernel


@triton.jit
def narrowed(b_x, p_blocks):
    """b_x in the type of the blocks: in 8 bits the largest finite value stands for all beyond it."""
    if p_blocks.dtype.element_ty == tl.float8e4nv:
        b_x = tl.maximum(b_x.to(tl.float32), -448.0, propagate_nan=tl.PropagateNan.ALL)
        b_x = tl.minimum(b_x, 448.0, propagate_nan=tl.PropagateNan.ALL)
    return b_x.to(p_blocks.dtype.element_ty)


@triton.jit
def copy_value(
    p_value, p_value_blocks, i_token, i_head, i_block, i_offset,
    stride_token, stride_head, stride_block, stride_block_head, stride_block_token,
    DIM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Copy one token's values of one K/V head to their place."""
    o_dim = tl.arange(0, BLOCK)
    b_value = tl.load(p_value + i_token * stride_token + i_head * stride_head + o_dim, mask=o_dim < DIM)
    o_value = i_block * stride_block + i_head * stride_block_head + i_offset * stride_block_token
    tl.store(p_value_blocks + o_value + o_dim, narrowed(b_value, p_value_blocks), mask=o_dim < DIM)


@kernel
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
    tl.store(p_key_blocks + o_key + o_dim, narrowed(b_key, p_key_blocks), mask=o_dim < KEY_DIM)
    copy_value(
        p_value, p_value_blocks, i_token, i_head, i_block, i_offset, stride_value_token, stride_value_head,
        stride_value_block, stride_value_block_head, stride_value_block_token, VALUE_DIM, BLOCK,
    )  # fmt: skip


def write_kv(key: Tensor, value: Tensor, key_blocks: Tensor, value_blocks: Tensor, block_ids: Tensor, offsets: Tensor) -> None:
    """Store key [T, Hkv, D] and value [T, Hkv, Dv] of token t at [block_ids[t], :, offsets[t]].

    block_ids and offsets are integers [T]; (block, offset) pairs must differ from each other. key_blocks is [N, Hkv, B, D], value_blocks
    [N, Hkv, B, Dv]; last dimensions are contiguous. In blocks of float8_e4m3fn the largest finite value stands for all beyond it. Moves
    each value twice. Raises ValueError for other strides.
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


@kernel
def rotate_write_kernel(
    p_heads, p_value, p_cos, p_sin, p_out, p_key_blocks, p_value_blocks, p_block_ids, p_offsets, query_heads,
    stride_token, stride_head, stride_value_token, stride_value_head,
    stride_key_block, stride_key_block_head, stride_key_block_token,
    stride_value_block, stride_value_block_head, stride_value_block_token,
    DIM: tl.constexpr, HALF: tl.constexpr, VALUE_DIM: tl.constexpr,
    BLOCK_HALF: tl.constexpr, BLOCK_REST: tl.constexpr, BLOCK_VALUE: tl.constexpr,
):  # fmt: skip
    """One program owns one head of one token and turns its pairs (i, i + HALF); dimensions from 2 · HALF on are copied.

    A query head goes to p_out [T, Hq, DIM], a key head to its block, and the program of a key head copies the values of that head too.
    """
    i_token, i_head = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    o_pair, o_rest = tl.arange(0, BLOCK_HALF), 2 * HALF + tl.arange(0, BLOCK_REST)
    m_pair, m_rest = o_pair < HALF, o_rest < DIM
    p_head = p_heads + i_token * stride_token + i_head * stride_head
    b_cos = tl.load(p_cos + i_token * HALF + o_pair, mask=m_pair, other=0.0).to(tl.float32)
    b_sin = tl.load(p_sin + i_token * HALF + o_pair, mask=m_pair, other=0.0).to(tl.float32)
    b_first = tl.load(p_head + o_pair, mask=m_pair, other=0.0).to(tl.float32)  # [BLOCK_HALF]
    b_second = tl.load(p_head + o_pair + HALF, mask=m_pair, other=0.0).to(tl.float32)
    b_low = (b_first * b_cos - b_second * b_sin).to(p_heads.dtype.element_ty)
    b_high = (b_second * b_cos + b_first * b_sin).to(p_heads.dtype.element_ty)
    if i_head < query_heads:
        p_query = p_out + (i_token * query_heads + i_head) * DIM
        tl.store(p_query + o_pair, b_low, mask=m_pair)
        tl.store(p_query + o_pair + HALF, b_high, mask=m_pair)
        if DIM > 2 * HALF:
            tl.store(p_query + o_rest, tl.load(p_head + o_rest, mask=m_rest), mask=m_rest)
    else:
        i_block, i_offset = tl.load(p_block_ids + i_token).to(tl.int64), tl.load(p_offsets + i_token).to(tl.int64)
        i_kv_head = i_head - query_heads
        p_key = p_key_blocks + i_block * stride_key_block + i_kv_head * stride_key_block_head + i_offset * stride_key_block_token
        tl.store(p_key + o_pair, narrowed(b_low, p_key_blocks), mask=m_pair)
        tl.store(p_key + o_pair + HALF, narrowed(b_high, p_key_blocks), mask=m_pair)
        if DIM > 2 * HALF:
            tl.store(p_key + o_rest, narrowed(tl.load(p_head + o_rest, mask=m_rest), p_key_blocks), mask=m_rest)
        copy_value(
            p_value, p_value_blocks, i_token, i_kv_head, i_block, i_offset, stride_value_token, stride_value_head,
            stride_value_block, stride_value_block_head, stride_value_block_token, VALUE_DIM, BLOCK_VALUE,
        )  # fmt: skip


def rotate_write(
    heads: Tensor,
    value: Tensor,
    cos: Tensor,
    sin: Tensor,
    key_blocks: Tensor,
    value_blocks: Tensor,
    block_ids: Tensor,
    offsets: Tensor,
) -> Tensor:
    """`elementwise.rotate` of heads [T, Hq + Hkv, D], the query heads first, and `write_kv` of the key heads and value [T, Hkv, Dv].

    The rotated query heads [T, Hq, D]; cos and sin [T, rotary_dim / 2]; the rest as in `write_kv`, and the same bits. Moves each value
    twice, and so reads and writes the keys once less than the two calls. Raises ValueError for strides as `write_kv` does.
    """
    if any(tensor.stride(-1) != 1 for tensor in (heads, value, key_blocks, value_blocks)):
        raise ValueError("the last dimension of heads, values and their blocks must be contiguous")
    (tokens, count, size), half = heads.shape, cos.shape[-1]
    query_heads = count - value.shape[1]
    out = torch.empty((tokens, query_heads, size), dtype=heads.dtype, device=heads.device)
    if tokens:
        rotate_write_kernel[(tokens, count)](
            heads, value, cos.contiguous(), sin.contiguous(), out, key_blocks, value_blocks, block_ids, offsets, query_heads,
            *heads.stride()[:2], *value.stride()[:2], *key_blocks.stride()[:3], *value_blocks.stride()[:3],
            DIM=size, HALF=half, VALUE_DIM=value.shape[2], BLOCK_HALF=triton.next_power_of_2(half),
            BLOCK_REST=triton.next_power_of_2(max(size - 2 * half, 1)), BLOCK_VALUE=triton.next_power_of_2(value.shape[2]), num_warps=1,
        )  # fmt: skip
    return out
