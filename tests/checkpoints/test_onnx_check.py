"""What the check of an exported graph sees: a wrong part is named, and roundings that fall differently over many layers are no error."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

from service.checkpoints import onnx_check, onnx_export, onnx_nodes
from service.checkpoints.load import Quantisation, load
from service.checkpoints.manifest import read_manifest
from service.checkpoints.onnx_check import Probe, check_logits, check_quantised
from service.checkpoints.onnx_export import export
from service.checkpoints.onnx_support import GRAPH
from service.types.errors import CheckpointError
from tests.tiny_models import build_tiny, build_tiny_line


def test_a_deep_model_s_roundings_grow_and_are_no_error(tmp_path: Path) -> None:
    """End to end the graph is further from the decoder than a layer may be; every layer by itself is near."""
    manifest = read_manifest(build_tiny(tmp_path / "model", num_hidden_layers=24, seed=2))
    export(manifest, tmp_path / "graph", "int8")
    probe = Probe(manifest.spec)
    expected = probe.decoded(load(manifest, "cpu", torch.float32, quantisation=Quantisation("int8")))
    found, watched = probe.graphed(tmp_path / "graph", GRAPH)
    assert watched == [] and np.abs(found - expected).max() > onnx_check.TOLERANCES["int8"] * np.abs(expected).max()
    assert sorted(path.name for path in (tmp_path / "graph").iterdir()) == ["export.json", "model.onnx", "product.onnx", "weights.bin"]


@pytest.mark.parametrize(("number", "part"), [(0, "embedding"), (1, "layer 0"), (6, "layer 1"), (9, "head")])
def test_a_wrong_weight_is_seen_and_its_part_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, part: str) -> None:
    """The embedding, then four products a layer, then the head."""
    manifest = read_manifest(build_tiny(tmp_path / "model", num_hidden_layers=2))
    sound, calls = onnx_nodes.Weights.quantised, []

    def quantised(weights, name):
        stored = sound(weights, name)
        calls.append(name)
        return replace(stored, scales=stored.scales * 1.1) if len(calls) - 1 == number else stored

    monkeypatch.setattr(onnx_nodes.Weights, "quantised", quantised)
    with pytest.raises(CheckpointError, match=f"in its {part}:"):
        export(manifest, tmp_path / "graph", "int8")
    assert not (tmp_path / "graph").exists()


@pytest.mark.parametrize(
    ("quantize", "module", "instead", "sentence"),
    [
        ("none", "vision.layers.0.attention.out", None, "encoder of images differs"),
        ("none", "fusion.text", "fusion.query", "largest logit"),
        ("int8", "fusion.text", "fusion.query", "in its fusion:"),
        ("int8", "fusion.gates", None, "in its fusion:"),
    ],
)
def test_a_wrong_encoder_or_fusion_is_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quantize: str, module: str, instead: str | None, sentence: str
) -> None:
    """A product with another module's weight, or one whose result is negated."""
    sound = onnx_nodes.Nodes.linear

    def linear(nodes, x, name):
        if name != module:
            return sound(nodes, x, name)
        return nodes.op("Neg", sound(nodes, x, name)) if instead is None else sound(nodes, x, instead)

    monkeypatch.setattr(onnx_nodes.Nodes, "linear", linear)
    with pytest.raises(CheckpointError, match=sentence):
        export(read_manifest(build_tiny_line(tmp_path / "line")), tmp_path / "graph", quantize)
    assert not (tmp_path / "graph").exists()


def test_a_quantised_graph_with_wrong_positions_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = read_manifest(build_tiny(tmp_path / "model"))
    monkeypatch.setattr(onnx_export, "attention_factor", lambda spec: 1.5)
    with pytest.raises(CheckpointError, match=r"differs from the (quantised )?model"):
        export(manifest, tmp_path / "graph", "int8")


def test_logits_in_float32_agree_to_rounding() -> None:
    expected = np.array([1.0, -4.0], np.float32)
    check_logits(expected, expected + 3e-4)
    for wrong in (expected + 5e-4, expected * np.nan):
        with pytest.raises(CheckpointError, match="largest logit"):
            check_logits(expected, wrong)


def test_a_quantised_graph_may_differ_by_what_quantising_changes() -> None:
    plain, quantised = np.zeros(100, np.float32), np.full(100, 0.1, np.float32)
    check_quantised(plain, quantised, quantised + 0.19)
    for wrong in (quantised + 0.21, quantised * np.nan):
        with pytest.raises(CheckpointError, match="times what quantising changes"):
            check_quantised(plain, quantised, wrong)
