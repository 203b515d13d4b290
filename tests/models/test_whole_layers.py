"""Which decoders one call can compute, and that it then gives what the layers give one by one."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from service.kernels.choices import Dispatch, DispatchError
from service.kernels.dispatch import TABLE, force
from service.kernels.linear import PlainLinear
from service.kernels.native.quantised import unsupported
from service.kernels.quantised import quantise_weight
from service.models.build import build, init_weights
from service.models.decoder import Decoder
from service.models.layers import Kernels, Linear
from service.models.whole_layers import bind_layers
from service.types.kv_layout import FarSpec
from service.types.model_spec import DenseMlp, GroupedQueryAttention, LayerSpec, ModelSpec, RopeSpec

pytestmark = pytest.mark.skipif(unsupported() is not None, reason="no compiled integer products here")
PLAIN = GroupedQueryAttention(4, 2, 8, qkv_bias=True, qk_norm=True)


def decoder_of(*attention: GroupedQueryAttention, quantised: bool = True, dtype: torch.dtype = torch.float32) -> Decoder:
    layers = tuple(LayerSpec(each, DenseMlp(40)) for each in attention)
    decoder = build(ModelSpec("small", 61, 24, layers, RopeSpec(10_000.0, 8, original_context=64), 64), "cpu", dtype)
    init_weights(decoder, 0)
    for name, module in decoder.named_modules() if quantised else ():
        if isinstance(module, Linear) and name.endswith("gate"):
            module.pack()
        elif isinstance(module, Linear) and module.weight is not None:
            module.take(quantise_weight(module.weight, "int8"), torch.device("cpu"), dtype)
    return decoder.eval().requires_grad_(False)


def bound(decoder: Decoder) -> bool:
    return bind_layers([layer.parts for layer in decoder.layers], decoder.spec.norm_eps) is not None


def test_quantised_layers_of_any_kind_are_taken() -> None:
    other = replace(PLAIN, window=5, softcap=2.0, scale=0.1, qk_norm=False, out_bias=True)
    assert bound(decoder_of(PLAIN, other, replace(PLAIN, gate=True), replace(PLAIN, window=64, far=FarSpec())))


def test_one_layer_that_the_call_lacks_leaves_all_to_themselves() -> None:
    gated = decoder_of(PLAIN, replace(PLAIN, gate=True))
    gate = gated.get_submodule("layers.1.attention.gate")
    gate.packed = PlainLinear(torch.zeros(4, 24))  # type: ignore[assignment]
    assert not bound(gated)


def test_plain_weights_and_other_types_are_left_to_themselves() -> None:
    assert not bound(decoder_of(PLAIN, quantised=False))
    assert not bound(decoder_of(PLAIN, dtype=torch.bfloat16))
    assert bind_layers([], 1e-5) is None


def test_a_forced_part_keeps_layers_separate() -> None:
    """Who asks for another attention gets it: the call would compute its own."""
    whole = Kernels.resolve("cpu", torch.float32).decoder_layers
    assert whole.__wrapped__ is TABLE["decoder_layers"][0].kernel  # type: ignore[attr-defined]
    force("paged_attention", "reference")
    force("decoder_layers", None)
    try:
        separate = Kernels.resolve("cpu", torch.float32).decoder_layers
        assert separate.__wrapped__ is TABLE["decoder_layers"][1].kernel  # type: ignore[attr-defined]
    finally:
        force("paged_attention", None)
        force("decoder_layers", None)


def test_it_is_refused_where_products_are_not_compiled() -> None:
    choices = Dispatch(TABLE)
    choices.force("decoder_layers", "native")
    with pytest.raises(DispatchError, match="on a CPU only"):
        choices.resolve("decoder_layers", "cuda", torch.float32)
