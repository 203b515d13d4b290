"""Which decoders the compiled call for all layers can compute, and their layers as it takes them.

It does not know how the call works. Invariant: a decoder with any layer that the call lacks (products that are not quantised in compiled
form) has none, and computes layer by layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch

from service.kernels.native.decoder import BoundLayers, LayerParts
from service.kernels.native.linear import OrderedLinear
from service.kernels.native.quantised import NativeQuantisedLinear
from service.models.attention import GroupedAttention
from service.models.layers import Linear, RmsNorm, SwigluMlp

Sublayers = tuple[RmsNorm, GroupedAttention, RmsNorm, SwigluMlp]


def bind_layers(layers: Sequence[Sublayers], eps: float) -> BoundLayers | None:
    """The layers as one call takes them, or None."""
    parts = [_parts(*layer) for layer in layers]
    found = [part for part in parts if part is not None]
    return BoundLayers(found, eps) if found and len(found) == len(parts) else None


def _parts(attention_norm: RmsNorm, attention: GroupedAttention, mlp_norm: RmsNorm, mlp: SwigluMlp) -> LayerParts | None:
    spec = attention.spec
    linears = (attention.qkv, attention.out, mlp.gate_up, mlp.down)
    packed = tuple(linear.packed for linear in linears if isinstance(linear.packed, NativeQuantisedLinear))
    plain_norm = attention_norm.weight.dtype == torch.float32
    if len(packed) != len(linears) or not plain_norm or not _gate_fits(attention.gate):
        return None
    for product, linear in zip(packed, linears, strict=True):
        product.set_bias(linear.bias)
    norms = (attention_norm, mlp_norm, attention.query_norm, attention.key_norm)
    return LayerParts(
        products=cast(tuple[NativeQuantisedLinear, NativeQuantisedLinear, NativeQuantisedLinear, NativeQuantisedLinear], packed),
        norms=cast(
            tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None],
            tuple(None if norm is None else norm.weight for norm in norms),
        ),
        heads=spec.heads,
        kv_heads=spec.kv_heads,
        head_dim=spec.head_dim,
        hidden=packed[3].inputs,
        window=spec.window,
        scale=spec.head_dim**-0.5 if spec.scale is None else spec.scale,
        softcap=spec.softcap,
        gate=None if attention.gate is None else (cast(OrderedLinear, attention.gate.packed), attention.gate.bias),
        refresh=0 if spec.far is None else spec.far.refresh,
        sink_blocks=0 if spec.far is None else spec.far.sink_blocks,
    )


def _gate_fits(gate: Linear | None) -> bool:
    packed = None if gate is None else gate.packed
    return gate is None or (isinstance(packed, OrderedLinear) and packed.panels.dtype == torch.float32)
