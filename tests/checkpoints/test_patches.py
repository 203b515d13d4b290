"""Patches of a line are compatible: `v5.2` and `v5.2.1` share the config format, and each loads under the other's config."""

from __future__ import annotations

import json
import shutil
from hashlib import sha256
from pathlib import Path

import pytest
import torch
import yaml
from torch import Tensor

from service.checkpoints.convert import Wanted, convert
from service.checkpoints.load import load
from service.checkpoints.manifest import read_manifest, verify
from service.models.attention import DenseAttend
from service.types.catalog import LINES, V2_3, V5_2, VersionLine
from service.types.errors import CheckpointError
from tests.tiny_models import build_tiny_line


def logits(directory: Path, tokens: int = 40) -> Tensor:
    decoder = load(read_manifest(directory), "cpu", torch.float32, serving=False)
    with torch.no_grad():
        return decoder(torch.arange(tokens) * 7 % 256, torch.arange(tokens), DenseAttend(1, tokens, decoder.spec.layers))


def under(config_of: Path, weights_of: Path, output: Path) -> Path:
    """The weights of one directory under the config of another, published as such."""
    shutil.copytree(weights_of, output)
    data = (config_of / "config.yaml").read_bytes()
    (output / "config.yaml").write_bytes(data)
    listed = json.loads((output / "manifest.json").read_text())
    listed["files"]["config.yaml"] = {"sha256": sha256(data).hexdigest(), "bytes": len(data)}
    listed["version"] = yaml.safe_load(data)["version"]
    (output / "manifest.json").write_text(json.dumps(listed))
    return output


@pytest.mark.parametrize("line", LINES, ids=lambda line: line.label)
def test_a_patch_and_its_line_load_under_each_others_config(tmp_path: Path, line: VersionLine) -> None:
    plain = build_tiny_line(tmp_path / "plain", line)
    patched = tmp_path / "patched"
    convert(plain, patched, Wanted(f"{line.number}.1"))
    assert read_manifest(patched).version == f"{line.number}.1" and read_manifest(plain).version == line.number
    assert read_manifest(patched).spec == read_manifest(plain).spec
    for config, weights, version in ((plain, patched, line.number), (patched, plain, f"{line.number}.1")):
        mixed = under(config, weights, tmp_path / version)
        manifest = read_manifest(mixed)
        verify(manifest)
        assert (manifest.line, manifest.version, manifest.spec) == (line.number, version, read_manifest(weights).spec)
        assert torch.equal(logits(mixed), logits(weights))


def test_another_line_is_no_patch(tmp_path: Path) -> None:
    """The same weights under the config of a line that keeps them elsewhere are refused or another network."""
    near, other = build_tiny_line(tmp_path / "near", V5_2), build_tiny_line(tmp_path / "other", V2_3)
    with pytest.raises(CheckpointError):
        load(read_manifest(under(other, near, tmp_path / "mixed")), "cpu", torch.float32, serving=False)
