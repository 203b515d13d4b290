"""Archives made to hurt are refused in one sentence before torch opens them; our own one-file form comes back whole."""

from __future__ import annotations

import shutil
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from service.checkpoints import bin_files
from service.checkpoints.bin_files import OWN_FORMAT, read_bin, write_bin
from service.checkpoints.stored_tensors import WeightFiles, read_tensors
from service.types.errors import CheckpointError
from tests.tiny_models import build_tiny


def saved(tmp_path: Path) -> Path:
    torch.save({"a": torch.arange(4096.0), "b": torch.zeros(2, 3)}, tmp_path / "good.bin")
    return tmp_path / "good.bin"


def repacked(source: Path, change: Callable[[zipfile.ZipFile, zipfile.ZipInfo, bytes], None]) -> Path:
    """The archive of `source` with its entries written by `change`."""
    target = source.with_name("bad.bin")
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for entry in old.infolist():
            change(new, entry, old.read(entry))
    return target


def test_what_is_good_is_read(tmp_path: Path) -> None:
    content = read_bin(saved(tmp_path))
    assert torch.equal(content.tensors["a"], torch.arange(4096.0)) and content.config is None


def test_a_zip_bomb(tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(1 << 20)}, tmp_path / "good.bin")
    bomb = repacked(tmp_path / "good.bin", lambda new, entry, data: new.writestr(entry.filename, data, zipfile.ZIP_DEFLATED))
    assert bomb.stat().st_size < 50_000
    with pytest.raises(CheckpointError, match=r"bad\.bin is compressed \(\d+ bytes in \d+\), and is not loaded"):
        read_bin(bomb)


@pytest.mark.parametrize("name", ["../escape", "/etc/escape", "a/../../escape", "a\\escape"])
def test_entries_that_point_outside(tmp_path: Path, name: str) -> None:
    source = saved(tmp_path)

    def change(new: zipfile.ZipFile, entry: zipfile.ZipInfo, data: bytes) -> None:
        new.writestr(entry.filename, data)
        if entry.filename.endswith("data.pkl"):
            info = zipfile.ZipInfo("x")
            info.filename = name
            new.writestr(info, b"x")

    with pytest.raises(CheckpointError, match="points outside it"):
        read_bin(repacked(source, change))


def test_an_entry_twice(tmp_path: Path) -> None:
    def change(new: zipfile.ZipFile, entry: zipfile.ZipInfo, data: bytes) -> None:
        new.writestr(entry.filename, data)
        if entry.filename.endswith("/data/0"):
            new.writestr(entry.filename, b"\0" * len(data))

    with pytest.raises(CheckpointError, match="an entry twice"):
        read_bin(repacked(saved(tmp_path), change))


def test_an_overlong_pickle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bin_files, "PICKLE_BYTES", 20)
    with pytest.raises(CheckpointError, match="a list of tensors of"):
        read_bin(saved(tmp_path))


def test_entries_that_share_bytes(tmp_path: Path) -> None:
    """A directory that lists the same stretch of the file many times claims more than there is."""
    file = saved(tmp_path)
    with zipfile.ZipFile(file, "a") as archive:
        first = next(entry for entry in archive.infolist() if entry.filename.endswith("/data/0"))
        for index in range(8):
            twin = zipfile.ZipInfo(first.filename.replace("/data/0", f"/data/{100 + index}"))
            twin.header_offset, twin.file_size, twin.compress_size, twin.CRC = (
                first.header_offset,
                first.file_size,
                first.file_size,
                first.CRC,
            )
            archive.filelist.append(twin)
            archive.NameToInfo[twin.filename] = twin
        archive._didModify = True  # type: ignore[attr-defined]
    with pytest.raises(CheckpointError, match="claims more bytes than it has"):
        read_bin(file)


def test_a_shape_larger_than_the_file(tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(1).expand(1 << 40)}, tmp_path / "wide.bin")
    with pytest.raises(CheckpointError, match=r"a claims shape \[1099511627776\], more values than the file has"):
        read_bin(tmp_path / "wide.bin")


@pytest.mark.parametrize("tensor", [torch.eye(3).to_sparse(), torch.empty(2, device="meta")], ids=["sparse", "meta"])
def test_tensors_that_are_not_plain(tmp_path: Path, tensor: torch.Tensor) -> None:
    torch.save({"a": tensor}, tmp_path / "odd.bin")
    with pytest.raises(CheckpointError):
        read_bin(tmp_path / "odd.bin")


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not exist"):
        read_bin(tmp_path / "none.bin")


class TestOwnForm:
    """The one-file form."""

    def write(self, tmp_path: Path) -> Path:
        source = build_tiny(tmp_path / "tiny", dtype="bfloat16")
        tensors = read_tensors(WeightFiles((source / "model.safetensors",), True, {}))
        write_bin(tmp_path / "own.pt", "version: '2.3'\n", {"tokenizer.json": "{}"}, tensors)
        shutil.rmtree(source)
        return tmp_path / "own.pt"

    def test_it_comes_back(self, tmp_path: Path) -> None:
        source = build_tiny(tmp_path / "again", dtype="bfloat16", storage="bin")
        content = read_bin(self.write(tmp_path))
        expected = torch.load(source / "pytorch_model.bin")
        assert (content.config, content.files) == ("version: '2.3'\n", {"tokenizer.json": "{}"})
        assert set(content.tensors) == set(expected)
        assert all(torch.equal(content.tensors[name], expected[name]) for name in expected)

    @pytest.mark.parametrize(
        "change",
        [
            {"config": 3},
            {"files": {"../a": "x"}},
            {"files": {"a": b"x"}},
            {"files": []},
            {"tensors": [1]},
            {"more": 1},
        ],
        ids=str,
    )
    def test_what_is_wrong_with_it_is_said(self, tmp_path: Path, change: dict[str, object]) -> None:
        state = torch.load(self.write(tmp_path))
        assert state["format"] == OWN_FORMAT
        torch.save({**state, **change}, tmp_path / "own.pt")
        with pytest.raises(CheckpointError, match=r"own\.pt (is not a complete file|holds a file|does not hold)"):
            read_bin(tmp_path / "own.pt")
