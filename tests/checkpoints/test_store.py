from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from service.checkpoints.load import load
from service.checkpoints.manifest import GenerationDefaults, Manifest, read_manifest, verify
from service.checkpoints.store import save
from service.models.build import build, init_weights
from service.models.decoder import Decoder
from service.types.catalog import LINES, V2_3, Shape, VersionLine
from service.types.errors import CheckpointError
from tests.tiny_models import CHAT_TEMPLATE, write_tokenizer

SHAPE = Shape(vocab_size=300, dim=24, layers=2, heads=6, kv_heads=2, mlp_hidden=40, context_tokens=64, head_dim=8)


def decoder_of(line: VersionLine = V2_3, seed: int = 0) -> Decoder:
    decoder = build(line.spec(SHAPE, (257,), 256), "cpu", torch.float32)
    init_weights(decoder, seed)
    return decoder


def tokenizer_files(tmp_path: Path) -> dict[str, bytes]:
    source = tmp_path / "tokenizer"
    source.mkdir(parents=True, exist_ok=True)
    write_tokenizer(source)
    return {path.name: path.read_bytes() for path in source.iterdir()}


def publish(tmp_path: Path, seed: int = 0, dtype: str = "float32") -> Manifest:
    decoder = decoder_of(seed=seed)
    return save(tmp_path / "out" / "model", decoder.spec, decoder.state_dict(), tokenizer_files(tmp_path), dtype=dtype)


@pytest.mark.parametrize("line", LINES, ids=lambda line: line.label)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_round_trip_is_bit_equal(tmp_path: Path, line: VersionLine, dtype: str) -> None:
    decoder = decoder_of(line)
    extras = tokenizer_files(tmp_path)
    manifest = save(
        tmp_path / "model", decoder.spec, decoder.state_dict(), extras, dtype=dtype, generation={"temperature": 0.8, "top_k": 40}
    )
    verify(manifest)
    assert manifest == read_manifest(tmp_path / "model")
    assert (manifest.spec, manifest.family, manifest.line) == (decoder.spec, "deepseek-line", line.number)
    assert (manifest.stored_dtype, manifest.chat_template) == (dtype, CHAT_TEMPLATE)
    assert manifest.generation == GenerationDefaults(temperature=0.8, top_k=40)
    loaded = load(manifest, "cpu", torch.float32, serving=False).state_dict()
    for name, value in decoder.state_dict().items():
        assert torch.equal(loaded[name], value.to(getattr(torch, dtype)).float()), name
    written = json.loads((tmp_path / "model" / "manifest.json").read_text())
    assert (written["parameters"], written["digest"]) == (decoder.spec.parameters, manifest.digest)
    assert set(written["files"]) == {"config.yaml", "model.safetensors", *extras}


def test_the_digest_is_the_contents(tmp_path: Path) -> None:
    digests = [publish(tmp_path / name, seed).digest for name, seed in (("a", 0), ("b", 0), ("c", 1))]
    assert digests[0] == digests[1] != digests[2]


def test_publishing_again_replaces_and_leaves_nothing_beside(tmp_path: Path) -> None:
    first, second = publish(tmp_path, 0), publish(tmp_path, 1)
    assert first.digest != second.digest == read_manifest(tmp_path / "out" / "model").digest
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["model"]


@pytest.mark.parametrize("fault", ["missing", "unexpected", "shape", "nan", "overflow", "dtype", "path", "reserved", "line"])
def test_a_refused_save_leaves_nothing(tmp_path: Path, fault: str) -> None:
    decoder, extras = decoder_of(), tokenizer_files(tmp_path)
    spec, state, dtype = decoder.spec, dict(decoder.state_dict()), "float16"
    if fault == "missing":
        del state["norm.weight"]
    elif fault == "unexpected":
        state["extra.weight"] = torch.zeros(1)
    elif fault == "shape":
        state["norm.weight"] = torch.zeros(25)
    elif fault in ("nan", "overflow"):
        state["norm.weight"] = torch.full((24,), float("nan") if fault == "nan" else 1e6)
    elif fault == "dtype":
        dtype = "float64"
    elif fault in ("path", "reserved"):
        extras["../escape" if fault == "path" else "manifest.json"] = b""
    else:
        spec = replace(spec, family="llama")
    with pytest.raises(CheckpointError):
        save(tmp_path / "out" / "model", spec, state, extras, dtype=dtype)
    assert not (tmp_path / "out").exists() or list((tmp_path / "out").iterdir()) == []


KILLED = """
import os, signal, sys
from pathlib import Path
import tests.checkpoints.test_store as these
from service.checkpoints import store
calls = int(sys.argv[2])
real = os.fsync
def fsync(handle):
    global calls
    calls -= 1
    if calls == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    real(handle)
os.fsync = fsync
these.publish(Path(sys.argv[1]), 1)
"""


@pytest.mark.parametrize(("moment", "there"), [(1, False), (4, True), (5, False), (6, True)])
def test_a_killed_save_shows_nothing_half_written(tmp_path: Path, moment: int, there: bool) -> None:
    """Killed at any write, the name holds what it held before; the next save succeeds."""
    before = publish(tmp_path, 0).digest if there else None
    environment = {**os.environ, "PYTHONPATH": os.getcwd()}
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path), str(moment)], env=environment, check=False, capture_output=True)
    assert done.returncode == -signal.SIGKILL
    target = tmp_path / "out" / "model"
    assert (read_manifest(target).digest if target.exists() else None) == before
    assert publish(tmp_path, 1).digest != before


@pytest.mark.parametrize("name", ["config.yaml", "tokenizer.json", "tokenizer_config.json"])
def test_an_edited_file_is_noticed_when_read(tmp_path: Path, name: str) -> None:
    path = publish(tmp_path).directory / name
    path.write_bytes(path.read_bytes().replace(b"2", b"3", 1))
    with pytest.raises(CheckpointError, match=name):
        read_manifest(path.parent)


def test_a_flipped_bit_in_the_weights_is_noticed_by_verify(tmp_path: Path) -> None:
    manifest = publish(tmp_path)
    path = manifest.directory / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert read_manifest(manifest.directory) == manifest
    with pytest.raises(CheckpointError, match=r"model\.safetensors is not the file that manifest\.json describes"):
        verify(manifest)


@pytest.mark.parametrize("name", ["manifest.json", "tokenizer.json", "model.safetensors"])
def test_a_missing_file_is_named(tmp_path: Path, name: str) -> None:
    directory = publish(tmp_path).directory
    (directory / name).unlink()
    with pytest.raises(CheckpointError, match=name):
        read_manifest(directory)


def test_a_truncated_file_is_named(tmp_path: Path) -> None:
    path = publish(tmp_path).directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(CheckpointError, match=r"model\.safetensors has not the size"):
        read_manifest(path.parent)


def test_a_manifest_cannot_point_outside(tmp_path: Path) -> None:
    path = publish(tmp_path).directory / "manifest.json"
    path.write_text(path.read_text().replace('"tokenizer.json"', '"../tokenizer/tokenizer.json"'))
    with pytest.raises(CheckpointError, match="not the name of a file beside it"):
        read_manifest(path.parent)
