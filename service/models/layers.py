"""The small layers of a decoder: linear, embedding, RMSNorm and the SwiGLU feed-forward, with the pointwise ops they share.

Activations are flat, [tokens, features]; there is no batch dimension. The file does not know attention, caches or files.
Invariant: weights and activations keep the compute dtype; norms, rotations and gates are computed in float32 and rounded once.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from service.types.model_spec import DenseMlp


class Linear(nn.Module):
    """y = x · weightᵀ + bias; `weight` [out, in], `bias` [out] or absent. Parameters are left uninitialised."""

    bias: nn.Parameter | None

    def __init__(self, inputs: int, outputs: int, bias: bool, device: torch.device | str, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs, device=device, dtype=dtype))
        if bias:
            self.bias = nn.Parameter(torch.empty(outputs, device=device, dtype=dtype))
        else:
            self.register_parameter("bias", None)

    def forward(self, x: Tensor) -> Tensor:
        """[tokens, in] -> [tokens, out]."""
        return F.linear(x, self.weight, self.bias)


class Embedding(nn.Module):
    """Rows of `weight` [vocab, dim] by token id."""

    def __init__(self, rows: int, dim: int, device: torch.device | str, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(rows, dim, device=device, dtype=dtype))

    def forward(self, tokens: Tensor) -> Tensor:
        """[tokens] int64 -> [tokens, dim]."""
        return F.embedding(tokens, self.weight)


class RmsNorm(nn.Module):
    """Root mean square norm (Zhang and Sennrich 2019) over the last dimension, with `weight` [dim]."""

    def __init__(self, dim: int, eps: float, device: torch.device | str, dtype: torch.dtype) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(dim, device=device, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        """[..., dim] -> [..., dim] in the dtype of `x`."""
        return rms_norm(x, self.weight, self.eps)

    def add(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """(norm(x + residual), x + residual): the step between two sublayers."""
        total = residual + x
        return rms_norm(total, self.weight, self.eps), total


class SwigluMlp(nn.Module):
    """down(silu(gate(x)) * up(x)) with gate and up in one matrix `gate_up` [2 · hidden, dim], gate first."""

    def __init__(self, spec: DenseMlp, dim: int, device: torch.device | str, dtype: torch.dtype) -> None:
        super().__init__()
        self.gate_up = Linear(dim, 2 * spec.hidden, spec.bias, device, dtype)
        self.down = Linear(spec.hidden, dim, spec.bias, device, dtype)

    def forward(self, x: Tensor) -> Tensor:
        """[tokens, dim] -> [tokens, dim]."""
        update: Tensor = self.down(swiglu(self.gate_up(x)))
        return update


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x²) + eps) · weight over the last dimension, in float32, rounded to the dtype of `x`."""
    wide = x.float()
    scaled = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * weight.float()
    return scaled.to(x.dtype)


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(first half) · second half of the last dimension."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the first 2 · half features of every head of `x` [tokens, heads, dim]; `cos`, `sin` [tokens, half] float32.

    Feature i is paired with feature i + half, as in GPT-NeoX. The other features pass unchanged.
    """
    half = cos.shape[-1]
    cos, sin = cos[:, None], sin[:, None]
    first, second, rest = x[..., :half].float(), x[..., half : 2 * half].float(), x[..., 2 * half :]
    turned = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)
    return torch.cat((turned, rest), dim=-1) if rest.shape[-1] else turned
