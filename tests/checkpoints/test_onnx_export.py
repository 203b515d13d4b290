"""An exported graph against the torch decoder: sizes, families, windows, int8, batches, reused blocks; refusals; the cache on disk."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

from onnx import TensorProto
from onnx import load as load_graph

from service.checkpoints import onnx_export, onnx_nodes
from service.checkpoints.bundled import bundled_directory
from service.checkpoints.load import load
from service.checkpoints.manifest import Manifest, read_manifest
from service.checkpoints.onnx_export import export, find_or_export, refuse
from service.checkpoints.onnx_graph import OnnxEncoder, OnnxGraph, Rectangle, Sight, seen_by
from service.models.attention import DenseAttend
from service.types.catalog import V1_0, V2_3, V3_5, V4_8, VersionLine
from service.types.errors import CheckpointError
from service.types.vision import Grid
from tests.tiny_models import build_tiny, build_tiny_line

LLAMA3 = {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama3": ("llama", {"hidden_size": 96, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 20, "rope": LLAMA3}),
    "bias-tied": ("llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
    "window": ("mistral", {"num_attention_heads": 7, "num_key_value_heads": 1, "head_dim": 24, "sliding_window": 70}),
    "mixed": ("qwen2", {"num_hidden_layers": 3, "use_sliding_window": True, "sliding_window": 29, "max_window_layers": 1}),
    "yarn": ("qwen2", {"num_key_value_heads": 4, "tie_word_embeddings": True, "rope": YARN}),
    "qk-norm": ("qwen3", {"num_key_value_heads": 1, "head_dim": 32}),
}
TOKENS = 200


def opened(directory: Path, manifest: Manifest, blocks: int) -> OnnxGraph:
    layout = manifest.spec.kv_layout()
    return OnnxGraph(directory, layout, [blocks] * len(layout.groups), threads=1)


def expected(manifest: Manifest, tokens: np.ndarray) -> np.ndarray:
    decoder = load(manifest, "cpu", torch.float32)
    attend = DenseAttend(1, len(tokens), manifest.spec.layers)
    with torch.inference_mode():
        return decoder(torch.from_numpy(tokens), torch.arange(len(tokens)), attend).numpy()


@pytest.mark.parametrize("name", sorted(CASES))
def test_pieces_then_single_tokens_beside_another_sequence(name: str, tmp_path: Path) -> None:
    """Two sequences of different lengths: prompts in pieces across blocks, then both decode in one batch; blocks out of order, dirty."""
    family, overrides = CASES[name]
    manifest = read_manifest(build_tiny(tmp_path / "model", family, seed=3, **overrides))
    export(manifest, tmp_path / "graph", "none")
    graph = opened(tmp_path / "graph", manifest, 8)
    for cache in graph.caches.values():
        cache[:, 64:] = np.nan  # whatever an earlier owner left; block 0 is never written
    draw = np.random.default_rng(2)
    long, short = draw.integers(0, 256, TOKENS), draw.integers(0, 256, 80)
    table = np.array([[7, 2, 5, 1], [3, 6, 0, 0]], np.int32)
    groups = len(manifest.spec.kv_layout().groups)
    truth = (expected(manifest, long), expected(manifest, short))
    for row, tokens, bounds in ((0, long, (0, 1, 70, 190)), (1, short, (0, 64, 70))):
        for start, end in pairwise(bounds):
            batch = Rectangle(tokens[None, start:end], np.array([start]), (table[row : row + 1],) * groups, np.arange(end - start))
            np.testing.assert_allclose(graph.logits(batch), truth[row][start:end], atol=1e-4, rtol=1e-4)
    for step in range(10):
        tokens = np.array([[long[190 + step]], [short[70 + step]]])
        batch = Rectangle(tokens, np.array([190 + step, 70 + step]), (table,) * groups, np.array([1, 0]))
        found = graph.logits(batch)
        np.testing.assert_allclose(found, [truth[1][70 + step], truth[0][190 + step]], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("quantize", ["none", "int8", "int4"])
@pytest.mark.parametrize("line", [V1_0, V2_3, V3_5, V4_8], ids=lambda line: line.label)
def test_every_bundled_model_without_far_blocks_is_exported_and_agrees(line: VersionLine, quantize: str, tmp_path: Path) -> None:
    export(read_manifest(bundled_directory(line)), tmp_path / "graph", quantize)
    assert (tmp_path / "graph" / "encoder.onnx").is_file() == line.reads_images


def test_images_of_every_grid_become_what_the_encoder_of_torch_makes_of_them(tmp_path: Path) -> None:
    manifest = read_manifest(build_tiny_line(tmp_path / "line"))
    export(manifest, tmp_path / "graph", "none")
    decoder, vision = load(manifest, "cpu", torch.float32), manifest.spec.vision
    encoder = OnnxEncoder(tmp_path / "graph", vision, 1)
    for rows, columns in ((1, 1), (1, 4), (3, 2), (2, 3), (3, 3)):
        pixels = np.random.default_rng(rows + columns).integers(0, 256, (1, rows * vision.unit, columns * vision.unit, 3), np.uint8)
        with torch.inference_mode():
            tokens = decoder.vision(torch.from_numpy(pixels), Grid(rows, columns))[0]
            expected = (tokens, *decoder.fusion.keys_values(tokens))
        for found, wanted in zip(encoder.encode(pixels.tobytes(), Grid(rows, columns)), expected, strict=True):
            np.testing.assert_allclose(found, wanted.numpy(), atol=1e-4, rtol=1e-4)


def test_rows_that_see_no_image_are_the_same_beside_one_that_does(tmp_path: Path) -> None:
    """And the gates are summed over the positions that see: none of the first, two of the second."""
    manifest = read_manifest(build_tiny_line(tmp_path / "line"))
    spec = manifest.spec
    export(manifest, tmp_path / "graph", "none")
    graph = opened(tmp_path / "graph", manifest, 4)
    draw, tokens, tables = np.random.default_rng(3), np.array([[7, 8, 9], [5, 6, 7]]), (np.array([[1], [2]]),)
    keys, values = draw.standard_normal((2, 2, spec.fusion.kv_heads, spec.fusion.head_dim), np.float32)
    sight = Sight(np.array([1, 2]), draw.standard_normal((2, spec.dim), np.float32), np.array([0, 1, 2]), keys, values)
    blind = graph.logits(Rectangle(tokens, np.zeros(2, np.int64), tables, np.arange(6)))
    assert not graph.gates.any()
    seen = seen_by([None, sight], spec.fusion.heads // spec.fusion.kv_heads)
    seeing = graph.logits(Rectangle(tokens, np.zeros(2, np.int64), tables, np.arange(6), seen))
    np.testing.assert_array_equal(seeing[:4], blind[:4])
    assert (np.abs(seeing[4:] - blind[4:]).max(axis=1) > 1e-3).all()
    assert ((graph.gates > 0) & (graph.gates < 2)).all() and len(graph.gates) == 2 * spec.fusion.heads
    assert seen_by([None, None], 2) is None


def test_the_caches_are_written_in_place(tmp_path: Path) -> None:
    manifest = read_manifest(build_tiny(tmp_path / "model"))
    export(manifest, tmp_path / "graph", "none")
    graph = opened(tmp_path / "graph", manifest, 2)
    graph.logits(Rectangle(np.array([[5, 6]]), np.array([0]), (np.array([[2]]),), np.array([1])))
    for cache in graph.caches.values():
        written = np.abs(cache).max(axis=(0, 2)) > 0
        assert np.flatnonzero(written).tolist() == [128, 129]


@pytest.mark.parametrize("quantize", ["int8", "int4"])
def test_a_quantised_row_does_not_depend_on_its_neighbours(quantize: str, tmp_path: Path) -> None:
    manifest = read_manifest(build_tiny(tmp_path / "model", tie_word_embeddings=True))
    export(manifest, tmp_path / "graph", quantize)
    graph = opened(tmp_path / "graph", manifest, 3)
    table = np.array([[1], [2], [3]])
    tokens = np.array([[9], [250], [77]])
    together = graph.logits(Rectangle(tokens, np.zeros(3, np.int64), (table,), np.arange(3)))
    for row in range(3):
        alone = graph.logits(Rectangle(tokens[row : row + 1], np.zeros(1, np.int64), (table[row : row + 1],), np.zeros(1, np.int64)))
        np.testing.assert_allclose(alone[0], together[row], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("quantize", ["int8", "int4"])
def test_unsigned_weights_give_the_same(quantize: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where bytes of which one is signed saturate, both are unsigned."""
    manifest = read_manifest(build_tiny(tmp_path / "model", tie_word_embeddings=True))
    found, types = [], set()
    for unsigned in (False, True):
        monkeypatch.setattr(onnx_nodes, "saturates_bytes", lambda unsigned=unsigned: unsigned)
        directory = tmp_path / f"graph{unsigned}"
        export(manifest, directory, quantize)
        written = load_graph(directory / "model.onnx", load_external_data=False).graph.initializer
        types |= {tensor.data_type for tensor in written if tensor.name.endswith(".values") and len(tensor.dims) == 2}
        graph = opened(directory, manifest, 1)
        found.append(graph.logits(Rectangle(np.array([[9, 250, 77]]), np.array([0]), (np.array([[1]]),), np.array([2]))))
    np.testing.assert_array_equal(*found)
    assert types == {TensorProto.INT8, TensorProto.UINT8}


def test_a_graph_that_disagrees_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = read_manifest(build_tiny(tmp_path / "model"))
    monkeypatch.setattr(onnx_export, "attention_factor", lambda spec: 1.5)
    with pytest.raises(CheckpointError, match="differs from the model"):
        export(manifest, tmp_path / "graph", "none")
    assert not (tmp_path / "graph").exists()


def test_the_cache_is_named_by_what_was_exported(tmp_path: Path) -> None:
    manifest = read_manifest(build_tiny(tmp_path / "model"))
    first = find_or_export(manifest, tmp_path / "cache", "none")
    stamp = (first / "model.onnx").stat().st_mtime_ns
    assert find_or_export(manifest, tmp_path / "cache", "none") == first
    assert (first / "model.onnx").stat().st_mtime_ns == stamp
    other = read_manifest(build_tiny(tmp_path / "other", seed=1))
    assert find_or_export(other, tmp_path / "cache", "none") != first
    assert find_or_export(manifest, tmp_path / "cache", "int8") != first


def test_int4_is_checked_against_the_values_that_its_steps_stand_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Scales that are a tenth too large are noticed."""
    manifest = read_manifest(build_tiny(tmp_path / "model"))

    def wrong(weights: onnx_nodes.Weights, name: str) -> Any:
        found = sound(weights, name)
        return replace(found, scales=found.scales * 1.1) if found.kind == "int4" else found

    sound = onnx_nodes.Weights.quantised
    monkeypatch.setattr(onnx_nodes.Weights, "quantised", wrong)
    with pytest.raises(CheckpointError, match="differs from the model"):
        export(manifest, tmp_path / "graph", "int4")


def test_what_cannot_be_is_refused_by_name(tmp_path: Path) -> None:
    spec = read_manifest(build_tiny(tmp_path / "model")).spec
    with pytest.raises(CheckpointError, match="int2 weights"):
        refuse(spec, "int2")
    dynamic = read_manifest(build_tiny(tmp_path / "dynamic", rope={"rope_type": "dynamic", "factor": 2.0})).spec
    with pytest.raises(CheckpointError, match="dynamic rope"):
        refuse(dynamic, "none")
    seeing = read_manifest(build_tiny_line(tmp_path / "line")).spec
    refuse(seeing, "none")
    with pytest.raises(CheckpointError, match="images without a fusion"):
        refuse(replace(seeing, fusion=None), "none")
    with pytest.raises(CheckpointError, match="far blocks"):
        refuse(replace(spec, layers=(replace(spec.layers[0], attention=_far(spec)), *spec.layers[1:])), "none")


def _far(spec: Any) -> Any:
    from service.types.kv_layout import FarSpec

    return replace(spec.layers[0].attention, window=64, far=FarSpec())


def test_running_a_graph_needs_no_torch() -> None:
    code = "import service.checkpoints.onnx_graph, sys; sys.exit('torch' in sys.modules or 'onnx' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0


def test_the_runtime_sends_nothing_to_its_maker(tmp_path: Path) -> None:
    """Its reporting begins with an identifier in the directory for temporary files, when the library is loaded."""
    environment = {name: value for name, value in os.environ.items() if name != "ORT_DISABLE_TELEMETRY"} | {"TMPDIR": str(tmp_path)}
    code = "import service.checkpoints.onnx_graph, sys; sys.exit('onnxruntime' not in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60, env=environment)
    assert list(tmp_path.iterdir()) == []
