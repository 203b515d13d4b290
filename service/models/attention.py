"""Grouped-query attention around a pluggable `Attend`: projections, q/k norm, rotation and the head gate live here, the cache does not.

Who calls decides how keys and values are kept: serving passes an `Attend` that reads paged blocks, training passes `DenseAttend`.
Invariant: an `Attend` sees queries and keys already normed and rotated, so no implementation needs to know positions for that.
"""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from service.models.layers import Computed, Linear, RmsNorm
from service.types.model_spec import GroupedQueryAttention, LayerSpec


class Attend(Protocol):
    """Attention proper, over whatever cache the caller keeps."""

    def __call__(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """query [T, Hq, D], key [T, Hkv, D], value [T, Hkv, Dv] of this step's tokens -> [T, Hq, Dv]."""


class GroupedAttention(Computed):
    """The attention sublayer of one layer, or of several that share weights: qkv, optional q/k norm, RoPE, attend, optional head gate, out.

    `qkv` holds the query heads, then the key heads, then the value heads, [(heads + 2 · kv_heads) · head_dim, dim].
    """

    def __init__(self, spec: GroupedQueryAttention, dim: int, eps: float, device: torch.device | str, dtype: torch.dtype) -> None:
        super().__init__()
        self.spec = spec
        width = spec.heads * spec.head_dim
        self.qkv = Linear(dim, width + 2 * spec.kv_heads * spec.head_dim, spec.qkv_bias, device, dtype)
        self.out = Linear(width, dim, spec.out_bias, device, dtype)
        self.query_norm = RmsNorm(spec.head_dim, eps, device, dtype) if spec.qk_norm else None
        self.key_norm = RmsNorm(spec.head_dim, eps, device, dtype) if spec.qk_norm else None
        self.gate = Linear(dim, spec.heads, True, device, dtype) if spec.gate else None

    def forward(self, x: Tensor, layer: int, cos: Tensor, sin: Tensor, attend: Attend) -> Tensor:
        """Normalised input [T, dim] of layer number `layer` -> [T, dim]; `cos`, `sin` [T, rotary_dim / 2]."""
        spec, tokens = self.spec, x.shape[0]
        turning_heads = spec.heads + spec.kv_heads
        heads: Tensor = self.qkv(x).view(tokens, turning_heads + spec.kv_heads, spec.head_dim)
        turning, value = heads[:, :turning_heads], heads[:, turning_heads:]
        if self.query_norm is not None and self.key_norm is not None:
            turning = torch.cat((self.query_norm(heads[:, : spec.heads]), self.key_norm(heads[:, spec.heads : turning_heads])), dim=1)
        turned = self.kernels.rotate(turning, cos, sin)
        seen = attend(layer, turned[:, : spec.heads], turned[:, spec.heads :], value)
        if self.gate is not None:
            seen = self.kernels.head_gate(seen, self.gate(x))
        update: Tensor = self.out(seen.reshape(tokens, spec.heads * spec.head_dim))
        return update


class DenseAttend:
    """Causal attention over `batch` sequences of `length` tokens each, laid flat one after the other, without a cache; differentiable.

    Windows (those that forget), scales and soft caps are those of `layers`.
    """

    def __init__(self, batch: int, length: int, layers: tuple[LayerSpec, ...]) -> None:
        self._batch = batch
        self._length = length
        self._layers = layers
        self._masks: dict[tuple[int, torch.device], Tensor] = {}

    def __call__(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """query [batch · length, Hq, D], key and value [batch · length, Hkv, D] -> [batch · length, Hq, D]."""
        spec = self._layers[layer].attention
        shape = (self._batch, self._length)
        repeat = spec.heads // spec.kv_heads
        q = query.view(*shape, spec.heads, -1).transpose(1, 2)
        k = key.view(*shape, spec.kv_heads, -1).transpose(1, 2).repeat_interleave(repeat, dim=1)
        v = value.view(*shape, spec.kv_heads, -1).transpose(1, 2).repeat_interleave(repeat, dim=1)
        scale = spec.head_dim**-0.5 if spec.scale is None else spec.scale
        # Where what lies behind the window is kept, training reads it in full.
        window = self._length if spec.window is None or spec.far is not None else spec.window
        if spec.softcap is not None:
            out = _capped_attention(q, k, v, self._mask(window, q.device), scale, spec.softcap)
        elif window < self._length:
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=self._mask(window, q.device), scale=scale)
        else:
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)
        return out.transpose(1, 2).reshape(self._batch * self._length, spec.heads, -1)

    def _mask(self, window: int, device: torch.device) -> Tensor:
        """[length, length] bool: key j is visible to query i when i − window < j ≤ i."""
        if (window, device) not in self._masks:
            steps = torch.arange(self._length, device=device)
            behind = steps[:, None] - steps[None, :]
            self._masks[window, device] = (behind >= 0) & (behind < window)
        return self._masks[window, device]


def _capped_attention(query: Tensor, key: Tensor, value: Tensor, visible: Tensor, scale: float, cap: float) -> Tensor:
    """Attention whose scores pass cap · tanh(score / cap); all [batch, heads, length, D], `visible` [length, length] bool."""
    scores = (query.float() @ key.float().transpose(-1, -2)) * scale
    scores = (cap * torch.tanh(scores / cap)).masked_fill(~visible, float("-inf"))
    return scores.softmax(-1).to(value.dtype) @ value
