"""The cache stays under its bound: files and directories alike, the one used longest ago first, and nothing that is not ours."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from service.checkpoints.cache_room import entry_bytes, make_room, touch


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """100 bytes of weights used first, 100 of a graph used next, 100 of weights used last, and two files of others."""
    (tmp_path / "a.quantised.safetensors").write_bytes(bytes(100))
    (tmp_path / "b.onnx").mkdir()
    for name in ("model.onnx", "weights.bin"):
        (tmp_path / "b.onnx" / name).write_bytes(bytes(50))
    (tmp_path / "c.quantised.safetensors").write_bytes(bytes(100))
    (tmp_path / "notes.txt").write_bytes(bytes(1000))
    (tmp_path / ".d.onnx.partial-1").mkdir()
    for age, name in enumerate(("a.quantised.safetensors", "b.onnx", "c.quantised.safetensors")):
        os.utime(tmp_path / name, (age, age))
    return tmp_path


OTHERS = {"notes.txt", ".d.onnx.partial-1"}


@pytest.mark.parametrize(
    ("size", "left"),
    [
        (0, {"a.quantised.safetensors", "b.onnx", "c.quantised.safetensors"}),
        (1, {"b.onnx", "c.quantised.safetensors"}),
        (101, {"c.quantised.safetensors"}),
        (300, set()),
        (9000, set()),
    ],
)
def test_what_was_used_longest_ago_makes_room(cache: Path, size: int, left: set[str]) -> None:
    make_room(cache, size, 300)
    assert {path.name for path in cache.iterdir()} - OTHERS == left
    assert {path.name for path in cache.iterdir()} >= OTHERS


def test_use_makes_young(cache: Path) -> None:
    touch(cache / "a.quantised.safetensors")
    make_room(cache, 101, 300)
    assert {path.name for path in cache.iterdir()} - OTHERS == {"a.quantised.safetensors"}
    touch(cache / "not there")


def test_a_directory_counts_with_its_files(cache: Path) -> None:
    assert entry_bytes(cache / "b.onnx") == entry_bytes(cache / "c.quantised.safetensors") == 100
