"""Names of exported graphs: equal for what is equal, different for whatever changes the result."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from service.checkpoints import onnx_support
from service.checkpoints.long_context import adapt
from service.checkpoints.manifest import read_manifest
from service.checkpoints.onnx_support import graph_directory, queries_per_kv_head, unsupported
from service.types.settings import AttentionSettings
from tests.tiny_models import build_tiny


def test_a_name_follows_from_everything_that_matters(tmp_path: Path) -> None:
    manifest = read_manifest(build_tiny(tmp_path / "model"))
    name = graph_directory(manifest, tmp_path, "none")
    assert name == graph_directory(read_manifest(tmp_path / "model"), tmp_path, "none")
    assert name.suffix == ".onnx" and name.parent == tmp_path
    other = {
        graph_directory(manifest, tmp_path, "int8"),
        graph_directory(replace(manifest, spec=replace(manifest.spec, context_tokens=64)), tmp_path, "none"),
        graph_directory(read_manifest(build_tiny(tmp_path / "other", seed=1)), tmp_path, "none"),
    }
    os.utime(tmp_path / "model" / "model.safetensors", (1, 1))
    other.add(graph_directory(manifest, tmp_path, "none"))
    assert len(other) == 4 and name not in other


def test_graphs_for_processors_that_saturate_have_a_name_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = read_manifest(build_tiny(tmp_path / "model"))
    names = set()
    for saturates in (False, True):
        monkeypatch.setattr(onnx_support, "saturates_bytes", lambda saturates=saturates: saturates)
        names.add(graph_directory(manifest, tmp_path, "int8"))
    assert len(names) == 2


def test_a_plain_model_lacks_nothing(tmp_path: Path) -> None:
    spec = read_manifest(build_tiny(tmp_path / "model")).spec
    assert [unsupported(spec, kind) for kind in ("none", "int8", "int4", "int2")] == ["", "", "", "int2 weights"]
    assert queries_per_kv_head(spec, 0) == spec.layers[0].attention.heads // spec.layers[0].attention.kv_heads


@pytest.mark.parametrize(("store", "gap"), [("int8", "far blocks"), ("bf16", "far blocks"), ("evict", "")])
def test_only_far_blocks_that_are_read_are_lacking(tmp_path: Path, store: str, gap: str) -> None:
    spec = read_manifest(build_tiny(tmp_path / "model")).spec
    assert unsupported(adapt(spec, AttentionSettings(attention_window=64, kv_far=store)), "none") == gap


def test_the_front_end_may_ask(tmp_path: Path) -> None:
    code = "import service.checkpoints.onnx_support, sys; sys.exit(bool({'torch', 'onnx', 'onnxruntime'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60, cwd=tmp_path).returncode == 0
