"""Quantised weights kept on disk, one file for each checkpoint, kind and type, so that the next start reads an eighth of the bytes.

A file is safetensors whose header follows from the model alone, so a reader compares it whole; the SHA-256 of all tensors stands in it at a
fixed place. It does not know how weights are quantised. Invariants: a file appears under its name complete or not at all; a damaged one
is never used: reading ends in `Damaged`, whatever was read before; the directory stays under its bound.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from io import BufferedWriter, FileIO
from pathlib import Path
from typing import Self

import torch
from torch import Tensor

from service.checkpoints.cache_room import make_room, touch
from service.checkpoints.manifest import Manifest
from service.checkpoints.pieces import parameter_shapes
from service.checkpoints.quantisation import kind_of
from service.checkpoints.stored_tensors import find_weight_files
from service.kernels.quantised import QuantisedWeight, stored_layout
from service.types.errors import StartupError
from service.types.model_spec import ModelSpec

FORMAT = "deepseek-quantised-2"
SUFFIX = ".quantised.safetensors"
_PIECE_BYTES = 1 << 20
_NO_DIGEST = b"0" * 64
_KINDS = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int8: "I8", torch.uint8: "U8"}
Stored = QuantisedWeight | Tensor
Layout = dict[str, tuple[torch.dtype, tuple[int, ...]]]


class Damaged(Exception):
    """A file of the cache is not what was written; the checkpoint is to be quantised again."""


class QuantisedCache:
    """A directory of quantised weights, at most `most_bytes` large. Least recently used files make room."""

    def __init__(self, directory: Path, most_bytes: int) -> None:
        self._directory = directory
        self._most_bytes = most_bytes

    def path(self, manifest: Manifest, quantize: str, dtype: torch.dtype) -> Path:
        """The file of a checkpoint: named by its digest, the sizes and times of its weight files, and the format.

        int4 depends on how the model computes, too, since that calibrates it.
        """
        identity = hashlib.sha256(f"{manifest.digest} {FORMAT} {manifest.spec if quantize == 'int4' else ''}".encode())
        for file in find_weight_files(manifest.directory).files:
            status = file.stat()
            identity.update(f"{file.name} {status.st_size} {status.st_mtime_ns}\n".encode())
        kept = str(dtype).removeprefix("torch.")
        return self._directory / f"{manifest.digest[:12]}-{identity.hexdigest()[:12]}-{quantize}-{kept}{SUFFIX}"

    def write(self, path: Path, layout: Layout) -> CacheWriter | None:
        """A writer of `path`, or None where the file would be larger than the bound or the directory cannot be written, which is said."""
        size = sum(_nbytes(entry) for entry in layout.values())
        if size > self._most_bytes:
            say_not_kept(f"they take {size} bytes and --quantize_cache_bytes is {self._most_bytes}")
            return None
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
            make_room(self._directory, size, self._most_bytes)
            return CacheWriter(path, layout)
        except OSError as error:
            say_not_kept(f"{self._directory}: {error.strerror}")
            return None


def say_not_kept(why: str) -> None:
    """On standard error: the next start quantises again."""
    print(f"the quantised weights are not kept, and made again at each start: {why}", file=sys.stderr, flush=True)


def layout_of(manifest: Manifest, quantize: str, dtype: torch.dtype) -> Layout:
    """(dtype, shape) of every stored tensor by name, in order: `name.values` and `name.scales` of what is quantised."""
    layout: Layout = {}
    for name, shape in parameter_shapes(manifest.spec).items():
        kind = kind_of(name, shape, quantize, manifest.spec)
        if kind is None:
            layout[name] = (dtype, shape)
        else:
            layout[f"{name}.values"], layout[f"{name}.scales"] = stored_layout(kind, *shape)
    return layout


def _nbytes(entry: tuple[torch.dtype, tuple[int, ...]]) -> int:
    dtype, shape = entry
    count = 1
    for size in shape:
        count *= size
    return count * dtype.itemsize


def _header(layout: Layout) -> tuple[bytes, int]:
    """The file's first bytes with an empty digest, and where the digest stands."""
    header: dict[str, object] = {"__metadata__": {"format": FORMAT, "sha256": _NO_DIGEST.decode()}}
    end = 0
    for name, entry in layout.items():
        start, end = end, end + _nbytes(entry)
        header[name] = {"dtype": _KINDS[entry[0]], "shape": list(entry[1]), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 64)
    whole = len(text).to_bytes(8, "little") + text
    return whole, whole.index(_NO_DIGEST)


def _bytes_of(tensor: Tensor) -> memoryview:
    view: memoryview = tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().data
    return view


class CacheWriter:
    """Writes the tensors of a layout in order into a hidden file; `publish` gives it its name. Use as a context manager.

    What goes wrong with the disk ends the writing and not the load: `failure` then says why, and nothing is published.
    """

    def __init__(self, path: Path, layout: Layout) -> None:
        self._path = path
        head, self._digest_at = _header(layout)
        self._digest = hashlib.sha256()
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.partial-", dir=path.parent)
        self._partial = Path(name)
        self._stream: BufferedWriter = os.fdopen(handle, "wb")
        self.failure: OSError | None = None
        self._put(memoryview(head), hashed=False)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stream.close()
        self._partial.unlink(missing_ok=True)

    def add(self, stored: Stored) -> None:
        """Write the next parameter."""
        tensors = (stored.values, stored.scales) if isinstance(stored, QuantisedWeight) else (stored,)
        for tensor in tensors:
            self._put(_bytes_of(tensor.cpu()), hashed=True)

    def publish(self) -> None:
        """All parameters are written: the file gets its digest and its name."""
        if self.failure is not None:
            return
        try:
            self._stream.flush()
            os.pwrite(self._stream.fileno(), self._digest.hexdigest().encode(), self._digest_at)
            os.fsync(self._stream.fileno())
            self._partial.replace(self._path)
        except OSError as error:
            self.failure = error

    def _put(self, content: memoryview, *, hashed: bool) -> None:
        if self.failure is not None:
            return
        try:
            for start in range(0, len(content), _PIECE_BYTES):
                piece = content[start : start + _PIECE_BYTES]
                self._stream.write(piece)
                if hashed:
                    self._digest.update(piece)
        except OSError as error:
            self.failure = error


def read_parameters(path: Path, spec: ModelSpec, layout: Layout, quantize: str) -> Iterator[tuple[str, Stored]]:
    """(name, parameter) of a file of the cache, in order. Raises Damaged at the latest after the last, FileNotFoundError at once."""
    with path.open("rb", buffering=0) as stream:
        touch(path)
        head, digest_at = _header(layout)
        found = stream.read(len(head))
        digest = found[digest_at : digest_at + 64]
        if found[:digest_at] + _NO_DIGEST + found[digest_at + 64 :] != head:
            raise Damaged(f"{path.name} is not laid out as this model needs")
        running = hashlib.sha256()
        for name, shape in parameter_shapes(spec).items():
            kind = kind_of(name, shape, quantize, spec)
            if kind is None:
                yield name, _read(stream, layout[name], running)
            else:
                values, scales = (_read(stream, layout[f"{name}.{part}"], running) for part in ("values", "scales"))
                yield name, QuantisedWeight(kind, shape[1], values, scales)
        if stream.read(1) or running.hexdigest().encode() != digest:
            raise Damaged(f"{path.name} has other contents than were written")


def _read(stream: FileIO, entry: tuple[torch.dtype, tuple[int, ...]], digest: hashlib._Hash) -> Tensor:
    tensor = torch.empty(entry[1], dtype=entry[0])
    view = _bytes_of(tensor)
    for start in range(0, len(view), _PIECE_BYTES):
        piece = view[start : start + _PIECE_BYTES]
        done = 0
        while done < len(piece):
            step = stream.readinto(piece[done:])
            if not step:
                raise Damaged(f"{Path(str(stream.name)).name} ends too early")
            done += step
        digest.update(piece)
    return tensor


def cache_in(directory: str, most_bytes: int) -> QuantisedCache | None:
    """The cache in `directory`, or None where the directory is "none". Raises StartupError when it names a file or no home is known."""
    if directory == "none":
        return None
    try:
        path = Path(directory).expanduser()
    except RuntimeError:
        raise StartupError(f"--quantize_cache {directory}: this user has no home directory; name another, or none.") from None
    if path.exists() and not path.is_dir():
        raise StartupError(f"--quantize_cache {directory} is not a directory: name one, or none.")
    return QuantisedCache(path, most_bytes)
