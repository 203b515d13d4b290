"""Grouped-query attention around a pluggable `Attend`: projections, q/k norm, rotation and the head gate live here, the cache does not.

Who calls decides how keys and values are kept: serving passes an `Attend` that reads paged blocks, training passes `DenseAttend`.
Invariant: an `Attend` sees queries and keys already normed, and rotated or with the angles at hand: none needs to know positions for that.
"""

from __future__ import annotations

from typing import Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from service.models.layers import Computed, Linear, RmsNorm
from service.types.model_spec import GroupedQueryAttention, LayerSpec


class Attend(Protocol):
    """Attention proper, over whatever cache the caller keeps."""

    def __call__(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """query [T, Hq, D], key [T, Hkv, D], value [T, Hkv, Dv] of this step's tokens -> [T, Hq, Dv]."""


class TurningAttend(Attend, Protocol):
    """Attention that can rotate queries and keys itself, on their way into the cache."""

    @property
    def turns(self) -> bool:
        """Whether it does; else it is called with what was rotated before."""

    def turned(self, layer: int, heads: Tensor, value: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
        """Heads [T, Hq + Hkv, D] before rotation, the query heads first, and cos and sin [T, rotary_dim / 2] -> [T, Hq, Dv]."""


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
        if getattr(attend, "turns", False):
            seen = cast(TurningAttend, attend).turned(layer, turning, value, (cos, sin))
        else:
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
        self._masks: dict[tuple[int, int, torch.device], Tensor] = {}

    def __call__(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """query [batch · length, Hq, D], key and value [batch · length, Hkv, D] -> [batch · length, Hq, D]."""
        return self._attend(layer, query, self._apart(key), self._apart(value))

    def _apart(self, flat: Tensor) -> Tensor:
        """[batch · length, H, D] as [batch, H, length, D]."""
        return flat.view(self._batch, self._length, *flat.shape[1:]).transpose(1, 2)

    def _attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Flat query rows over key and value [batch, Hkv, L, D], the last `length` of whose positions are the query's own."""
        spec = self._layers[layer].attention
        repeat = spec.heads // spec.kv_heads
        q, k, v = self._apart(query), key.repeat_interleave(repeat, dim=1), value.repeat_interleave(repeat, dim=1)
        scale = spec.head_dim**-0.5 if spec.scale is None else spec.scale
        seen = k.shape[2]
        # Where what lies behind the window is kept, training reads it in full.
        window = seen if spec.window is None or spec.far is not None else spec.window
        if spec.softcap is not None:
            out = _capped_attention(q, k, v, self._mask(window, seen, q.device), scale, spec.softcap)
        elif window < seen or seen > self._length:
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=self._mask(window, seen, q.device), scale=scale)
        else:
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)
        return out.transpose(1, 2).reshape(self._batch * self._length, spec.heads, -1)

    def _mask(self, window: int, seen: int, device: torch.device) -> Tensor:
        """[length, seen] bool: key j is visible to the query at position i of `seen` when i − window < j ≤ i."""
        if (window, seen, device) not in self._masks:
            steps = torch.arange(seen, device=device)
            behind = steps[seen - self._length :, None] - steps[None, :]
            self._masks[window, seen, device] = (behind >= 0) & (behind < window)
        return self._masks[window, seen, device]


class SegmentAttend(DenseAttend):
    """The same, segment after segment over what earlier segments left: keys and values in memory, outside the gradient.

    In the manner of Transformer-XL (Dai et al. 2019), with all of the sequence in memory, or the last `memory_tokens` of it. Call
    `advance` when a segment's backward pass is done.
    """

    def __init__(self, batch: int, length: int, layers: tuple[LayerSpec, ...], memory_tokens: int | None = None) -> None:
        super().__init__(batch, length, layers)
        self._memory_tokens = memory_tokens
        self._memory: dict[int, tuple[Tensor, Tensor]] = {}
        self._read: dict[int, tuple[Tensor, Tensor]] = {}

    def __call__(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Arguments and result as in DenseAttend, of one segment."""
        keys, values = self._apart(key), self._apart(value)
        if layer in self._memory:
            keys, values = (torch.cat((old, new), dim=2) for old, new in zip(self._memory[layer], (keys, values), strict=True))
        self._read[layer] = (keys.detach(), values.detach())
        return self._attend(layer, query, keys, values)

    def advance(self) -> None:
        """The segment is done: what it read is the memory of the next."""
        for layer, (keys, values) in self._read.items():
            first = 0 if self._memory_tokens is None else max(0, keys.shape[2] - self._memory_tokens)
            self._memory[layer] = (keys[:, :, first:], values[:, :, first:])
        self._read = {}


def _capped_attention(query: Tensor, key: Tensor, value: Tensor, visible: Tensor, scale: float, cap: float) -> Tensor:
    """Attention whose scores pass cap · tanh(score / cap); [batch, heads, tokens, D] each, `visible` bool [queries, keys]."""
    scores = (query.float() @ key.float().transpose(-1, -2)) * scale
    scores = (cap * torch.tanh(scores / cap)).masked_fill(~visible, float("-inf"))
    return scores.softmax(-1).to(value.dtype) @ value
