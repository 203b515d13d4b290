"""Simulated int8: the values are those of integers times scales, the gradient passes."""

from __future__ import annotations

import torch

from service.kernels.fake_quant import LEVELS, fake_quantise, fake_quantised_linear


def test_values_are_whole_steps_of_each_rows_scale() -> None:
    x = torch.randn(5, 40, generator=torch.Generator().manual_seed(1))
    scale = x.abs().amax(-1, keepdim=True) / LEVELS
    steps = fake_quantise(x) / scale
    torch.testing.assert_close(steps, steps.round(), atol=1e-4, rtol=0)
    assert (fake_quantise(x) - x).abs().max() <= scale.max() / 2 + 1e-6
    assert not torch.equal(fake_quantise(x), x)


def test_zero_rows_stay_zero_and_the_largest_value_is_kept() -> None:
    x = torch.tensor([[0.0, 0.0], [3.0, -1.0]])
    rounded = fake_quantise(x)
    assert torch.equal(rounded[0], x[0]) and torch.allclose(rounded[1, 0], x[1, 0])


def test_a_product_is_that_of_the_integers() -> None:
    generator = torch.Generator().manual_seed(2)
    x, weight, bias = (torch.randn(*shape, generator=generator) for shape in ((4, 32), (6, 32), (6,)))
    scales = [matrix.abs().amax(-1, keepdim=True) / LEVELS for matrix in (x, weight)]
    integers = [torch.round(matrix / scale).to(torch.int64) for matrix, scale in zip((x, weight), scales, strict=True)]
    expected = (integers[0] @ integers[1].T).double() * scales[0].double() * scales[1].double().T + bias.double()
    torch.testing.assert_close(fake_quantised_linear(x, weight, bias).double(), expected, atol=1e-4, rtol=1e-4)


def test_the_gradient_passes_the_rounding() -> None:
    x = torch.randn(3, 8, generator=torch.Generator().manual_seed(3), requires_grad=True)
    (fake_quantise(x) * torch.arange(24.0).view(3, 8)).sum().backward()
    assert x.grad is not None and torch.equal(x.grad, torch.arange(24.0).view(3, 8))
