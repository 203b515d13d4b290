"""Products whose tile does not depend on the number of rows: every edge of a tile, rows apart, bad rows and bad shapes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from service.kernels import reference
from service.kernels.gpu.ordered_linear import OrderedLinear, ordered_linear, ordered_tile
from tests.kernels.gpu.conftest import COMPILED, DEVICE, DTYPES, check_error


def drawn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [0, 1, 32, 33, 65])
@pytest.mark.parametrize("shape", [(1, 5), (33, 257), (130, 64)])
def test_products_of_every_shape(shape: tuple[int, int], rows: int, dtype: torch.dtype) -> None:
    weight, bias, x = drawn(*shape, dtype=dtype), drawn(shape[0], seed=1, dtype=dtype), drawn(rows, shape[1], seed=2, dtype=dtype)
    linear = OrderedLinear(weight.to(DEVICE))
    for offset in (None, bias):
        found = linear.apply(x.to(DEVICE), None if offset is None else offset.to(DEVICE)).cpu()
        expected = reference.linear(x.double(), weight.double(), None if offset is None else offset.double())
        check_error(found, expected, reference.linear(x, weight, offset), dtype)
    assert (linear.outputs, linear.inputs, linear.bytes) == (*shape, weight.nbytes)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_has_the_same_bits_in_every_batch(dtype: torch.dtype) -> None:
    """At one place of a tile in the interpreter, whose products are BLAS's and not the kernel's; on a device at any."""
    weight, x = drawn(70, 200, dtype=dtype).to(DEVICE), drawn(140, 200, seed=1, dtype=dtype).to(DEVICE)
    together, step = ordered_linear(x, weight), ordered_tile(dtype).rows
    for first, rows in ((0, 1), (0, 31), (step, 2), (step, 40), *(((3, 1), (17, 90)) if COMPILED else ())):
        assert torch.equal(ordered_linear(x[first : first + rows], weight), together[first : first + rows])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("fault", ["element", "scale", "bias"])
def test_planted_faults_are_seen(fault: str, dtype: torch.dtype) -> None:
    """One weight of another sign, the weights of one output 2 % off (bfloat16: 10 %), one output without its bias."""
    weight, bias, x = drawn(33, 70, dtype=dtype), drawn(33, seed=1, dtype=dtype), drawn(5, 70, seed=2, dtype=dtype)
    bad = {"element": (weight.clone(), bias), "scale": (weight.clone(), bias), "bias": (weight, bias.clone())}[fault]
    if fault == "bias":
        bad[1][20] = 0
    else:
        at = (20, 30) if fault == "element" else 20
        bad[0][at] *= -1 if fault == "element" else (1.1 if dtype == torch.bfloat16 else 1.02)
    expected, plain = reference.linear(x.double(), weight.double(), bias.double()), reference.linear(x, weight, bias)
    check_error(ordered_linear(*(tensor.to(DEVICE) for tensor in (x, weight, bias))).cpu(), expected, plain, dtype)
    with pytest.raises(AssertionError):
        check_error(ordered_linear(*(tensor.to(DEVICE) for tensor in (x, *bad))).cpu(), expected, plain, dtype)


def test_the_tile_is_one_whatever_the_rows() -> None:
    assert len({ordered_tile(dtype) for dtype in (torch.bfloat16, torch.float16)}) == 1


def test_a_row_that_is_not_finite_disturbs_no_other() -> None:
    weight, x = drawn(20, 40).to(DEVICE), drawn(5, 40, seed=1)
    sound = ordered_linear(x.to(DEVICE), weight)
    x[2, 3] = float("nan")
    found = ordered_linear(x.to(DEVICE), weight)
    assert found[2].isnan().all() and torch.equal(found[[0, 1, 3, 4]], sound[[0, 1, 3, 4]])


def test_strided_rows_and_weights() -> None:
    wide, turned = drawn(9, 80).to(DEVICE), drawn(40, 24, seed=1).t().to(DEVICE)
    assert torch.equal(ordered_linear(wide[:, ::2], turned), ordered_linear(wide[:, ::2].contiguous(), turned.contiguous()))


def test_what_does_not_fit_is_refused() -> None:
    weight = drawn(8, 12).to(DEVICE)
    for x, bias in ((drawn(3, 11), None), (drawn(3, 12, dtype=torch.float16), None), (drawn(3, 12), drawn(7))):
        with pytest.raises(ValueError, match="do not fit a weight"):
            ordered_linear(x.to(DEVICE), weight, bias)
