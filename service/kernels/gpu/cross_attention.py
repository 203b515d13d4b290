"""Attention of text rows to the image tokens that their sequence has seen, in one launch.

It does not know sequences, prompts or gates. Invariant: a row's image tokens are summed upwards, IMAGES at a time, and a tile of finite
values of which it sees nothing changes nothing: it has the same bits alone, among others, and before later images are there.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from service.kernels.gpu.compiling import kernel
from service.kernels.gpu.online_softmax import LOG2_E, add_tile, finish_rows, score_tile, start_rows


def image_tile(dtype: torch.dtype, size: int) -> tuple[int, int, int]:
    """(pairs of a row and a query head, image tokens, padded head size) of a tile: by type and size alone, since they are part of the
    arithmetic. 64 pairs are the fewest that Hopper multiplies by warp group; 32 tokens of 128 numbers leave sm_80 enough registers.
    """
    padded = max(16, triton.next_power_of_2(size))
    return 16 if dtype == torch.float32 else 64, 64 if padded <= 64 else 32, padded


@kernel
def images_kernel(
    p_query, p_keys, p_values, p_counts, p_out, rows, images, scale, stride_query_row, stride_query_head,
    stride_key_image, stride_key_head, stride_value_image, stride_value_head,
    GROUP: tl.constexpr, ROWS: tl.constexpr, IMAGES: tl.constexpr, DIM: tl.constexpr, BLOCK_DIM: tl.constexpr,
    COUNTED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program owns ROWS pairs of a row and a query head of one K/V head and loops over the image tokens; sums stay in registers."""
    i_head = tl.program_id(1).to(tl.int64)
    o_pair, o_dim = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, BLOCK_DIM)
    o_row, o_head = (o_pair // GROUP).to(tl.int64), i_head * GROUP + o_pair % GROUP
    m_row, m_dim = o_row < rows, o_dim < DIM
    m_rows = m_row[:, None] & m_dim[None, :]
    p_rows = p_query + (o_row * stride_query_row + o_head * stride_query_head)[:, None] + o_dim[None, :]
    b_query = tl.load(p_rows, mask=m_rows, other=0.0)  # [ROWS, BLOCK_DIM]
    b_count = tl.load(p_counts + o_row, mask=m_row, other=1) if COUNTED else tl.full([ROWS], 0, tl.int64) + images
    b_max, b_sum, b_acc = start_rows(ROWS, BLOCK_DIM)
    for i_from in range(0, images, IMAGES):
        o_image = (i_from + tl.arange(0, IMAGES)).to(tl.int64)
        m_images = (o_image < images)[:, None] & m_dim[None, :]
        p_key = p_keys + i_head * stride_key_head + (o_image * stride_key_image)[:, None] + o_dim[None, :]
        p_value = p_values + i_head * stride_value_head + (o_image * stride_value_image)[:, None] + o_dim[None, :]
        b_keys, b_values = tl.load(p_key, mask=m_images, other=0.0), tl.load(p_value, mask=m_images, other=0.0)  # [IMAGES, BLOCK_DIM]
        b_scores = score_tile(b_query, b_keys, 1.0, scale, False, False, PRECISION)
        b_scores = tl.where(o_image[None, :] < b_count[:, None], b_scores, float("-inf"))
        b_max, b_sum, b_acc = add_tile(b_scores, b_values, 1.0, b_max, b_sum, b_acc, scale, 0.0, False, False, PRECISION, b_query.dtype)
    b_out = finish_rows(b_max, b_sum, b_acc, 0.0, False)
    o_out = ((o_row * tl.num_programs(1) * GROUP + o_head) * DIM)[:, None] + o_dim[None, :]
    tl.store(p_out + o_out, b_out, mask=m_rows)


def attend_images(query: Tensor, keys: Tensor, values: Tensor, counts: Tensor | None, scale: float) -> Tensor:
    """query [R, H, D], keys and values [N, Hkv, D] of image tokens -> [R, H, D], all of one type; weights are rounded to it.

    `counts` [R] int64, each at least 1, says how many image tokens each row sees; None: each sees all. 4 · R · H · N · D FLOPs; keys and
    values are read once for each 64 (float32: 16) pairs of a row and a query head. Raises ValueError for shapes or types that do not fit.
    """
    (rows, heads, size), (images, kv_heads, _) = query.shape, keys.shape
    if keys.shape != values.shape or keys.shape[2] != size or heads % kv_heads or not query.dtype == keys.dtype == values.dtype:
        raise ValueError(f"queries {tuple(query.shape)} {query.dtype} do not fit keys {tuple(keys.shape)} {keys.dtype}, or their values")
    if counts is not None and counts.shape != (rows,):
        raise ValueError(f"counts {tuple(counts.shape)} must be one for each of {rows} rows")
    query, keys, values = (tensor if tensor.stride(2) == 1 else tensor.contiguous() for tensor in (query, keys, values))
    out, group = query.new_empty(rows, heads, size), heads // kv_heads
    pairs, tokens, padded = image_tile(query.dtype, size)
    if rows:
        images_kernel[(triton.cdiv(rows * group, pairs), kv_heads)](
            query, keys, values, counts, out, rows, images, scale * LOG2_E, *query.stride()[:2], *keys.stride()[:2], *values.stride()[:2],
            GROUP=group, ROWS=pairs, IMAGES=tokens, DIM=size, BLOCK_DIM=padded, COUNTED=counts is not None,
            PRECISION="ieee" if query.dtype == torch.float32 else "tf32", num_warps=4, num_stages=2,
        )  # fmt: skip
    return out
