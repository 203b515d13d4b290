from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from service.checkpoints.digests import PIECE_BYTES, SAMPLES, file_digest, list_digest, sampled_digest
from tests.tiny_models import build_tiny


def digest(directory: Path) -> str:
    return sampled_digest(directory, sorted(directory.glob("*.safetensors")))


def test_contents_decide_and_places_and_times_do_not(tmp_path: Path) -> None:
    first, second = build_tiny(tmp_path / "a", storage="sharded"), build_tiny(tmp_path / "b", storage="sharded")
    os.utime(second / "config.json", (0, 0))
    (second / "README.md").write_text("about")
    assert digest(first) == digest(second)
    assert len(digest(first)) == 64


@pytest.mark.parametrize("file", ["config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"])
@pytest.mark.parametrize("place", [0, 0.5, 1])
def test_any_changed_byte_of_a_small_checkpoint_shows(tmp_path: Path, file: str, place: float) -> None:
    directory = build_tiny(tmp_path)
    before = digest(directory)
    content = bytearray((directory / file).read_bytes())
    content[int(place * (len(content) - 1))] ^= 1
    (directory / file).write_bytes(content)
    assert digest(directory) != before


def test_a_large_file_is_sampled_to_its_last_byte(tmp_path: Path) -> None:
    file = tmp_path / "pytorch_model.bin"
    size = 40 * SAMPLES * PIECE_BYTES
    with file.open("wb") as stream:
        stream.truncate(size)
    before = sampled_digest(tmp_path, [file])
    for offset in (0, size - 1):
        with file.open("r+b") as stream:
            stream.seek(offset)
            stream.write(b"x")
        assert sampled_digest(tmp_path, [file]) != before
        before = sampled_digest(tmp_path, [file])
    with file.open("r+b") as stream:
        stream.truncate(size + 1)
    assert sampled_digest(tmp_path, [file]) != before


def test_whole_digests_are_sha256(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    assert file_digest(tmp_path / "a") == hashlib.sha256(b"abc").hexdigest()
    assert list_digest({"b": "2", "a": "1"}) == list_digest({"a": "1", "b": "2"}) != list_digest({"a": "2", "b": "1"})
