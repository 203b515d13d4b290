"""Int8 arithmetic simulated in floating point, differentiable: what quantisation-aware training computes with.

It does not know models or when quantisation begins. Invariant: the forward value is that of symmetric int8 weights (one scale an output)
times symmetric int8 activations (one scale a row); the gradient passes the rounding unchanged (Bengio et al. 2013).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

LEVELS = 127


def fake_quantise(x: Tensor) -> Tensor:
    """x [..., D] rounded to 127 steps to each side of zero, with a scale for each row; zero rows stay zero. Gradient: that of x."""
    scale = x.detach().abs().amax(dim=-1, keepdim=True).float() / LEVELS
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    rounded = torch.round(x.detach() / scale).clamp_(-LEVELS, LEVELS) * scale
    return x + (rounded.to(x.dtype) - x).detach()


def fake_quantised_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [..., in] times weight [out, in] transposed, plus bias [out], both factors as int8 would hold them; differentiable."""
    return functional.linear(fake_quantise(x), fake_quantise(weight), bias)
