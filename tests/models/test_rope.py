from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from service.models.rope import TILE_TOKENS, RopeTable, attention_factor, inverse_frequencies
from service.types.model_spec import RopeScaling, RopeSpec

DIM, ORIGINAL = 32, 4096
SPEC = RopeSpec(theta=50_000.0, rotary_dim=DIM, factor=8.0, original_context=ORIGINAL, low_freq_factor=1.5, high_freq_factor=5.0)
KINDS: dict[str, tuple[RopeSpec, dict[str, Any]]] = {
    "linear": (replace(SPEC, scaling=RopeScaling.LINEAR), {"factor": 8.0}),
    "llama3": (
        replace(SPEC, scaling=RopeScaling.LLAMA3),
        {"factor": 8.0, "low_freq_factor": 1.5, "high_freq_factor": 5.0, "original_max_position_embeddings": ORIGINAL},
    ),
    "yarn": (
        replace(SPEC, scaling=RopeScaling.YARN, beta_fast=24.0, beta_slow=2.0, mscale=0.9, mscale_all_dim=0.4),
        {
            **{"factor": 8.0, "original_max_position_embeddings": ORIGINAL, "beta_fast": 24.0, "beta_slow": 2.0},
            **{"mscale": 0.9, "mscale_all_dim": 0.4},
        },
    ),
    "yarn-untruncated": (
        replace(SPEC, scaling=RopeScaling.YARN, truncate=False),
        {"factor": 8.0, "original_max_position_embeddings": ORIGINAL, "truncate": False},
    ),
}


def theirs(kind: str, keys: dict[str, Any], **arguments: Any) -> tuple[torch.Tensor, float]:
    rope_type = kind.partition("-")[0]
    config = LlamaConfig(
        hidden_size=DIM * 2,
        num_attention_heads=2,
        max_position_embeddings=ORIGINAL,
        rope_parameters={"rope_type": rope_type, "rope_theta": 50_000.0, **keys},
    )
    return ROPE_INIT_FUNCTIONS[rope_type](config, **arguments)


@pytest.mark.parametrize("kind", KINDS)
def test_frequencies_equal_transformers(kind: str) -> None:
    spec, keys = KINDS[kind]
    frequencies, factor = theirs(kind, keys)
    torch.testing.assert_close(inverse_frequencies(spec), frequencies, rtol=1e-6, atol=0)
    assert attention_factor(spec) == pytest.approx(factor)
    assert not torch.allclose(inverse_frequencies(spec), inverse_frequencies(SPEC), rtol=1e-3)


def test_dynamic_rows_use_the_frequencies_of_their_own_length() -> None:
    spec = replace(SPEC, scaling=RopeScaling.DYNAMIC, original_context=100)
    positions = torch.tensor([0, 7, 99, 100, 101, 250, 799])
    cos, _ = RopeTable(spec, 800).rows(positions)
    config = LlamaConfig(
        hidden_size=DIM * 2,
        num_attention_heads=2,
        max_position_embeddings=100,
        rope_parameters={"rope_type": "dynamic", "rope_theta": 50_000.0, "factor": 8.0},
    )
    for row, position in zip(cos, positions.tolist(), strict=True):
        frequencies, _ = ROPE_INIT_FUNCTIONS["dynamic"](config, seq_len=torch.tensor(position + 1))
        torch.testing.assert_close(row, (position * frequencies).cos(), rtol=0, atol=3e-5)


@pytest.mark.parametrize("scaling", [RopeScaling.DEFAULT, RopeScaling.DYNAMIC, RopeScaling.YARN])
def test_rows_do_not_depend_on_the_order_of_growth(scaling: RopeScaling) -> None:
    spec = replace(SPEC, scaling=scaling, original_context=64)
    context = 3 * TILE_TOKENS + 5
    whole = RopeTable(spec, context).rows(torch.arange(context))
    grown = RopeTable(spec, context)
    for position in (3, TILE_TOKENS - 1, TILE_TOKENS, 2 * TILE_TOKENS + 1, context - 1, 17):
        row = grown.rows(torch.tensor([position]))
        assert torch.equal(row[0][0], whole[0][position])
        assert torch.equal(row[1][0], whole[1][position])


def test_a_short_text_does_not_build_a_long_table() -> None:
    table = RopeTable(SPEC, 1 << 40)
    cos, sin = table.rows(torch.arange(10))
    assert cos.shape == sin.shape == (10, DIM // 2)
    assert cos.dtype == torch.float32


def test_no_rows_of_nothing() -> None:
    cos, _ = RopeTable(SPEC, 100).rows(torch.empty(0, dtype=torch.int64))
    assert cos.shape == (0, DIM // 2)


def test_rows_made_while_serving_serve_training_too() -> None:
    table = RopeTable(SPEC, 100)
    with torch.inference_mode():
        table.rows(torch.arange(5))
    cos, _ = table.rows(torch.arange(5))
    weight = torch.ones(1, requires_grad=True)
    (cos * weight).sum().backward()
    assert weight.grad is not None
