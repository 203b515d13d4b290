"""Publishing a checkpoint in our own format: config.yaml, model.safetensors, the tokenizer's files and manifest.json with their digests.

It does not know training or conversion. Invariant: a directory appears under its name complete and synced to disk, or not at all.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from service.checkpoints.digests import file_digest, list_digest
from service.checkpoints.lock import current_lock
from service.checkpoints.manifest import MANIFEST, Manifest, read_manifest
from service.checkpoints.own_format import CONFIG, own_config, read_version
from service.checkpoints.pieces import parameter_shapes
from service.checkpoints.stage import staged_directory, write_synced
from service.checkpoints.stored_tensors import SINGLE
from service.checkpoints.tensor_writer import KINDS, Entry, write_safetensors
from service.types.errors import CheckpointError
from service.types.model_spec import ModelSpec


@dataclass(frozen=True, slots=True)
class Content:
    """What a directory will hold: the text of config.yaml, further files by name, and the tensors in the order of the parameters.

    `dtype` is what most of the weights are stored as; `chunks` gives an entry's values in order.
    """

    spec: ModelSpec
    config: str
    extras: Mapping[str, bytes]
    dtype: str
    entries: Sequence[Entry]
    chunks: Callable[[Entry], Iterable[Tensor]]


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
    leaves nothing behind; a process that is killed leaves at most a hidden directory beside, which the next one takes away.
    """
    config = own_config(spec, dict(generation or {}))
    _check_state(spec, state, dtype)
    entries = [Entry(name, dtype, shape) for name, shape in parameter_shapes(spec).items()]
    publish(directory, Content(spec, config, extras, dtype, entries, lambda entry: (state[entry.name],)))
    return read_manifest(directory)


def publish(directory: Path, content: Content) -> None:
    """Write `content` as `directory`, replacing one that is there. Raises CheckpointError, and then leaves nothing behind."""
    for name in content.extras:
        if Path(name).name != name or name in (CONFIG, SINGLE, MANIFEST, "", ".", ".."):
            raise CheckpointError(f"{name[:80]!r} cannot be the name of a further file of a checkpoint.")
    with staged_directory(directory) as partial:
        write_synced(partial / CONFIG, content.config.encode())
        for name, data in content.extras.items():
            write_synced(partial / name, data)
        write_safetensors(partial / SINGLE, content.entries, content.chunks)
        _write_manifest(partial, content.spec, content.dtype)


def _check_state(spec: ModelSpec, state: Mapping[str, Tensor], dtype: str) -> None:
    if dtype not in KINDS:
        raise CheckpointError(f"weights cannot be stored as {dtype}: choose one of {', '.join(KINDS)}.")
    shapes = parameter_shapes(spec)
    for name in sorted(set(shapes) ^ set(state)):
        raise CheckpointError(f"the weights {'lack' if name in shapes else 'have an unexpected'} {name}.")
    for name, shape in shapes.items():
        if tuple(state[name].shape) != shape:
            raise CheckpointError(f"{name} has shape {list(state[name].shape)} and should have {list(shape)}.")


def _write_manifest(directory: Path, spec: ModelSpec, dtype: str) -> None:
    files = {path.name: {"sha256": file_digest(path), "bytes": path.stat().st_size} for path in sorted(directory.iterdir())}
    content = {
        "format": 1,
        "version": read_version(directory / CONFIG),
        "parameters": spec.parameters,
        "dtype": dtype,
        "digest": list_digest({name: str(entry["sha256"]) for name, entry in files.items()}),
        "lock": current_lock(),
        "files": files,
    }
    write_synced(directory / MANIFEST, json.dumps(content, indent=2).encode() + b"\n")
