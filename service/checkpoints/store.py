"""Publishing a checkpoint in our own format: config.yaml, model.safetensors, the tokenizer's files and manifest.json with their digests.

It does not know training. Invariant: a directory appears under its name complete and synced to disk, or not at all.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from service.checkpoints.digests import file_digest, list_digest
from service.checkpoints.manifest import MANIFEST, Manifest, read_manifest
from service.checkpoints.own_format import CONFIG, own_config
from service.checkpoints.pieces import parameter_shapes
from service.checkpoints.stored_tensors import DTYPES, ITEM_BYTES, SINGLE
from service.types.errors import CheckpointError
from service.types.model_spec import ModelSpec

_KINDS = {dtype: kind for kind, dtype in DTYPES.items()}


def save(
    directory: Path,
    spec: ModelSpec,
    state: Mapping[str, Tensor],
    extras: Mapping[str, bytes],
    *,
    dtype: str = "bfloat16",
    generation: Mapping[str, float] | None = None,
) -> Manifest:
    """Publish a model of a version line as `directory`, replacing one that is there, and read its manifest back.

    `state` is the decoder's state_dict (any float dtype, stored as `dtype`: float32, bfloat16 or float16); `extras` are further files by
    name, tokenizer.json and tokenizer_config.json among them; `generation` the sampling defaults. Raises CheckpointError, and then
    leaves nothing behind; a process that is killed leaves at most a hidden directory beside.
    """
    config = own_config(spec, dict(generation or {}))
    _check(spec, state, extras, dtype)
    directory.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{directory.name}.partial-", dir=directory.parent))
    try:
        partial.chmod(0o755)
        _write(partial / CONFIG, config.encode())
        for name, content in extras.items():
            _write(partial / name, content)
        _write_weights(partial / SINGLE, spec, state, dtype)
        _write_manifest(partial, spec, dtype)
        _publish(partial, directory)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return read_manifest(directory)


def _check(spec: ModelSpec, state: Mapping[str, Tensor], extras: Mapping[str, bytes], dtype: str) -> None:
    if dtype not in _KINDS:
        raise CheckpointError(f"weights cannot be stored as {dtype}: choose one of {', '.join(_KINDS)}.")
    for name in extras:
        if Path(name).name != name or name in (CONFIG, SINGLE, MANIFEST, "", ".", ".."):
            raise CheckpointError(f"{name[:80]!r} cannot be the name of a further file of a checkpoint.")
    shapes = parameter_shapes(spec)
    for name in sorted(set(shapes) ^ set(state)):
        raise CheckpointError(f"the weights {'lack' if name in shapes else 'have an unexpected'} {name}.")
    for name, shape in shapes.items():
        if tuple(state[name].shape) != shape:
            raise CheckpointError(f"{name} has shape {list(state[name].shape)} and should have {list(shape)}.")


def _write_weights(path: Path, spec: ModelSpec, state: Mapping[str, Tensor], dtype: str) -> None:
    """One safetensors file, a tensor at a time, in the order of the parameters."""
    kind = _KINDS[dtype]
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in parameter_shapes(spec).items():
        start, end = end, end + state[name].numel() * ITEM_BYTES[kind]
        header[name] = {"dtype": kind, "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for name in parameter_shapes(spec):
            value = state[name].detach().to("cpu", getattr(torch, dtype)).contiguous()
            if not value.isfinite().all():
                raise CheckpointError(f"{name} has values that are not finite in {dtype}, and such a model is not published.")
            stream.write(value.view(-1).view(torch.uint8).numpy().data)
        _sync(stream)


def _write_manifest(directory: Path, spec: ModelSpec, dtype: str) -> None:
    files = {path.name: {"sha256": file_digest(path), "bytes": path.stat().st_size} for path in sorted(directory.iterdir())}
    content = {
        "format": 1,
        "version": spec.line,
        "parameters": spec.parameters,
        "dtype": dtype,
        "digest": list_digest({name: str(entry["sha256"]) for name, entry in files.items()}),
        "files": files,
    }
    _write(directory / MANIFEST, json.dumps(content, indent=2).encode() + b"\n")


def _publish(partial: Path, directory: Path) -> None:
    """Rename into place. A directory that is there is set aside first and removed last, so at every moment one of the two is whole."""
    _sync_directory(partial)
    if not directory.exists():
        partial.rename(directory)
        _sync_directory(directory.parent)
        return
    aside = Path(tempfile.mkdtemp(prefix=f".{directory.name}.old-", dir=directory.parent))
    directory.rename(aside / directory.name)
    try:
        partial.rename(directory)
    except OSError:
        (aside / directory.name).rename(directory)
        raise
    _sync_directory(directory.parent)
    shutil.rmtree(aside, ignore_errors=True)


def _write(path: Path, content: bytes) -> None:
    with path.open("wb") as stream:
        stream.write(content)
        _sync(stream)


def _sync(stream: IO[bytes]) -> None:
    stream.flush()
    os.fsync(stream.fileno())


def _sync_directory(directory: Path) -> None:
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
