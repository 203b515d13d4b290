from __future__ import annotations

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from service.checkpoints import weight_readers
from service.checkpoints.stored_tensors import find_weight_files
from service.checkpoints.weight_readers import BinReader, SafetensorsReader, WeightReader
from service.types.errors import CheckpointError
from tests.tiny_models import build_tiny, tiny_weights


def whole(reader: WeightReader, name: str) -> torch.Tensor:
    shape = reader.shapes[name]
    flat = torch.empty(int(np.prod(shape)))
    for start, chunk in reader.chunks(name):
        flat[start : start + chunk.numel()] = chunk
    return flat.view(shape)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("storage", ["single", "sharded", "bin"])
def test_values_are_read_as_stored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str, storage: str) -> None:
    monkeypatch.setattr(weight_readers, "CHUNK_BYTES", 1000)
    directory = build_tiny(tmp_path, storage=storage, dtype=dtype, seed=3)
    expected = tiny_weights(json.loads((directory / "config.json").read_text()), 3)
    weights = find_weight_files(directory)
    with SafetensorsReader(weights) if weights.safetensors else BinReader(weights) as reader:
        assert set(reader.shapes) == set(expected)
        for name, values in expected.items():
            assert torch.equal(whole(reader, name), torch.from_numpy(values).to(getattr(torch, dtype)).float()), name


def bin_reader(directory: Path) -> BinReader:
    return BinReader(find_weight_files(directory))


def test_sharded_and_old_style_bin_files(tmp_path: Path) -> None:
    left, right = torch.arange(6.0).view(2, 3), torch.arange(4.0).view(2, 2).T
    torch.save({"a": left}, tmp_path / "one.bin", _use_new_zipfile_serialization=False)
    torch.save({"b": right}, tmp_path / "two.bin")
    index = {"weight_map": {"a": "one.bin", "b": "two.bin"}}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    with bin_reader(tmp_path) as reader:
        assert torch.equal(whole(reader, "a"), left)
        assert torch.equal(whole(reader, "b"), right)
    torch.save({"a": right}, tmp_path / "two.bin")
    with pytest.raises(CheckpointError, match=r"a is in two\.bin and in another file"):
        bin_reader(tmp_path)


class Exploit:
    """Writes a file when it is unpickled by a loader that runs code."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str, str]]:
        return open, (str(self.path), "w")


def test_code_in_a_bin_file_does_not_run(tmp_path: Path) -> None:
    torch.save({"a": Exploit(tmp_path / "ran")}, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin holds more than tensors"):
        bin_reader(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps(Exploit(tmp_path / "ran"), protocol=2))
    with pytest.raises(CheckpointError):
        bin_reader(tmp_path)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("keep", [0, 1, 50, 1000, -100])
def test_damaged_bin_files_are_named(tmp_path: Path, keep: int) -> None:
    file = build_tiny(tmp_path, storage="bin") / "pytorch_model.bin"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin (is empty|is damaged|holds more than tensors)"):
        bin_reader(tmp_path)


@pytest.mark.parametrize("content", [[torch.zeros(1)], {"a": 1}, {3: torch.zeros(1)}, torch.zeros(2)], ids=range(4))
def test_only_plain_dictionaries_of_tensors(tmp_path: Path, content: object) -> None:
    torch.save(content, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="plain dictionary of tensors"):
        bin_reader(tmp_path)


def test_other_types_are_refused_by_name(tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(2, dtype=torch.int64)}, tmp_path / "pytorch_model.bin")
    with bin_reader(tmp_path) as reader, pytest.raises(CheckpointError, match="a is stored as int64"):
        list(reader.chunks("a"))


def test_a_file_that_shrinks_while_it_is_read(tmp_path: Path) -> None:
    directory = build_tiny(tmp_path)
    file = directory / "model.safetensors"
    with SafetensorsReader(find_weight_files(directory)) as reader:
        file.write_bytes(file.read_bytes()[:5000])
        with pytest.raises(CheckpointError, match=r"ended in the middle of lm_head\.weight"):
            list(reader.chunks("lm_head.weight"))
