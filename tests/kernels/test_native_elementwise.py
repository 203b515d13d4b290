"""Compiled norms and activations against the float64 reference, in every type and instruction set, at every row length."""

from __future__ import annotations

import pytest
import torch

from service.kernels import reference
from service.kernels.native import elementwise
from tests.kernels.conftest import check_close, needs_native

pytestmark = needs_native
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SIZES = (1, 3, 4, 15, 16, 17, 40, 257)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
def test_norms_equal_the_reference(size: int, dtype: torch.dtype, instructions: str) -> None:
    torch.manual_seed(size)
    x, residual, weight = (torch.randn(shape).mul(3).to(dtype) for shape in ((7, size), (7, size), (size,)))
    before = x.clone(), residual.clone()
    check_close(elementwise.rms_norm(x, weight, 1e-5), reference.rms_norm(x.double(), weight.double(), 1e-5), dtype)
    out, total = elementwise.add_rms_norm(x, residual, weight, 1e-5)
    assert torch.equal(total, x + residual)
    check_close(out, reference.rms_norm(total.double(), weight.double(), 1e-5), dtype)
    assert torch.equal(x, before[0]) and torch.equal(residual, before[1])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
def test_swiglu_equals_the_reference(size: int, dtype: torch.dtype, instructions: str) -> None:
    torch.manual_seed(size)
    gate_up = torch.randn(5, 3, 2 * size).mul(4).to(dtype)
    check_close(elementwise.swiglu(gate_up), reference.swiglu(gate_up.double()), dtype)


def test_activations_at_the_ends_of_the_range(instructions: str) -> None:
    gates = torch.tensor([-1e30, -200.0, -88.0, 0.0, 88.0, 200.0, 1e30, float("nan"), float("inf")])
    out = elementwise.swiglu(torch.stack((gates, torch.ones(9)), dim=1))[:, 0]
    assert out[:4].abs().max() < 1e-30
    assert torch.equal(out[4:7], gates[4:7]) and out[7].isnan() and out[8] == float("inf")


@pytest.mark.parametrize("dtype", DTYPES)
def test_sixteen_bits_round_as_torch_rounds(dtype: torch.dtype, instructions: str) -> None:
    """Every bit pattern comes back from a norm that changes nothing, and sums round to nearest even, subnormals and infinity included."""
    every = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype) if dtype != torch.float32 else torch.randn(4096)
    other = every.flip(0)
    total = elementwise.add_rms_norm(every[None], other[None], torch.ones_like(every), 1e-5)[1][0]
    assert torch.equal(total.nan_to_num(7.0, 5e4, -5e4), (every + other).nan_to_num(7.0, 5e4, -5e4))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("size", "half"), [(16, 8), (64, 32), (24, 5), (80, 20), (6, 3), (8, 0)])
def test_rotation_equals_the_reference(size: int, half: int, dtype: torch.dtype, instructions: str) -> None:
    torch.manual_seed(size)
    joint, phase = torch.randn(7, 9, size).to(dtype), torch.rand(7, half) * 6
    x = joint[:, 2:7]
    expected = reference.rotate(x.double(), phase.cos().double(), phase.sin().double())
    check_close(elementwise.rotate(x, phase.cos(), phase.sin()), expected, dtype)
    turned = x.transpose(1, 2).contiguous().transpose(1, 2)
    assert torch.equal(elementwise.rotate(turned, phase.cos(), phase.sin()), elementwise.rotate(x, phase.cos(), phase.sin()))
    with pytest.raises(ValueError, match="do not fit"):
        elementwise.rotate(x, phase.cos()[:6], phase.sin())


def test_the_same_bits_with_any_number_of_threads() -> None:
    x, residual, weight = torch.randn(301, 1280), torch.randn(301, 1280), torch.randn(1280)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append((*elementwise.add_rms_norm(x, residual, weight, 1e-5), elementwise.swiglu(x)))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


def test_views_and_no_rows() -> None:
    x = torch.randn(6, 8).t()
    assert torch.equal(elementwise.rms_norm(x, torch.ones(6), 1e-5), elementwise.rms_norm(x.contiguous(), torch.ones(6), 1e-5))
    assert elementwise.rms_norm(torch.zeros(0, 8), torch.ones(8), 1e-5).shape == (0, 8)
    assert elementwise.swiglu(torch.zeros(0, 8)).shape == (0, 4)


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="does not fit"):
        elementwise.rms_norm(torch.zeros(2, 8), torch.ones(7), 1e-5)
    with pytest.raises(ValueError, match="does not fit"):
        elementwise.add_rms_norm(torch.zeros(2, 8), torch.zeros(3, 8), torch.ones(8), 1e-5)


def test_two_percent_off_is_noticed() -> None:
    x = torch.randn(4, 64)
    with pytest.raises(AssertionError):
        check_close(elementwise.swiglu(x) * 1.02, reference.swiglu(x.double()), torch.float32)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
def test_gates_equal_the_reference_and_see_one_row(size: int, dtype: torch.dtype, instructions: str) -> None:
    torch.manual_seed(size)
    joint, logits = torch.randn(11, 5, size).to(dtype), torch.randn(11, 6).mul(4).to(dtype)
    found = elementwise.head_gate(joint[:, :3], logits[:, :3])
    check_close(found, reference.head_gate(joint[:, :3].double(), logits[:, :3].double()), dtype)
    for row in range(11):
        assert torch.equal(elementwise.head_gate(joint[row : row + 1, :3], logits[row : row + 1, :3]), found[row : row + 1])
    turned = joint.transpose(1, 2).contiguous().transpose(1, 2)
    assert torch.equal(elementwise.head_gate(turned[:, :3], logits[:, :3]), found)
    with pytest.raises(ValueError, match="do not fit"):
        elementwise.head_gate(joint, logits)
