"""Reading stored tensors chunk by chunk: safetensors by plain reads into one small buffer, `.bin` through torch's weights-only loader.

It does not know what tensors are for. Plain reads and not a memory map: mapped pages count as resident until the kernel takes them back,
which would make a load seem to need twice the model. Invariant: a reader holds at most CHUNK_BYTES of a safetensors file at a time.
"""

from __future__ import annotations

import math
import pickle
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from io import FileIO
from pathlib import Path
from typing import Protocol, Self

import torch
from torch import Tensor

from service.checkpoints.stored_tensors import StoredTensor, WeightFiles, read_tensors, require_float
from service.types.errors import CheckpointError

CHUNK_BYTES = 8 * 1024 * 1024


class WeightReader(Protocol):
    """The tensors of a checkpoint: their shapes, and their values in chunks."""

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Shape by name."""

    def chunks(self, name: str) -> Iterator[tuple[int, Tensor]]:
        """(first element, flat values in the stored dtype) in order; a chunk is valid until the next is asked for."""


class SafetensorsReader:
    """Reads the tensors of safetensors files; use as a context manager."""

    def __init__(self, weights: WeightFiles) -> None:
        self._tensors: dict[str, StoredTensor] = read_tensors(weights)
        self._open: dict[Path, FileIO] = {}
        self._stack = ExitStack()
        self._buffer = torch.empty(CHUNK_BYTES, dtype=torch.uint8)
        self._view = self._buffer.numpy().data

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Shape by name."""
        return {name: tensor.shape for name, tensor in self._tensors.items()}

    def chunks(self, name: str) -> Iterator[tuple[int, Tensor]]:
        """(first element, flat values) in order; the values lie in a buffer that the next chunk overwrites."""
        tensor = self._tensors[name]
        dtype = getattr(torch, require_float(tensor))
        for start in range(0, tensor.size, CHUNK_BYTES):
            count = min(CHUNK_BYTES, tensor.size - start)
            self._fill(tensor, start, count)
            yield start // dtype.itemsize, self._buffer[:count].view(dtype)

    def _fill(self, tensor: StoredTensor, start: int, count: int) -> None:
        if tensor.file not in self._open:
            self._open[tensor.file] = self._stack.enter_context(tensor.file.open("rb", buffering=0))
        stream = self._open[tensor.file]
        stream.seek(tensor.offset + start)
        done = 0
        while done < count:
            step = stream.readinto(self._view[done:count])
            if not step:
                raise CheckpointError(f"{tensor.file} ended in the middle of {tensor.name}: it changed while it was read.")
            done += step


class BinReader:
    """Reads the tensors of `.bin` files with torch.load(weights_only=True), mapped where the file's kind allows it."""

    def __init__(self, weights: WeightFiles) -> None:
        self._tensors: dict[str, Tensor] = {}
        for file in weights.files:
            for name, tensor in _load_bin(file).items():
                if name in self._tensors:
                    raise CheckpointError(f"{name} is in {file.name} and in another file.")
                self._tensors[name] = tensor

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._tensors.clear()

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Shape by name."""
        return {name: tuple(tensor.shape) for name, tensor in self._tensors.items()}

    def chunks(self, name: str) -> Iterator[tuple[int, Tensor]]:
        """(first element, flat values in the stored dtype) in order."""
        tensor = self._tensors[name]
        if tensor.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise CheckpointError(f"{name} is stored as {str(tensor.dtype).removeprefix('torch.')}, which is not served.")
        flat, step = tensor.reshape(-1), CHUNK_BYTES // tensor.element_size()
        for start in range(0, math.prod(tensor.shape), step):
            yield start, flat[start : start + step]


def _load_bin(file: Path) -> dict[str, Tensor]:
    try:
        if file.stat().st_size == 0:
            raise CheckpointError(f"{file} is empty: copy or download it again.")
        state = torch.load(file, map_location="cpu", weights_only=True, mmap=_is_zip(file))
    except pickle.UnpicklingError as error:
        raise CheckpointError(f"{file} holds more than tensors or is damaged, and is not loaded: convert it to safetensors.") from error
    except (RuntimeError, EOFError, ValueError, KeyError, OSError) as error:
        raise CheckpointError(f"{file} is damaged: copy or download it again.") from error
    if not isinstance(state, dict) or not all(isinstance(k, str) and isinstance(v, Tensor) for k, v in state.items()):
        raise CheckpointError(f"{file} does not hold a plain dictionary of tensors.")
    return state


def _is_zip(file: Path) -> bool:
    with file.open("rb") as stream:
        return stream.read(2) == b"PK"
