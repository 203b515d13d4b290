"""Norms, rotary embedding and gates against the float64 reference, in every type, differentiable and without side effects."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from service.kernels import elementwise, reference
from tests.kernels.conftest import check_close

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CASES = {
    "rms_norm": (elementwise.rms_norm, reference.rms_norm, lambda: (torch.randn(7, 40) * 3, torch.randn(40), 1e-6)),
    "rms_norm_heads": (elementwise.rms_norm, reference.rms_norm, lambda: (torch.randn(7, 3, 40), torch.randn(40), 1e-5)),
    "rotate": (elementwise.rotate, reference.rotate, lambda: (torch.randn(7, 3, 16), *angles(7, 8))),
    "rotate_part": (elementwise.rotate, reference.rotate, lambda: (torch.randn(7, 3, 24), *angles(7, 5))),
    "swiglu": (elementwise.swiglu, reference.swiglu, lambda: (torch.randn(7, 46) * 3,)),
    "head_gate": (elementwise.head_gate, reference.head_gate, lambda: (torch.randn(7, 3, 16), torch.randn(7, 3))),
}


def angles(tokens: int, half: int) -> tuple[Tensor, Tensor]:
    phase = torch.rand(tokens, half) * 6
    return phase.cos(), phase.sin()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CASES)
def test_equals_the_reference(name: str, dtype: torch.dtype) -> None:
    fast, exact, make = CASES[name]
    torch.manual_seed(1)
    arguments = make()
    first = arguments[0].to(dtype)
    rest = tuple(a.to(dtype) if isinstance(a, Tensor) and not name.startswith("rotate") else a for a in arguments[1:])
    before = first.clone()
    actual = fast(first, *rest)
    expected = exact(first.double(), *(a.double() if isinstance(a, Tensor) else a for a in rest))
    assert torch.equal(first, before)
    if dtype == torch.float32 or name not in ("swiglu", "head_gate", "rotate"):
        check_close(actual, expected, dtype)
    else:  # computed in 16-bit steps: each rounds once
        assert (actual.double() - expected).abs().max() <= 3 * torch.finfo(dtype).eps * expected.abs().max()


@pytest.mark.parametrize("name", CASES)
def test_two_percent_off_is_noticed(name: str) -> None:
    fast, exact, make = CASES[name]
    torch.manual_seed(1)
    arguments = make()
    expected = exact(*(a.double() if isinstance(a, Tensor) else a for a in arguments))
    with pytest.raises(AssertionError):
        check_close(fast(*arguments) * 1.02, expected, torch.float32)


@pytest.mark.parametrize("name", CASES)
def test_gradients(name: str) -> None:
    fast, _, make = CASES[name]
    torch.manual_seed(1)
    arguments = [a.double().requires_grad_() if isinstance(a, Tensor) else a for a in make()]
    if name.startswith("rotate"):
        arguments[1:] = [a.detach() for a in arguments[1:]]
    assert torch.autograd.gradcheck(fast, arguments)


@pytest.mark.parametrize("dtype", DTYPES)
def test_add_rms_norm_gives_norm_and_sum(dtype: torch.dtype) -> None:
    x, residual, weight = (torch.randn(*shape).to(dtype) for shape in ((5, 32), (5, 32), (32,)))
    normed, total = elementwise.add_rms_norm(x, residual, weight, 1e-6)
    assert torch.equal(total, x + residual)
    check_close(normed, reference.rms_norm(total.double(), weight.double(), 1e-6), dtype)


def test_apply_rope_rotates_both() -> None:
    query, key = torch.randn(6, 4, 16), torch.randn(6, 2, 16)
    cos, sin = angles(6, 8)
    turned_query, turned_key = elementwise.apply_rope(query, key, cos, sin)
    exact = reference.apply_rope(query.double(), key.double(), cos.double(), sin.double())
    check_close(turned_query, exact[0], torch.float32)
    check_close(turned_key, exact[1], torch.float32)


def test_rotation_keeps_length_and_relative_angle() -> None:
    x = torch.randn(1, 1, 16).expand(9, 1, 16)
    phase = torch.arange(9.0)[:, None] * torch.rand(8)
    turned = elementwise.rotate(x, phase.cos(), phase.sin())[:, 0]
    torch.testing.assert_close(turned.norm(dim=-1), x[:, 0].norm(dim=-1))
    products = turned @ turned.T
    for distance in range(1, 8):
        along = torch.diagonal(products, distance)
        torch.testing.assert_close(along, along[0].expand_as(along), rtol=1e-4, atol=1e-4)


def test_norm_of_large_half_precision_does_not_overflow() -> None:
    x = torch.full((2, 64), 3e4, dtype=torch.float16)
    torch.testing.assert_close(elementwise.rms_norm(x, torch.ones(64, dtype=torch.float16), 1e-6), torch.ones_like(x))


def test_norm_of_zeros_is_zero() -> None:
    assert torch.equal(elementwise.rms_norm(torch.zeros(2, 8), torch.ones(8), 1e-6), torch.zeros(2, 8))


def test_norms_of_no_rows() -> None:
    functions: tuple[Callable[..., Tensor], ...] = (elementwise.rms_norm, reference.rms_norm)
    for function in functions:
        assert function(torch.zeros(0, 8), torch.ones(8), 1e-6).shape == (0, 8)
