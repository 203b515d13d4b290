"""Reading stored tensors chunk by chunk: safetensors by plain reads into one small buffer, `.bin` through torch's weights-only loader.

It does not know what tensors are for. Plain reads and not a memory map: mapped pages count as resident until the kernel takes them back,
which would make a load seem to need twice the model. Invariant: a reader holds at most CHUNK_BYTES of a safetensors file at a time.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from io import FileIO
from pathlib import Path
from typing import Protocol, Self

import torch
from torch import Tensor

from service.checkpoints.bin_files import is_archive, read_bin
from service.checkpoints.stored_tensors import DTYPES, StoredTensor, WeightFiles, read_tensors, require_float
from service.types.errors import CheckpointError

CHUNK_BYTES = 8 * 1024 * 1024
REMAP_BYTES = 256 * 1024 * 1024


class WeightReader(Protocol):
    """The tensors of a checkpoint: their shapes, and their values in chunks."""

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Shape by name."""

    def dtype(self, name: str) -> str:
        """The float dtype in which a tensor is stored. Raises CheckpointError for any other."""

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

    def dtype(self, name: str) -> str:
        """The dtype in which a tensor is stored. Raises CheckpointError when it is not a float type that is served."""
        return require_float(self._tensors[name])

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
    """Reads the tensors of `.bin` files through torch's weights-only loader, mapped where the file's kind allows it.

    Mapped pages count as resident, so after REMAP_BYTES a file is mapped anew: a tensor handed out must not be kept.
    """

    def __init__(self, weights: WeightFiles) -> None:
        self._files: dict[str, Path] = {}
        self._open: dict[Path, dict[str, Tensor]] = {}
        self._given_bytes = 0
        for file in weights.files:
            self._open[file] = read_bin(file).tensors
            for name in self._open[file]:
                if name in self._files:
                    raise CheckpointError(f"{name} is in {file.name} and in another file.")
                self._files[name] = file

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._open.clear()
        self._files.clear()

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Shape by name."""
        return {name: tuple(self._open[file][name].shape) for name, file in self._files.items()}

    def dtype(self, name: str) -> str:
        """The dtype in which a tensor is stored. Raises CheckpointError when it is not a float type that is served."""
        stored = str(self._open[self._files[name]][name].dtype).removeprefix("torch.")
        if stored not in DTYPES.values():
            raise CheckpointError(f"{name} is stored as {stored}, which is not served.")
        return stored

    def chunks(self, name: str) -> Iterator[tuple[int, Tensor]]:
        """(first element, flat values in the stored dtype) in order."""
        self.dtype(name)
        self._remap(self._files[name])
        tensor = self._open[self._files[name]][name]
        flat, step = tensor.reshape(-1), CHUNK_BYTES // tensor.element_size()
        for start in range(0, math.prod(tensor.shape), step):
            yield start, flat[start : start + step]
        self._given_bytes += tensor.numel() * tensor.element_size()

    def _remap(self, file: Path) -> None:
        if self._given_bytes >= REMAP_BYTES and is_archive(file):
            self._given_bytes = 0
            del self._open[file]
            self._open[file] = read_bin(file).tensors
