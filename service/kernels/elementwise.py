"""Norms, rotary embedding, gates and activations for any device, computed in float32 inside when the inputs have 16 bits.

The same mathematics as `reference.py` with fewer passes over memory. It does not know layers or models. Invariant: results have the type
of the input x, no argument is changed, and every function can be differentiated.
"""

from __future__ import annotations

import torch
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Root mean square norm over the last dimension: x [..., D], weight [D] -> [..., D].

    The norm is one reduction (`vector_norm`) instead of square and mean, so no temporary of the size of x is made for it, which is what
    `F.rms_norm` spends its time on at hundreds of rows on a CPU.
    """
    size = x.shape[-1]
    wide = x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
    length = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
    inverse = length.square().div_(size).add_(eps).rsqrt_()
    normed: Tensor = wide * inverse
    return normed.mul_(weight).to(x.dtype)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(rms_norm(x + residual), x + residual); all [..., D]."""
    total = x + residual
    return rms_norm(total, weight, eps), total


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding by halves of x [T, H, D] with angles [T, rotary_dim / 2]; dimensions from rotary_dim on pass unchanged."""
    tokens, heads, size = x.shape
    half = cos.shape[-1]
    rotary = x if size == 2 * half else x[..., : 2 * half]
    pairs = rotary.reshape(tokens, heads, 2, half)
    cosines, sines = cos[:, None, None, :], sin[:, None, None, :]
    signed = torch.cat((-sines, sines), dim=2)
    turned = (pairs * cosines).addcmul_(pairs.flip(2), signed).view(tokens, heads, 2 * half).to(x.dtype)
    return turned if size == 2 * half else torch.cat((turned, x[..., 2 * half :]), dim=-1)


def apply_rope(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """`rotate` of query [T, Hq, D] and key [T, Hkv, D]; cos and sin [T, rotary_dim / 2], float32 for 16-bit inputs."""
    return rotate(query, cos, sin), rotate(key, cos, sin)


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) * up: gate_up [..., 2·hidden] (gate first) -> [..., hidden]."""
    gate, up = gate_up.chunk(2, dim=-1)
    return torch.nn.functional.silu(gate).mul_(up)


def head_gate(out: Tensor, gate_logits: Tensor) -> Tensor:
    """Attention output out [T, H, D], each head scaled by sigmoid(gate_logits [T, H])."""
    return out * torch.sigmoid(gate_logits).unsqueeze(-1)
