from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open

from service.checkpoints.stored_tensors import find_weight_files, read_header, read_tensors
from service.types.errors import CheckpointError
from tests.tiny_models import build_tiny, write_safetensors

Header = dict[str, Any]


def raw(path: Path, header: Any, data: bytes) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def entry(first: int, last: int, shape: list[int], dtype: str = "F32") -> Header:
    return {"dtype": dtype, "shape": shape, "data_offsets": [first, last]}


def test_header_agrees_with_the_safetensors_library(tmp_path: Path) -> None:
    directory = build_tiny(tmp_path, "qwen2")
    content = (directory / "model.safetensors").read_bytes()
    with safe_open(directory / "model.safetensors", framework="np") as library:
        tensors = read_header(directory / "model.safetensors")
        assert {tensor.name for tensor in tensors} == set(library.keys())
        for tensor in tensors:
            values = np.frombuffer(content[tensor.offset : tensor.offset + tensor.size], np.float32).reshape(tensor.shape)
            assert np.array_equal(values, library.get_tensor(tensor.name))


BROKEN: dict[str, tuple[Any, bytes]] = {
    "not-json": (b"{,", b""),
    "deep": (b"[" * 100_000, b""),
    "list": ([], b""),
    "name-twice": (b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}', b"1234"),
    "no-offsets": ({"a": {"dtype": "F32", "shape": [1]}}, b""),
    "negative": ({"a": entry(-4, 0, [1])}, b""),
    "float-shape": ({"a": {**entry(0, 4, [1]), "shape": [1.0]}}, b"1234"),
    "shape-lies": ({"a": entry(0, 4, [2])}, b"1234"),
    "past-the-end": ({"a": entry(0, 8, [2])}, b"1234"),
    "hole": ({"a": entry(4, 8, [1])}, b"12345678"),
    "overlap": ({"a": entry(0, 8, [2]), "b": entry(4, 8, [1])}, b"12345678"),
    "trailing": ({"a": entry(0, 4, [1])}, b"12345678"),
    "huge-shape": ({"a": entry(0, 4, [1 << 40, 1 << 40])}, b"1234"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_damaged_files_are_named(tmp_path: Path, case: str) -> None:
    with pytest.raises(CheckpointError, match=r"model\.safetensors is damaged \(.*\): copy or download it again\.$"):
        read_header(raw(tmp_path / "model.safetensors", *BROKEN[case]))


@pytest.mark.parametrize("keep", [0, 3, 8, 100, -1])
def test_truncated_files_are_named(tmp_path: Path, keep: int) -> None:
    file = build_tiny(tmp_path) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=r"model\.safetensors is damaged"):
        read_header(file)


def test_a_header_longer_than_the_file_reads_nothing(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes((1 << 62).to_bytes(8, "little") + b"{}")
    with pytest.raises(CheckpointError, match="cut off"):
        read_header(tmp_path / "model.safetensors")


def edit_index(directory: Path, change: Callable[[dict[str, str]], object]) -> Path:
    path = directory / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    change(index["weight_map"])
    path.write_text(json.dumps(index))
    return directory


@pytest.mark.parametrize("place", ["../secret", "/etc/passwd", "a/b", "..", "", "a\\b", 3, None, "nul\0"])
def test_an_index_cannot_leave_its_directory(tmp_path: Path, place: Any) -> None:
    (tmp_path / "secret").write_text("x")
    directory = edit_index(build_tiny(tmp_path / "model", storage="sharded"), lambda places: places.update({"lm_head.weight": place}))
    with pytest.raises(CheckpointError, match=r"index\.json puts lm_head\.weight in .*not the name of a file beside it"):
        find_weight_files(directory)


def test_links_to_files_elsewhere_are_followed(tmp_path: Path) -> None:
    directory = build_tiny(tmp_path / "model")
    (directory / "model.safetensors").rename(tmp_path / "blob")
    (directory / "model.safetensors").symlink_to(tmp_path / "blob")
    assert "lm_head.weight" in read_tensors(find_weight_files(directory))


def test_an_index_must_tell_the_truth(tmp_path: Path) -> None:
    directory = build_tiny(tmp_path / "a", storage="sharded")
    first, second = sorted(path.name for path in directory.glob("*.safetensors"))
    edit_index(directory, lambda places: places.update({"lm_head.weight": second}))
    with pytest.raises(CheckpointError, match=r"puts lm_head\.weight in .*00002\.safetensors, which does not have it"):
        read_tensors(find_weight_files(directory))
    (directory / first).unlink()
    with pytest.raises(CheckpointError, match=r"names .*00001-of-00002\.safetensors, which is not there"):
        find_weight_files(directory)
    (directory / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(CheckpointError, match="has no weight_map"):
        find_weight_files(directory)


def test_a_tensor_in_two_shards_is_refused(tmp_path: Path) -> None:
    directory = build_tiny(tmp_path, storage="sharded")
    for path in directory.glob("*.safetensors"):
        write_safetensors(path, {"lm_head.weight": np.zeros((2, 2), np.float32)})
    edit_index(directory, lambda places: None)
    with pytest.raises(CheckpointError, match=r"lm_head\.weight is in both .*00001.* and .*00002"):
        read_tensors(find_weight_files(directory))


def test_no_weights(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"has no weights: expected model\.safetensors"):
        find_weight_files(tmp_path)
