"""Norms and activations by the compiled kernels: one pass over memory where torch makes several. No gradients.

The signatures are those of `reference.py`. It does not know layers. Invariant: results have the type of x, no argument is changed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from service.kernels.native.binding import ELEMENTS, functions


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Root mean square norm over the last dimension: x [..., D], weight [D] of the same type -> [..., D]."""
    x, weight = x.contiguous(), weight.contiguous()
    out = torch.empty_like(x)
    _norm(x, None, weight, eps, out, None)
    return out


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(rms_norm(x + residual), x + residual); all [..., D] of one type."""
    x, residual, weight = x.contiguous(), residual.contiguous(), weight.contiguous()
    out, total = torch.empty_like(x), torch.empty_like(x)
    _norm(x, residual, weight, eps, out, total)
    return out, total


def _norm(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, out: Tensor, total: Tensor | None) -> None:
    size = x.shape[-1]
    if weight.dtype != x.dtype or weight.shape != (size,) or (residual is not None and residual.shape != x.shape):
        raise ValueError(f"x {tuple(x.shape)} {x.dtype} does not fit the weight {tuple(weight.shape)} {weight.dtype} or the residual")
    functions().native_add_rms_norm(
        ELEMENTS[x.dtype],
        x.data_ptr(),
        None if residual is None else residual.data_ptr(),
        weight.data_ptr(),
        eps,
        out.data_ptr(),
        None if total is None else total.data_ptr(),
        x.numel() // max(size, 1),
        size,
        torch.get_num_threads(),
    )


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) * up: gate_up [..., 2·hidden] (gate first) -> [..., hidden]."""
    gate_up = gate_up.contiguous()
    size = gate_up.shape[-1] // 2
    out = gate_up.new_empty(*gate_up.shape[:-1], size)
    rows = out.numel() // max(size, 1)
    functions().native_swiglu(ELEMENTS[gate_up.dtype], gate_up.data_ptr(), out.data_ptr(), rows, size, torch.get_num_threads())
    return out


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding by halves of x [T, H, D], angles cos and sin [T, rotary_dim / 2]; dimensions from rotary_dim on pass unchanged."""
    (rows, heads, size), half = x.shape, cos.shape[1]
    if cos.shape != (rows, half) or sin.shape != cos.shape or 2 * half > size:
        raise ValueError(f"angles {tuple(cos.shape)} and {tuple(sin.shape)} do not fit x {tuple(x.shape)}")
    x = x if x.stride(-1) == 1 else x.contiguous()
    cos, sin = cos.float().contiguous(), sin.float().contiguous()
    out = x.new_empty(x.shape)
    where = (x.data_ptr(), *x.stride()[:2], cos.data_ptr(), sin.data_ptr(), out.data_ptr())
    functions().native_rotate(ELEMENTS[x.dtype], *where, rows, heads, size, half, torch.get_num_threads())
    return out


def head_gate(out: Tensor, gate_logits: Tensor) -> Tensor:
    """Attention output out [T, H, D], each head scaled by sigmoid(gate_logits [T, H]) of the same type."""
    rows, heads, size = out.shape
    if gate_logits.shape != (rows, heads) or gate_logits.dtype != out.dtype:
        raise ValueError(f"gates {tuple(gate_logits.shape)} {gate_logits.dtype} do not fit heads {tuple(out.shape)} {out.dtype}")
    out, gate_logits = (out if out.stride(-1) == 1 else out.contiguous()), gate_logits.contiguous()
    scaled = out.new_empty(out.shape)
    where = (out.data_ptr(), *out.stride()[:2], gate_logits.data_ptr(), scaled.data_ptr())
    functions().native_head_gate(ELEMENTS[out.dtype], *where, rows, heads, size, torch.get_num_threads())
    return scaled
