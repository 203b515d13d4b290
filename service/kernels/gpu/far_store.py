"""The far store on a GPU: near blocks quantised into far ones, with bounds of their keys.

It does not know sequences. Invariant: arithmetic is that of `reference_sparse`, operation for operation: divisions and roundings are the
IEEE ones, so both write the same bytes.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from service.kernels.gpu.compiling import kernel
from service.kernels.reference_sparse import FarBlocks


@triton.jit
def round_half_even(b_x):
    """Round float32 values below 2^22 to whole numbers, ties to even: the sum with 1.5 · 2^23 has no room for a fraction."""
    return (b_x + 12582912.0) - 12582912.0


@triton.jit
def quantise_rows(b_x, LEVELS: tl.constexpr):
    """(units [B, D] float32, scales [B] float16) of rows b_x [B, D] float32: `reference_sparse.quantise`."""
    b_scales = tl.math.div_rn(tl.max(tl.abs(b_x), 1, return_indices=False), LEVELS * 1.0).to(tl.float16)
    b_units = b_scales.to(tl.float32)
    m_usable = (b_units > 0) & (b_units < float("inf"))
    b_ratio = tl.math.div_rn(b_x, tl.where(m_usable, b_units, 1.0)[:, None])
    b_ratio = tl.where(m_usable[:, None], b_ratio, 0.0)
    return tl.minimum(tl.maximum(round_half_even(b_ratio), -LEVELS), LEVELS), b_scales


@triton.jit
def store_rows(p_stored, b_units, o_tokens, stride_token, DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, NIBBLES: tl.constexpr):
    """Store whole units [B, BLOCK_DIM] as int8, or two a byte with the even index in the low nibble."""
    if NIBBLES:
        b_low, b_high = tl.split(tl.reshape(b_units.to(tl.int8), [o_tokens.shape[0], BLOCK_DIM // 2, 2]))
        b_packed = (b_low & 15).to(tl.uint8) | ((b_high & 15).to(tl.uint8) << 4)
        o_dim = tl.arange(0, BLOCK_DIM // 2)
        tl.store(p_stored + o_tokens[:, None] * stride_token + o_dim[None, :], b_packed, mask=(o_dim < DIM // 2)[None, :])
    else:
        o_dim = tl.arange(0, BLOCK_DIM)
        tl.store(p_stored + o_tokens[:, None] * stride_token + o_dim[None, :], b_units.to(tl.int8), mask=(o_dim < DIM)[None, :])


@triton.jit
def whole_units(b_x, b_unit, m_usable):
    """The least whole number of units that is not below b_x, even where the quotient was rounded down."""
    b_count = tl.ceil(tl.math.div_rn(b_x, tl.zeros_like(b_x) + tl.where(m_usable, b_unit, 1.0)))
    b_count = tl.where(b_count * b_unit < b_x, b_count + 1.0, b_count)
    return tl.where(m_usable, b_count, 0.0).to(tl.int8)


@triton.jit
def store_bounds(p_bounds, b_high, b_low, b_unit, m_usable, o_parts, DIM: tl.constexpr, BLOCK_DIM: tl.constexpr):
    """Store the bounds of parts o_parts [P] of a block, highest and lowest keys [P, BLOCK_DIM], as int8 [part, 2, DIM]."""
    o_dim = tl.arange(0, BLOCK_DIM)
    o_at = o_parts[:, None] * (2 * DIM) + o_dim[None, :]
    m_at = (o_dim < DIM)[None, :]
    tl.store(p_bounds + o_at, whole_units(b_high, b_unit, m_usable), mask=m_at)
    tl.store(p_bounds + o_at + DIM, -whole_units(-b_low, b_unit, m_usable), mask=m_at)


@kernel
def demote_kernel(
    p_keys, p_values, p_far_keys, p_far_values, p_key_scales, p_value_scales,
    p_bounds, p_part_bounds, p_bound_scales, p_near_ids, p_far_ids,
    stride_key_block, stride_key_head, stride_key_token: tl.constexpr, stride_value_block, stride_value_head,
    stride_value_token: tl.constexpr,
    stride_far_key_block, stride_far_key_head, stride_far_key_token: tl.constexpr, stride_far_value_block, stride_far_value_head,
    stride_far_value_token: tl.constexpr,
    stride_scale_block, stride_scale_head, stride_bound_block, stride_bound_head, stride_part_block, stride_part_head,
    stride_bound_scale_block, stride_bound_scale_head,
    KEY_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_KEY: tl.constexpr, BLOCK_VALUE: tl.constexpr, BLOCK_TOKENS: tl.constexpr,
    SUBS: tl.constexpr, LEVELS: tl.constexpr,
):  # fmt: skip
    """One program owns one block and K/V head: keys and values [B, D] in registers; LEVELS 127, 7, or 0 for a store of the near type."""
    i_near, i_far = tl.load(p_near_ids + tl.program_id(0)).to(tl.int64), tl.load(p_far_ids + tl.program_id(0)).to(tl.int64)
    i_head = tl.program_id(1).to(tl.int64)
    o_tokens, o_key, o_value = tl.arange(0, BLOCK_TOKENS), tl.arange(0, BLOCK_KEY), tl.arange(0, BLOCK_VALUE)
    m_key, m_value = (o_key < KEY_DIM)[None, :], (o_value < VALUE_DIM)[None, :]
    p_key = p_keys + i_near * stride_key_block + i_head * stride_key_head
    p_value = p_values + i_near * stride_value_block + i_head * stride_value_head
    p_far_key = p_far_keys + i_far * stride_far_key_block + i_head * stride_far_key_head
    p_far_value = p_far_values + i_far * stride_far_value_block + i_head * stride_far_value_head
    b_keys = tl.load(p_key + o_tokens[:, None] * stride_key_token + o_key[None, :], mask=m_key, other=0.0).to(tl.float32)
    b_values = tl.load(p_value + o_tokens[:, None] * stride_value_token + o_value[None, :], mask=m_value, other=0.0).to(tl.float32)
    if LEVELS > 0:
        o_scale = i_far * stride_scale_block + i_head * stride_scale_head + o_tokens
        b_units, b_scales = quantise_rows(b_keys, LEVELS)
        store_rows(p_far_key, b_units, o_tokens, stride_far_key_token, KEY_DIM, BLOCK_KEY, LEVELS == 7)
        tl.store(p_key_scales + o_scale, b_scales)
        b_keys = b_units * b_scales.to(tl.float32)[:, None]
        b_units, b_scales = quantise_rows(b_values, LEVELS)
        store_rows(p_far_value, b_units, o_tokens, stride_far_value_token, VALUE_DIM, BLOCK_VALUE, LEVELS == 7)
        tl.store(p_value_scales + o_scale, b_scales)
    else:
        tl.store(p_far_key + o_tokens[:, None] * stride_far_key_token + o_key[None, :], b_keys, mask=m_key)
        tl.store(p_far_value + o_tokens[:, None] * stride_far_value_token + o_value[None, :], b_values, mask=m_value)
    largest = tl.max(tl.abs(b_keys))
    b_scale = tl.math.div_rn(tl.zeros([1], tl.float32) + largest, 127.0).to(tl.float16)  # [1]
    b_above = (b_scale.to(tl.int16, bitcast=True) + 1).to(tl.float16, bitcast=True)
    b_scale = tl.where(b_scale.to(tl.float32) * 127.0 < largest, b_above, b_scale)
    o_whole, o_subs = tl.arange(0, 1), tl.arange(0, SUBS)
    tl.store(p_bound_scales + i_far * stride_bound_scale_block + i_head * stride_bound_scale_head + o_whole, b_scale)
    b_unit = b_scale.to(tl.float32)[:, None]
    m_usable = (b_unit > 0) & (b_unit < float("inf"))
    p_part = p_part_bounds + i_far * stride_part_block + i_head * stride_part_head
    b_parts = tl.reshape(b_keys, [SUBS, BLOCK_TOKENS // SUBS, BLOCK_KEY])
    store_bounds(p_part, tl.max(b_parts, 1), tl.min(b_parts, 1), b_unit, m_usable, o_subs, KEY_DIM, BLOCK_KEY)
    b_high, b_low = tl.max(b_keys, 0)[None, :], tl.min(b_keys, 0)[None, :]
    p_bound = p_bounds + i_far * stride_bound_block + i_head * stride_bound_head
    store_bounds(p_bound, b_high, b_low, b_unit, m_usable, o_whole, KEY_DIM, BLOCK_KEY)


def demote(key_blocks: Tensor, value_blocks: Tensor, far: FarBlocks, near_ids: Tensor, far_ids: Tensor) -> None:
    """Write full near blocks near_ids [n] into the far blocks far_ids [n]: see `reference_sparse.demote`.

    All tensors on one device, ids integers, bounds contiguous within a head. Reads each block once; at D = Dv = 64 and 8 bits it writes 142
    bytes a token and K/V head. Raises ValueError for another layout.
    """
    plain = far.bounds[0, 0].is_contiguous() and far.part_bounds[0, 0].is_contiguous()
    if not plain or key_blocks.stride(3) != 1 or far.keys.stride(3) != 1:
        raise ValueError("bounds, keys and values of both stores must be contiguous within a head")
    count, kv_heads, tokens, size = near_ids.shape[0], *key_blocks.shape[1:]
    value_size = value_blocks.shape[3]
    levels = 0 if far.key_scales is None else 7 if far.keys.dtype == torch.uint8 else 127
    scales = (far.key_scales, far.value_scales) if levels else (far.keys, far.values)
    scale_strides = far.key_scales.stride()[:2] if far.key_scales is not None else (0, 0)
    if count:
        demote_kernel[(count, kv_heads)](
            key_blocks, value_blocks, far.keys, far.values, *scales, far.bounds, far.part_bounds, far.bound_scales, near_ids, far_ids,
            *key_blocks.stride()[:3], *value_blocks.stride()[:3], *far.keys.stride()[:3], *far.values.stride()[:3],
            *scale_strides, *far.bounds.stride()[:2], *far.part_bounds.stride()[:2], *far.bound_scales.stride(),
            KEY_DIM=size, VALUE_DIM=value_size, BLOCK_KEY=triton.next_power_of_2(size), BLOCK_VALUE=triton.next_power_of_2(value_size),
            BLOCK_TOKENS=tokens, SUBS=far.part_bounds.shape[2], LEVELS=levels, num_warps=8,
        )  # fmt: skip
