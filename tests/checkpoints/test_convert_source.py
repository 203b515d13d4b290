"""Inputs in every form, and those that are refused before anything is converted."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from service.checkpoints.convert_source import open_source
from service.types.errors import CheckpointError
from tests.checkpoints.test_store import publish
from tests.tiny_models import build_tiny


def test_a_directory_of_ours_is_verified(tmp_path: Path) -> None:
    manifest = publish(tmp_path)
    source = open_source(manifest.directory)
    assert (source.spec, source.digest, source.verified) == (manifest.spec, manifest.digest, True)
    assert set(source.files) == {"tokenizer.json", "tokenizer_config.json"}
    weights = manifest.directory / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"model\.safetensors is not the file"):
        open_source(manifest.directory)


def test_a_directory_without_a_manifest_is_read_unverified(tmp_path: Path) -> None:
    manifest = publish(tmp_path)
    (manifest.directory / "manifest.json").unlink()
    source = open_source(manifest.directory)
    assert (source.spec, source.digest, source.verified) == (manifest.spec, None, False)


@pytest.mark.parametrize("own", [True, False])
def test_a_weight_file_with_its_configuration_beside(tmp_path: Path, own: bool) -> None:
    directory = publish(tmp_path).directory if own else build_tiny(tmp_path / "tiny")
    source = open_source(directory / "model.safetensors")
    assert source.spec == open_source(directory).spec and "tokenizer.json" in source.files
    with source.reader() as reader:
        assert len(source.match(reader).pieces) > 10


def test_a_bin_file_with_a_configuration_of_its_name(tmp_path: Path) -> None:
    manifest = publish(tmp_path)
    shutil.copy(manifest.directory / "config.yaml", tmp_path / "v2.3_model.yaml")
    torch.save({}, tmp_path / "v2.3_model.bin")
    assert open_source(tmp_path / "v2.3_model.bin").spec == manifest.spec


def test_a_configuration_elsewhere(tmp_path: Path) -> None:
    directory = build_tiny(tmp_path / "tiny", storage="bin")
    (tmp_path / "alone").mkdir()
    shutil.move(directory / "pytorch_model.bin", tmp_path / "alone" / "weights.pth")
    with pytest.raises(CheckpointError, match=r"weights\.pth does not say what network it holds.*--config"):
        open_source(tmp_path / "alone" / "weights.pth")
    source = open_source(tmp_path / "alone" / "weights.pth", directory / "config.json")
    assert source.spec.family == "llama" and "tokenizer.json" in source.files


def test_the_spare_chat_template_is_taken_along(tmp_path: Path) -> None:
    directory = build_tiny(tmp_path / "tiny")
    (directory / "additional_chat_templates").mkdir()
    (directory / "additional_chat_templates" / "default.jinja").write_text("spare")
    assert open_source(directory).files["chat_template.jinja"] == b"spare"


@pytest.mark.parametrize(
    ("name", "words"),
    [("nowhere", "does not exist"), ("empty", "no weights"), ("bare", "holds no model"), ("notes.txt", "not a model directory")],
)
def test_what_is_no_model(tmp_path: Path, name: str, words: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "config.yaml").write_text("version: '2.3'\n")
    shutil.copytree(build_tiny(tmp_path / "tiny"), tmp_path / "bare")
    (tmp_path / "bare" / "config.json").unlink()
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(CheckpointError, match=words):
        open_source(tmp_path / name)


def test_an_index_that_points_outside(tmp_path: Path) -> None:
    directory = build_tiny(tmp_path / "tiny", storage="sharded")
    index = directory / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"][next(iter(content["weight_map"]))] = "../../etc/passwd"
    index.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match="not the name of a file beside it"):
        open_source(directory)
