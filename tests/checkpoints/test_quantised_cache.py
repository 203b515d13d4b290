"""Quantised weights on disk: the same decoder again, nothing damaged is used, nothing half-written appears, the bound is kept."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from service.checkpoints import load as loading
from service.checkpoints.load import Quantisation, load
from service.checkpoints.manifest import Manifest, read_manifest
from service.checkpoints.quantised_cache import QuantisedCache, cache_in, layout_of
from service.models.attention import DenseAttend
from service.models.decoder import Decoder
from service.types.errors import CheckpointError, StartupError
from tests.tiny_models import build_tiny

TOKENS = torch.arange(20)
KINDS = ("int8", "int4")


@pytest.fixture
def manifest(tmp_path: Path) -> Manifest:
    return read_manifest(build_tiny(tmp_path / "model", "qwen2"))


@pytest.fixture
def cache(tmp_path: Path) -> QuantisedCache:
    return QuantisedCache(tmp_path / "cache", 1 << 30)


def logits(decoder: Decoder) -> torch.Tensor:
    with torch.inference_mode():
        found: torch.Tensor = decoder(TOKENS, TOKENS, DenseAttend(1, len(TOKENS), decoder.spec.layers))
    return found


def quantised(manifest: Manifest, cache: QuantisedCache | None, kind: str = "int8") -> Decoder:
    return load(manifest, "cpu", torch.float32, quantisation=Quantisation(kind, cache))


def refuse_checkpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise AssertionError("the checkpoint was read")

    monkeypatch.setattr(loading, "_load_checkpoint", fail)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_second_load_reads_the_cache_and_computes_the_same(
    manifest: Manifest, cache: QuantisedCache, kind: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    choice = Quantisation(kind, cache)
    first = load(manifest, "cpu", dtype, quantisation=choice)
    assert torch.equal(logits(first), logits(load(manifest, "cpu", dtype, quantisation=Quantisation(kind))))
    refuse_checkpoint(monkeypatch)
    second = load(manifest, "cpu", dtype, quantisation=choice)
    assert torch.equal(logits(first), logits(second))
    assert second.weight_bytes == first.weight_bytes and not second.training


@pytest.mark.parametrize("kind", KINDS)
def test_the_file_is_plain_safetensors(manifest: Manifest, cache: QuantisedCache, kind: str) -> None:
    quantised(manifest, cache, kind)
    path = cache.path(manifest, kind, torch.float32)
    with safe_open(path, "pt") as file:
        assert list(file.keys()) and set(file.keys()) == set(layout_of(manifest, kind, torch.float32))


def test_kinds_types_and_checkpoints_have_files_of_their_own(manifest: Manifest, cache: QuantisedCache, tmp_path: Path) -> None:
    other = read_manifest(build_tiny(tmp_path / "other", "qwen2", seed=3))
    paths = {cache.path(m, kind, dtype) for m in (manifest, other) for kind in KINDS for dtype in (torch.float32, torch.bfloat16)}
    assert len(paths) == 8


def test_a_checkpoint_written_again_is_quantised_again(manifest: Manifest, cache: QuantisedCache) -> None:
    before = cache.path(manifest, "int8", torch.float32)
    weights = next(manifest.directory.glob("*.safetensors"))
    os.utime(weights, ns=(1, 1))
    assert cache.path(manifest, "int8", torch.float32) != before


@pytest.mark.parametrize("place", ["header", "middle", "last byte", "truncated", "appended"])
def test_damaged_files_are_never_used_and_made_again(
    manifest: Manifest, cache: QuantisedCache, place: str, capsys: pytest.CaptureFixture[str]
) -> None:
    sound = logits(quantised(manifest, cache))
    path = cache.path(manifest, "int8", torch.float32)
    whole = path.read_bytes()
    content = bytearray(whole)
    if place == "truncated":
        del content[-10:]
    elif place == "appended":
        content += b"x"
    else:
        at = {"header": 40, "middle": len(content) // 2, "last byte": -1}[place]
        content[at] ^= 1
    path.write_bytes(content)
    assert torch.equal(logits(quantised(manifest, cache)), sound)
    assert "quantised weights are made again" in capsys.readouterr().err
    assert path.read_bytes() == whole


def test_a_load_that_fails_leaves_nothing(tmp_path: Path, cache: QuantisedCache) -> None:
    manifest = read_manifest(build_tiny(tmp_path / "broken"))
    weights = next(manifest.directory.glob("*.safetensors"))
    content = bytearray(weights.read_bytes())
    content[-4:] = b"\x00\x00\xc0\x7f"
    weights.write_bytes(content)
    with pytest.raises(CheckpointError, match="not finite"):
        quantised(manifest, cache)
    assert list((tmp_path / "cache").iterdir()) == []


def test_least_recently_used_files_make_room(manifest: Manifest, cache: QuantisedCache, tmp_path: Path) -> None:
    quantised(manifest, cache, "int4")
    quantised(manifest, cache, "int8")
    old, used = (cache.path(manifest, kind, torch.float32) for kind in KINDS[::-1])
    os.utime(old, (1, 1))
    os.utime(used, (2, 2))
    third = read_manifest(build_tiny(tmp_path / "third", "qwen2", seed=4))
    bound = used.stat().st_size * 2 + 100
    quantised(third, QuantisedCache(tmp_path / "cache", bound))
    left = set((tmp_path / "cache").iterdir())
    assert old not in left and left == {used, cache.path(third, "int8", torch.float32)}


def test_reading_counts_as_use(manifest: Manifest, cache: QuantisedCache) -> None:
    quantised(manifest, cache)
    path = cache.path(manifest, "int8", torch.float32)
    os.utime(path, (1, 1))
    quantised(manifest, cache)
    assert path.stat().st_mtime > 1


def test_what_is_larger_than_the_bound_is_not_kept_and_that_is_said(
    manifest: Manifest, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    quantised(manifest, QuantisedCache(tmp_path / "small", 100))
    assert not (tmp_path / "small").exists()
    assert "made again at each start: they take" in capsys.readouterr().err


def test_a_directory_that_cannot_be_made_ends_nothing_and_is_said(
    manifest: Manifest, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    decoder = quantised(manifest, QuantisedCache(tmp_path / "file" / "cache", 1 << 30))
    assert f"made again at each start: {tmp_path / 'file' / 'cache'}: Not a directory" in capsys.readouterr().err
    assert torch.equal(logits(decoder), logits(quantised(manifest, None)))


def test_int4_of_a_model_served_otherwise_has_a_file_of_its_own(manifest: Manifest, cache: QuantisedCache) -> None:
    """What calibrates it is what the model computes; int8 depends on the weights alone."""
    spec = manifest.spec
    other = replace(manifest, spec=replace(spec, rope=replace(spec.rope, theta=2 * spec.rope.theta)))
    same = {kind: cache.path(manifest, kind, torch.float32) == cache.path(other, kind, torch.float32) for kind in KINDS}
    assert same == {"int8": True, "int4": False}


def test_a_disk_that_fails_while_writing_ends_nothing(
    manifest: Manifest, cache: QuantisedCache, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    quantised(manifest, cache)
    assert "made again at each start: No space left on device" in capsys.readouterr().err
    assert list(cache.path(manifest, "int8", torch.float32).parent.iterdir()) == []


def test_where_the_cache_is(tmp_path: Path) -> None:
    assert cache_in("none", 1) is None
    assert cache_in(str(tmp_path / "new"), 1) is not None
    (tmp_path / "file").write_text("")
    with pytest.raises(StartupError, match="is not a directory"):
        cache_in(str(tmp_path / "file"), 1)


def test_a_user_without_a_home_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def homeless(_: Path) -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "expanduser", homeless)
    with pytest.raises(StartupError, match="no home directory"):
        cache_in("~/.cache/x", 1)
