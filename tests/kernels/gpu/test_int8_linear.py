"""Products with int8 weights on the GPU's kernels: torch's steps, exact sums at every tile's edge, rows apart, bad rows."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from service.kernels import quantised
from service.kernels.gpu import int8_linear
from service.kernels.quantised import QuantisedWeight, quantise_weight
from tests.kernels.gpu.conftest import DEVICE, DTYPES, check_error


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def product(x: Tensor, weight: QuantisedWeight, bias: Tensor | None = None) -> Tensor:
    """The answer in float64 of rows quantised as torch quantises them."""
    steps, scales = quantised.quantise_rows(x.float())
    out = (steps.double() @ weight.values.double().t()) * (scales.double() * weight.scales.double())
    return out if bias is None else out + bias.double()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("inputs", [1, 31, 320, 5000])
def test_rows_are_quantised_as_torch_does_it(inputs: int, dtype: torch.dtype) -> None:
    x = (drawn(5, inputs) * torch.logspace(-3, 3, 5)[:, None]).to(dtype)
    x[3] = 0
    steps, scales = int8_linear.quantise_rows(x.to(DEVICE))
    expected, expected_scales = quantised.quantise_rows(x.float())
    assert torch.equal(steps.cpu().float(), expected) and torch.equal(scales.cpu()[:, None], expected_scales)


@pytest.mark.parametrize("rows", [0, 1, 16, 17, 33, 65])
@pytest.mark.parametrize("shape", [(32, 64), (1, 5), (33, 257), (130, 100)])
def test_products_of_every_shape(rows: int, shape: tuple[int, int]) -> None:
    weight, x, bias = quantise_weight(drawn(*shape), "int8"), drawn(rows, shape[1], seed=1) * 3, drawn(shape[0], seed=2)
    linear = int8_linear.GpuQuantisedLinear(weight)
    for offset in (None, bias):
        found = linear.apply(x.to(DEVICE), None if offset is None else offset.to(DEVICE)).cpu()
        check_error(found, product(x, weight, offset), found, torch.float32)


@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_sixteen_bits(dtype: torch.dtype) -> None:
    weight, x = quantise_weight(drawn(40, 96), "int8"), drawn(9, 96, seed=1).to(dtype)
    found = int8_linear.GpuQuantisedLinear(weight).apply(x.to(DEVICE)).cpu()
    exact = product(x, weight)
    check_error(found, exact, exact.to(dtype), dtype)


def test_a_row_has_the_same_bits_alone_in_a_batch_and_in_any_tile() -> None:
    weight, x = quantise_weight(drawn(80, 96), "int8"), drawn(70, 96, seed=1)
    linear = int8_linear.GpuQuantisedLinear(weight)
    together = linear.apply(x.to(DEVICE))
    for rows in (slice(0, 1), slice(3, 20), slice(30, 70)):
        assert torch.equal(linear.apply(x[rows].to(DEVICE)), together[rows])


def test_a_row_that_is_not_finite_stays_so_and_disturbs_no_other() -> None:
    linear, x = int8_linear.GpuQuantisedLinear(quantise_weight(drawn(20, 40), "int8")), drawn(4, 40)
    sound = linear.apply(x.to(DEVICE))
    for bad in (float("nan"), float("inf"), float("-inf")):
        spoiled = x.clone()
        spoiled[2, 3] = bad
        found = linear.apply(spoiled.to(DEVICE))
        assert not found[2].isfinite().any() and torch.equal(found[[0, 1, 3]], sound[[0, 1, 3]])


def test_four_bits_go_through_torch() -> None:
    weight, x = quantise_weight(drawn(20, 64), "int4"), drawn(3, 64)
    found = int8_linear.GpuQuantisedLinear(weight).apply(x.to(DEVICE)).cpu()
    torch.testing.assert_close(found, quantised.TorchQuantisedLinear(weight).apply(x))


@pytest.mark.parametrize("rows", [1, 20, 65])
@pytest.mark.parametrize("dtype", DTYPES)
def test_weight_only_products(rows: int, dtype: torch.dtype) -> None:
    weight, x, bias = quantise_weight(drawn(50, 130), "int8"), drawn(rows, 130, seed=1).to(dtype), drawn(50, seed=2)
    values, scales = weight.values.to(DEVICE), weight.scales.to(DEVICE)
    found = int8_linear.weight_only_linear(x.to(DEVICE), values, scales, bias.to(DEVICE)).cpu()
    exact = x.double() @ (weight.values.double() * weight.scales.double()[:, None]).t() + bias.double()
    plain = (x @ (weight.values.to(dtype) * weight.scales.to(dtype)[:, None]).t()) + bias.to(dtype)
    check_error(found, exact, plain, dtype)


def test_a_scale_two_percent_off_is_noticed() -> None:
    weight, x = quantise_weight(drawn(20, 64), "int8"), drawn(3, 64)
    off = QuantisedWeight("int8", 64, weight.values, weight.scales * 1.02)
    found = int8_linear.GpuQuantisedLinear(off).apply(x.to(DEVICE)).cpu()
    with pytest.raises(AssertionError):
        check_error(found, product(x, weight), found, torch.float32)
