"""Which parameters are quantised, and that what the budget counts is what the decoder holds."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from service.checkpoints.load import Quantisation, load
from service.checkpoints.manifest import read_manifest
from service.checkpoints.quantisation import kind_of, packed_bytes, weight_bytes
from service.kernels.native.quantised import unsupported
from service.types.catalog import V2_3, V4_8
from tests.tiny_models import build_tiny

PLAIN, SHARING = (line.spec(dict(line.shapes)["nano"]) for line in (V2_3, V4_8))


def test_matrices_of_layers_take_the_kind_and_the_ends_take_int8() -> None:
    assert kind_of("layers.3.mlp.down.weight", (4, 8), "int4", PLAIN) == "int4"
    assert kind_of("layers.3.attention.qkv.weight", (4, 8), "int8", PLAIN) == "int8"
    assert kind_of("embed.weight", (4, 8), "int4", PLAIN) == kind_of("head.weight", (4, 8), "int4", PLAIN) == "int8"


def test_of_shared_layers_the_feed_forward_alone_is_int4() -> None:
    kinds = {
        name: kind_of(f"layers.0.{name}.weight", (4, 8), "int4", SHARING)
        for name in ("attention.qkv", "mlp.gate_up", "attention.out", "mlp.down")
    }
    assert kinds == {"attention.qkv": "int8", "mlp.gate_up": "int4", "attention.out": "int8", "mlp.down": "int4"}
    assert kind_of("layers.0.attention.out.weight", (4, 8), "none", SHARING) is None


@pytest.mark.parametrize("name", ["layers.0.attention.gate.weight", "vision.encode.weight", "fusion.query.weight", "layers.0.x.bias"])
def test_gates_vision_fusion_and_biases_stay(name: str) -> None:
    assert kind_of(name, (4, 8), "int4", PLAIN) is None


def test_vectors_stay_and_none_quantises_nothing() -> None:
    assert kind_of("layers.0.mlp_norm.weight", (8,), "int8", PLAIN) is None
    assert kind_of("layers.0.mlp.down.weight", (4, 8), "none", PLAIN) is None


def test_bytes_of_strips() -> None:
    assert packed_bytes("int8", 16, 4) == 16 * 8
    assert packed_bytes("int8", 17, 5) == 32 * 12
    assert packed_bytes("int4", 16, 32) == 288
    assert packed_bytes("int4", 17, 33) == 4 * 288


@pytest.mark.parametrize("kind", ["int8", "int4"])
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_the_budget_is_what_is_held(tmp_path: Path, family: str, kind: str) -> None:
    manifest = read_manifest(build_tiny(tmp_path, family))
    held = load(manifest, "cpu", torch.float32, quantisation=Quantisation(kind)).weight_bytes
    planned = weight_bytes(manifest.spec, 4, kind)
    assert held == planned if unsupported() is None else held <= planned
    assert planned < weight_bytes(manifest.spec, 4, "none") == manifest.spec.parameters * 4


def test_a_large_model_shrinks_to_a_quarter_and_less() -> None:
    spec = V2_3.spec(V2_3.shapes[-1][1])
    plain = weight_bytes(spec, 4, "none")
    assert 0.25 <= weight_bytes(spec, 4, "int8") / plain < 0.28
    assert weight_bytes(spec, 4, "int4") < 0.62 * weight_bytes(spec, 4, "int8") or spec.parameters < 1e8
