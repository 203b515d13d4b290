"""Which files hold a checkpoint's weights, and what each safetensors file says it holds; nothing is loaded and torch is not needed.

It does not know what the tensors are for. Invariant: a tensor that leaves here lies wholly inside its file, overlaps no other and has the
bytes its shape needs, so that readers may trust offsets.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from service.checkpoints.fields import read_object
from service.types.errors import CheckpointError

HEADER_BYTES = 100_000_000
ITEM_BYTES = {"F32": 4, "BF16": 2, "F16": 2, "F64": 8, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
BIN_SINGLE, BIN_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One tensor in a safetensors file: `offset` and `size` in bytes from the file's start, `kind` as the format names dtypes (F32 …)."""

    name: str
    kind: str
    shape: tuple[int, ...]
    file: Path
    offset: int
    size: int


@dataclass(frozen=True, slots=True)
class WeightFiles:
    """The files with weights, in order; `places` says which file the index puts each tensor in (empty without an index)."""

    files: tuple[Path, ...]
    safetensors: bool
    places: dict[str, Path]


def find_weight_files(directory: Path) -> WeightFiles:
    """The weight files of a directory, safetensors before `.bin`, single before sharded. Raises CheckpointError."""
    for single, index, safetensors in ((SINGLE, INDEX, True), (BIN_SINGLE, BIN_INDEX, False)):
        if (directory / single).is_file():
            return WeightFiles((directory / single,), safetensors, {})
        if (directory / index).is_file():
            places = _read_index(directory, index)
            return WeightFiles(tuple(dict.fromkeys(sorted(places.values()))), safetensors, places)
    raise CheckpointError(f"{directory} has no weights: expected {SINGLE}, {INDEX}, {BIN_SINGLE} or {BIN_INDEX}.")


def read_tensors(weights: WeightFiles) -> dict[str, StoredTensor]:
    """Every tensor of the safetensors files by name, checked against the index. Raises CheckpointError."""
    tensors: dict[str, StoredTensor] = {}
    for file in weights.files:
        for tensor in read_header(file):
            if tensor.name in tensors:
                raise CheckpointError(f"{tensor.name} is in both {tensors[tensor.name].file.name} and {file.name}.")
            tensors[tensor.name] = tensor
    for name, file in weights.places.items():
        if name not in tensors or tensors[name].file != file:
            raise CheckpointError(f"the index puts {name} in {file.name}, which does not have it: is the download complete?")
    return tensors


def read_header(file: Path) -> list[StoredTensor]:
    """The tensors of one safetensors file in the order of their bytes. Raises CheckpointError when the file is not sound."""
    size = _size(file)
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > min(HEADER_BYTES, size - 8):
            raise _broken(file, "its header is cut off")
        text = stream.read(length)
    try:
        header = json.loads(text, object_pairs_hook=_distinct)
    except (ValueError, RecursionError) as error:
        raise _broken(file, "its header is not valid") from error
    if not isinstance(header, dict):
        raise _broken(file, "its header is not valid")
    start = 8 + length
    tensors = [_entry(file, name, entry, start) for name, entry in header.items() if name != "__metadata__"]
    return _check_extents(file, sorted(tensors, key=lambda tensor: (tensor.offset, tensor.size)), start, size)


def require_float(tensor: StoredTensor) -> str:
    """The dtype of a tensor as torch names it. Raises CheckpointError when it is not float32, bfloat16 or float16."""
    if tensor.kind not in DTYPES:
        raise CheckpointError(f"{tensor.name} is stored as {tensor.kind}, and only {', '.join(DTYPES)} are served.")
    return DTYPES[tensor.kind]


def _entry(file: Path, name: str, entry: Any, start: int) -> StoredTensor:
    try:
        kind, shape, (first, last) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        sound = isinstance(kind, str) and all(type(value) is int and value >= 0 for value in (*shape, first, last))
    except (TypeError, KeyError, ValueError) as error:
        raise _broken(file, "its header is not valid") from error
    if not sound or last < first:
        raise _broken(file, "its header is not valid")
    if kind in ITEM_BYTES and math.prod(shape) * ITEM_BYTES[kind] != last - first:
        raise _broken(file, f"{name} does not have the bytes of its shape")
    return StoredTensor(name, kind, shape, file, start + first, last - first)


def _check_extents(file: Path, tensors: list[StoredTensor], start: int, size: int) -> list[StoredTensor]:
    end = start
    for tensor in tensors:
        if tensor.offset != end:
            raise _broken(file, f"{tensor.name} does not begin where the tensor before it ends")
        end += tensor.size
    if end != size:
        raise _broken(file, f"it has {size} bytes and its header tells of {end}")
    return tensors


def _read_index(directory: Path, index: str) -> dict[str, Path]:
    places = read_object(directory / index).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise CheckpointError(f"{directory / index} has no weight_map.")
    for name, file in places.items():
        plain = isinstance(file, str) and file not in ("", ".", "..") and not any(mark in file for mark in "/\\\0")
        if not plain:
            raise CheckpointError(f"{directory / index} puts {name} in {str(file)[:80]!r}, which is not the name of a file beside it.")
        if not (directory / file).is_file():
            raise CheckpointError(f"{directory / index} names {file}, which is not there: is the download complete?")
    return {name: directory / file for name, file in places.items()}


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name twice")
    return found


def _size(file: Path) -> int:
    try:
        return file.stat().st_size
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error.strerror}.") from error


def _broken(file: Path, reason: str) -> CheckpointError:
    return CheckpointError(f"{file} is damaged ({reason}): copy or download it again.")
