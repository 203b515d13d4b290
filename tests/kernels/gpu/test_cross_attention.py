"""Attention to image tokens against one softmax for each row in float64; a row's bits; what does not fit."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from service.kernels import cross_attention as plain
from service.kernels.gpu import cross_attention as ours
from tests.kernels.gpu.conftest import DEVICE, DTYPES, check_error

SCALE = 0.4


def drawn(dtype: torch.dtype, images: int, rows: int, heads: int, kv_heads: int, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values; these two as halves of one product."""
    generator = torch.Generator().manual_seed(images)
    query, both = torch.randn(rows, heads, size, generator=generator), torch.randn(images, 2, kv_heads, size, generator=generator)
    keys, values = both.to(dtype).to(DEVICE).unbind(1)
    return query.to(dtype).to(DEVICE), keys, values


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("counted", [True, False])
@pytest.mark.parametrize(("images", "heads", "kv_heads", "size"), [(1, 2, 2, 8), (12, 4, 2, 16), (64, 3, 1, 24), (150, 4, 4, 64)])
def test_rows_read_as_many_image_tokens_as_they_count(
    images: int, heads: int, kv_heads: int, size: int, counted: bool, dtype: torch.dtype
) -> None:
    inputs = drawn(dtype, images, 35, heads, kv_heads, size)
    counts = 1 + torch.arange(35, device=DEVICE) * 7 % images if counted else None
    found = ours.attend_images(*inputs, counts, SCALE)
    there = [tensor.cpu() for tensor in inputs]
    asked = None if counts is None else counts.cpu()
    expected = plain.attend_images(*(tensor.double() for tensor in there), asked, SCALE)
    check_error(found.cpu(), expected, plain.attend_images(*there, asked, SCALE), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_has_the_same_bits_alone_and_before_later_images_are_there(dtype: torch.dtype) -> None:
    query, keys, values = drawn(dtype, 130, 20, 4, 2, 16)
    counts = torch.arange(20, device=DEVICE) * 6 + 5
    together = ours.attend_images(query, keys, values, counts, SCALE)
    for row, count in ((0, 5), (7, 47), (10, 65), (19, 119)):
        one = slice(row, row + 1)
        assert torch.equal(ours.attend_images(query[one], keys, values, counts[one], SCALE), together[one])
        assert torch.equal(ours.attend_images(query[one], keys[:count], values[:count], None, SCALE), together[one])


def test_a_token_too_many_is_seen() -> None:
    query, keys, values = drawn(torch.float32, 70, 3, 2, 1, 16)
    found = [ours.attend_images(query, keys, values, torch.full((3,), count, device=DEVICE), SCALE) for count in (65, 66)]
    assert (found[0] != found[1]).any(-1).all()


def test_none_and_what_does_not_fit() -> None:
    query, keys, values = drawn(torch.float32, 5, 3, 4, 2, 16)
    assert ours.attend_images(query[:0], keys, values, None, SCALE).shape == (0, 4, 16)
    for wrong in ((query[:, :3], keys, values), (query, keys[..., :8], values), (query, keys, values[:2]), (query.half(), keys, values)):
        with pytest.raises(ValueError, match="do not fit"):
            ours.attend_images(*wrong, None, SCALE)
    with pytest.raises(ValueError, match="one for each of 3 rows"):
        ours.attend_images(query, keys, values, torch.ones(2, dtype=torch.int64, device=DEVICE), SCALE)
