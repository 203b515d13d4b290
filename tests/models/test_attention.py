from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from service.models.attention import DenseAttend, GroupedAttention
from service.types.model_spec import DenseMlp, GroupedQueryAttention, LayerSpec

BATCH, LENGTH, HEADS, KV, DIM = 2, 9, 6, 2, 4
SPEC = GroupedQueryAttention(HEADS, KV, DIM)


def heads(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = ((BATCH * LENGTH, count, DIM) for count in (HEADS, KV, KV))
    query, key, value = (torch.randn(shape, generator=generator) for shape in shapes)
    return query, key, value


def by_hand(spec: GroupedQueryAttention, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attention as its definition says, one query and head at a time, in float64."""
    out = torch.empty(BATCH * LENGTH, HEADS, DIM, dtype=torch.float64)
    for token in range(BATCH * LENGTH):
        first = token - token % LENGTH
        start = first if spec.window is None else max(first, token - spec.window + 1)
        for head in range(HEADS):
            keys, values = (x[start : token + 1, head // (HEADS // KV)].double() for x in (key, value))
            scores = keys @ query[token, head].double() * (DIM**-0.5 if spec.scale is None else spec.scale)
            if spec.softcap is not None:
                scores = spec.softcap * torch.tanh(scores / spec.softcap)
            out[token, head] = scores.softmax(0) @ values
    return out


@pytest.mark.parametrize(
    "spec",
    [SPEC, replace(SPEC, window=3), replace(SPEC, window=LENGTH), replace(SPEC, scale=1.7), replace(SPEC, softcap=0.5, window=4)],
    ids=["full", "window", "window-all", "scale", "softcap"],
)
def test_dense_attend_is_the_definition(spec: GroupedQueryAttention) -> None:
    inputs = heads(0)
    got = DenseAttend(BATCH, LENGTH, (LayerSpec(spec, DenseMlp(8)),))(0, *inputs)
    torch.testing.assert_close(got.double(), by_hand(spec, *inputs), rtol=1e-5, atol=1e-5)
    planted = replace(spec, scale=1.02 * (DIM**-0.5 if spec.scale is None else spec.scale))
    assert (got.double() - by_hand(planted, *inputs)).abs().max() > 1e-4


def test_each_layer_has_its_own_window_and_heads() -> None:
    layers = (LayerSpec(replace(SPEC, window=2), DenseMlp(8)), LayerSpec(SPEC, DenseMlp(8)))
    attend, inputs = DenseAttend(BATCH, LENGTH, layers), heads(1)
    for index, layer in enumerate(layers):
        torch.testing.assert_close(attend(index, *inputs).double(), by_hand(layer.attention, *inputs), rtol=1e-5, atol=1e-5)


def test_gradients_reach_queries_keys_and_values() -> None:
    inputs = [tensor.requires_grad_() for tensor in heads(2)]
    DenseAttend(BATCH, LENGTH, (LayerSpec(replace(SPEC, window=4), DenseMlp(8)),))(0, *inputs).square().sum().backward()
    assert all(tensor.grad is not None and tensor.grad.abs().sum() > 0 for tensor in inputs)


def test_the_gate_scales_each_head() -> None:
    """With one head's gate shut its share of the output disappears; a wide open gate equals no gate."""
    module = GroupedAttention(replace(SPEC, gate=True), 12, 1e-6, "cpu", torch.float32)
    generator = torch.Generator().manual_seed(4)
    for parameter in module.parameters():
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator))
    x, value = torch.randn(3, 12, generator=generator), torch.randn(3, HEADS, DIM, generator=generator)
    cos, sin = torch.ones(3, DIM // 2), torch.zeros(3, DIM // 2)

    def attend(layer: int, query: Tensor, key: Tensor, _: Tensor) -> Tensor:
        assert layer == 7
        assert query.shape == (3, HEADS, DIM)
        assert key.shape == (3, KV, DIM)
        return value

    assert module.gate is not None
    module.gate.weight.data.zero_()
    module.gate.bias.data.fill_(100.0)
    module.gate.bias.data[1] = -100.0
    kept = value.clone()
    kept[:, 1] = 0
    torch.testing.assert_close(module(x, 7, cos, sin, attend), module.out(kept.flatten(1)))
