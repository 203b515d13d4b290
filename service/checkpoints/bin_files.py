"""`.bin` and `.pt` files: torch archives that strangers made, opened without running code, and our own one-file form of a checkpoint.

It does not know what tensors are for. Invariants: an archive is looked at before torch opens it, and one that holds compressed, doubled or
path-like entries is refused; what is loaded is a dictionary of plain tensors whose values lie in the file, none larger than it.
"""

from __future__ import annotations

import mmap
import pickle
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from service.checkpoints.stage import staged_file
from service.checkpoints.stored_tensors import DTYPES, StoredTensor
from service.types.errors import CheckpointError

OWN_FORMAT = "deepseek-line/1"
PICKLE_BYTES = 64 << 20
_OWN_KEYS = {"format", "config", "files", "tensors"}


@dataclass(frozen=True, slots=True)
class BinFile:
    """The tensors of a file by name; `config` (the text of a config.yaml) and `files` (texts by name) only in our own form."""

    tensors: dict[str, Tensor]
    config: str | None = None
    files: Mapping[str, str] | None = None


def is_archive(file: Path) -> bool:
    """Whether the file is of the zip kind, which can be mapped instead of read."""
    with file.open("rb") as stream:
        return stream.read(2) == b"PK"


def read_bin(file: Path) -> BinFile:
    """Open a file, mapped where its kind allows it. Raises CheckpointError."""
    state = _load(file)
    if isinstance(state, dict) and state.get("format") == OWN_FORMAT:
        return _own(file, state)
    return BinFile(_plain(file, state))


def write_bin(path: Path, config: str, files: Mapping[str, str], tensors: Mapping[str, StoredTensor]) -> None:
    """Write our own one-file form from the tensors of a safetensors file, which are mapped and not read at once."""
    with staged_file(path) as partial:
        maps: dict[Path, mmap.mmap] = {}
        values = {name: _map(tensor, maps) for name, tensor in tensors.items()}
        torch.save({"format": OWN_FORMAT, "config": config, "files": dict(files), "tensors": values}, partial)


def _map(tensor: StoredTensor, maps: dict[Path, mmap.mmap]) -> Tensor:
    if tensor.file not in maps:
        with tensor.file.open("rb") as stream:
            maps[tensor.file] = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_COPY)
    dtype = getattr(torch, DTYPES[tensor.kind])
    if not tensor.size:
        return torch.empty(tensor.shape, dtype=dtype)
    flat = torch.frombuffer(maps[tensor.file], dtype=dtype, count=tensor.size // dtype.itemsize, offset=tensor.offset)
    return flat.view(tensor.shape)


def _load(file: Path) -> Any:
    try:
        if file.stat().st_size == 0:
            raise CheckpointError(f"{file} is empty: copy or download it again.")
        archive = is_archive(file)
        if archive:
            _check_archive(file)
        return torch.load(file, map_location="cpu", weights_only=True, mmap=archive)
    except pickle.UnpicklingError as error:
        raise CheckpointError(f"{file} holds more than tensors or is damaged, and is not loaded: convert it to safetensors.") from error
    except FileNotFoundError as error:
        raise CheckpointError(f"{file} does not exist: name the file of a checkpoint.") from error
    except (zipfile.BadZipFile, RuntimeError, EOFError, ValueError, KeyError, TypeError, AttributeError, IndexError, OSError) as error:
        raise CheckpointError(f"{file} is damaged: copy or download it again.") from error


def _check_archive(file: Path) -> None:
    """Look at the list of entries: a real checkpoint stores each as it is, once, under a plain name."""
    with zipfile.ZipFile(file) as archive:
        entries = archive.infolist()
    names = [entry.filename for entry in entries]
    for entry in entries:
        name = entry.filename
        if name.startswith("/") or "\\" in name or ".." in name.split("/"):
            raise CheckpointError(f"{file} has an entry {name[:80]!r} that points outside it, and is not loaded.")
        if entry.compress_type != zipfile.ZIP_STORED:
            raise CheckpointError(f"{file} is compressed ({entry.file_size} bytes in {entry.compress_size}), and is not loaded.")
        if name.endswith(".pkl") and entry.file_size > PICKLE_BYTES:
            raise CheckpointError(f"{file} has a list of tensors of {entry.file_size} bytes, more than any model needs, and is not loaded.")
    if len(set(names)) != len(names):
        raise CheckpointError(f"{file} has an entry twice, and is not loaded.")
    if sum(entry.file_size for entry in entries) > file.stat().st_size:
        raise CheckpointError(f"{file} claims more bytes than it has, and is not loaded.")


def _plain(file: Path, state: Any) -> dict[str, Tensor]:
    if not isinstance(state, dict) or not all(isinstance(k, str) and isinstance(v, Tensor) for k, v in state.items()):
        raise CheckpointError(f"{file} does not hold a plain dictionary of tensors.")
    size = file.stat().st_size
    for name, tensor in state.items():
        if tensor.layout is not torch.strided or tensor.device.type != "cpu" or tensor.is_quantized:
            raise CheckpointError(f"{file}: {name} is not a plain tensor with its values in the file.")
        if tensor.numel() * tensor.element_size() > min(size, tensor.untyped_storage().nbytes()):
            raise CheckpointError(f"{file}: {name} claims shape {list(tensor.shape)}, more values than the file has.")
    return state


def _own(file: Path, state: dict[Any, Any]) -> BinFile:
    config, files = state.get("config"), state.get("files", {})
    whole = set(state) == _OWN_KEYS and isinstance(config, str) and isinstance(files, dict)
    if not whole or not all(isinstance(text, str) for pair in files.items() for text in pair):
        raise CheckpointError(f"{file} is not a complete file of the form {OWN_FORMAT}: convert the model anew.")
    for name in files:
        if Path(name).name != name or name in ("", ".", ".."):
            raise CheckpointError(f"{file} holds a file {name[:80]!r}, which is not a plain name.")
    return BinFile(_plain(file, state["tensors"]), config, files)
