"""The comparison behind v1.0's claim: a plain llama of the same size, and gates that can be held at their means."""

from __future__ import annotations

import pytest
import torch

from loadtests.gate_ablation import MULTIPLE, plain_spec, with_mean_gates
from service.models.build import build, init_weights
from service.train.evaluate import held_out_loss
from service.train.prepare import PreparedRun
from service.types.catalog import V1_0
from service.types.model_spec import GroupedQueryAttention
from tests.train.conftest import TINY

LENGTH = 512


def test_the_plain_llama_is_of_the_same_size_without_gates_and_norms() -> None:
    spec = V1_0.spec(dict(V1_0.shapes)["nano"])
    plain = plain_spec(spec)
    attention = plain.layers[0].attention
    assert isinstance(attention, GroupedQueryAttention) and not attention.gate and not attention.qk_norm
    assert 0 <= spec.parameters - plain.parameters < 3 * spec.dim * MULTIPLE * len(spec.layers)


def test_gates_at_their_means_change_the_loss_only_where_they_differ_from_token_to_token(prepared: PreparedRun) -> None:
    model = build(V1_0.spec(TINY), torch.device("cpu"), torch.float32)
    init_weights(model, 0)
    gates = [module for name, module in model.named_modules() if name.endswith(".gate")]
    assert len(gates) == TINY.layers

    def losses() -> tuple[float, float]:
        own = held_out_loss(model, prepared.held_out.tokens, prepared.tokenizer.token_bytes, LENGTH, 256)
        return own.nats_per_token, with_mean_gates(model, prepared, 256)

    with torch.no_grad():
        for gate in gates:
            gate.weight.zero_()
            gate.bias.fill_(0.7)
    own, held = losses()
    assert held == pytest.approx(own, abs=1e-5)
    with torch.no_grad():
        for gate in gates:
            gate.weight.normal_(std=5.0)
    own, held = losses()
    assert abs(held - own) > 1e-4
