"""Attention to image tokens: torch and the compiled kernels against one softmax for each row, and rows that do not see each other."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from service.kernels import cross_attention
from service.kernels.native import binding
from service.kernels.native import cross_attention as native

IMPLEMENTATIONS = [cross_attention.attend_images, *([] if binding.absent() else [native.attend_images])]
SCALE = 0.4


def drawn(images: int, rows: int, heads: int, kv_heads: int, size: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(images)
    query = torch.randn(rows, heads, size, generator=generator)
    keys, values = (torch.randn(images, kv_heads, size, generator=generator) for _ in range(2))
    return query, keys, values


def expected(query: Tensor, keys: Tensor, values: Tensor, counts: Tensor) -> Tensor:
    """Float64, row by row and head by head."""
    out, group = torch.empty(query.shape, dtype=torch.float64), query.shape[1] // keys.shape[1]
    for row, count in enumerate(counts.tolist()):
        for head in range(query.shape[1]):
            shared = head // group
            weights = (keys[:count, shared].double() @ query[row, head].double() * SCALE).softmax(0)
            out[row, head] = weights @ values[:count, shared].double()
    return out


@pytest.mark.parametrize("attend", IMPLEMENTATIONS, ids=lambda kernel: kernel.__module__.split(".")[-2])
@pytest.mark.parametrize(("images", "heads", "kv_heads", "size"), [(1, 2, 2, 8), (12, 4, 2, 16), (64, 3, 1, 24), (150, 4, 4, 16)])
def test_rows_read_as_many_image_tokens_as_they_count(
    attend: Callable[..., Tensor], images: int, heads: int, kv_heads: int, size: int
) -> None:
    query, keys, values = drawn(images, 7, heads, kv_heads, size)
    counts = torch.tensor([1, images, 1 + images // 2, images, 1, images, images])
    torch.testing.assert_close(
        attend(query, keys, values, counts, SCALE).double(), expected(query, keys, values, counts), atol=1e-5, rtol=1e-5
    )
    everything = expected(query, keys, values, torch.full((7,), images))
    torch.testing.assert_close(attend(query, keys, values, None, SCALE).double(), everything, atol=1e-5, rtol=1e-5)


@pytest.mark.skipif(binding.absent() is not None, reason="the compiled kernels are not built")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_has_the_same_bits_alone_and_before_later_images_are_there(dtype: torch.dtype) -> None:
    query, keys, values = (x.to(dtype) for x in drawn(130, 20, 4, 2, 16))
    counts = torch.arange(20) * 6 + 5
    together = native.attend_images(query, keys, values, counts, SCALE)
    for row, count in enumerate(counts.tolist()):
        one = slice(row, row + 1)
        assert torch.equal(native.attend_images(query[one], keys, values, counts[one], SCALE), together[one])
        assert torch.equal(native.attend_images(query[one], keys[:count], values[:count], None, SCALE), together[one])
