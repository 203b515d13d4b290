"""Ordered linear layers: float64's answer in every type and instruction set, and a row's bits whatever is around it."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from service.kernels import reference
from service.kernels.native import linear as native_linear
from service.kernels.native.linear import COLUMNS, OrderedLinear, ordered_linear
from tests.kernels.conftest import needs_native

pytestmark = needs_native
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Inputs around a vector, a panel's depth and twice that; outputs around a vector and a panel.
SHAPES = ((1, 1), (5, 3), (33, 17), (63, 40), (64, 64), (65, 1023), (130, 1024), (70, 1025), (16, 2500))


def drawn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_both_layouts_equal_the_reference(shape: tuple[int, int], dtype: torch.dtype, instructions: str) -> None:
    weight, bias = drawn(*shape, dtype=dtype), drawn(shape[0], seed=1, dtype=dtype)
    packed, before = OrderedLinear(weight), weight.clone()
    for rows in (0, 1, 6, 7, 97):
        x = drawn(rows, shape[1], seed=rows, dtype=dtype)
        for offset in (None, bias):
            found = packed.apply(x, offset)
            expected = reference.linear(x.double(), weight.double(), None if offset is None else offset.double())
            size = reference.linear(x.double().abs(), weight.double().abs(), None if offset is None else offset.double().abs())
            rounding = 0.0 if dtype == torch.float32 else torch.finfo(dtype).eps
            assert found.dtype == dtype and found.shape == expected.shape
            assert ((found.double() - expected).abs() <= 1e-5 * size + rounding * expected.abs()).all()
            assert torch.equal(ordered_linear(x, weight, offset), found)
    assert torch.equal(weight, before) and (packed.outputs, packed.inputs, packed.bytes) == (*shape, weight.nbytes)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(65, 1030), (130, 48)])
def test_a_row_has_the_same_bits_in_every_batch(shape: tuple[int, int], dtype: torch.dtype, instructions: str) -> None:
    weight, bias, x = drawn(*shape, dtype=dtype), drawn(shape[0], seed=1, dtype=dtype), drawn(230, shape[1], seed=2, dtype=dtype)
    packed = OrderedLinear(weight)
    together = packed.apply(x, bias)
    for rows in (*range(1, 14), 31, 95, 96, 97, 192, 229):
        for first in {0, 1, 230 - rows}:
            some = slice(first, first + rows)
            assert torch.equal(packed.apply(x[some], bias), together[some]), (rows, first)
            assert torch.equal(ordered_linear(x[some], weight, bias), together[some]), (rows, first)


def test_the_same_bits_with_any_number_of_threads() -> None:
    weight, x = drawn(700, 300), drawn(50, 300, seed=1)
    packed, threads, found = OrderedLinear(weight), torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found += [packed.apply(x), ordered_linear(x, weight)]
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(found[0], other) for other in found[1:])


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_that_is_not_finite_disturbs_no_other(dtype: torch.dtype) -> None:
    weight, x = drawn(70, 40, dtype=dtype), drawn(9, 40, seed=1, dtype=dtype)
    packed = OrderedLinear(weight)
    sound = packed.apply(x)
    for bad in (float("nan"), float("inf")):
        spoiled = x.clone()
        spoiled[4, 7] = bad
        found, others = packed.apply(spoiled), [row for row in range(9) if row != 4]
        assert not found[4].isfinite().any() and torch.equal(found[others], sound[others])


def test_strided_rows_and_weights() -> None:
    wide, turned = drawn(9, 80), drawn(40, 24, seed=1).t()
    expected = ordered_linear(wide[:, ::2].contiguous(), turned.contiguous())
    assert torch.equal(ordered_linear(wide[:, ::2], turned), expected)
    assert torch.equal(OrderedLinear(turned).apply(wide[:, ::2]), expected)


def test_a_packed_weight_is_a_copy() -> None:
    weight, x = drawn(COLUMNS + 1, 12), drawn(3, 12, seed=1)
    packed = OrderedLinear(weight)
    expected = packed.apply(x)
    weight.zero_()
    assert torch.equal(packed.apply(x), expected) and expected.abs().max() > 0


def test_what_does_not_fit_is_refused() -> None:
    packed = OrderedLinear(drawn(8, 12))
    with pytest.raises(ValueError, match=r"rows \(3, 11\) .* do not fit a torch.float32 weight of 8 outputs and 12 inputs"):
        packed.apply(drawn(3, 11))
    with pytest.raises(ValueError, match="or its bias"):
        ordered_linear(drawn(3, 12), drawn(8, 12), drawn(7))
    with pytest.raises(ValueError, match=r"float32 do not fit a torch\.bfloat16 weight"):
        ordered_linear(drawn(3, 12), drawn(8, 12, dtype=torch.bfloat16))


@pytest.mark.parametrize(
    ("name", "pairs", "units", "expected"),
    [("amx", 1, True, True), ("avx512", 1, True, False), ("avx512", 1, False, True), ("avx512", 0, False, False)],
)
def test_where_bfloat16_is_multiplied_well(monkeypatch: pytest.MonkeyPatch, name: str, pairs: int, units: bool, expected: bool) -> None:
    """By matrix units, or by dot products where there are no such units for libraries alone."""
    library = SimpleNamespace(name=name, functions=SimpleNamespace(native_has_pairs=lambda: pairs))
    monkeypatch.setattr(native_linear, "compiled", lambda: library)
    monkeypatch.setattr(native_linear, "multiplies_tiles", lambda: units)
    assert native_linear.multiplies_bfloat16() is expected
    assert (native_linear.slower(torch.bfloat16) is None) is expected
    monkeypatch.setattr(native_linear, "compiled", lambda: "was not built")
    assert not native_linear.multiplies_bfloat16()
