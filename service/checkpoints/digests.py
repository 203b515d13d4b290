"""Content digests: what makes two checkpoints the same version.

Our own format lists a SHA-256 for every file in manifest.json. Other directories are digested here in a time that does not grow with
their size: configuration, tokenizer and index files whole, and of each weight file its name, length, header and SAMPLES pieces of 64 KiB
at fixed places. Invariant: the digest is a function of contents and names alone. A sampled digest can miss a change that alters neither
shapes, sizes nor a sampled piece; `verify` of the own format misses nothing.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path

PIECE_BYTES = 64 * 1024
SAMPLES = 16
WHOLE_FILES = (
    *("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"),
    *("added_tokens.json", "vocab.json", "merges.txt", "tokenizer.model", "chat_template.jinja", "chat_template.json"),
    *("model.safetensors.index.json", "pytorch_model.bin.index.json"),
)


def file_digest(path: Path) -> str:
    """SHA-256 of a file, 64 hex digits."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def list_digest(files: Mapping[str, str]) -> str:
    """The digest of a checkpoint from the digests of its files by name."""
    lines = "".join(f"{files[name]}  {name}\n" for name in sorted(files))
    return hashlib.sha256(lines.encode()).hexdigest()


def sampled_digest(directory: Path, weight_files: Iterable[Path]) -> str:
    """The digest of a directory that has no manifest, 64 hex digits."""
    digests = {name: file_digest(directory / name) for name in WHOLE_FILES if (directory / name).is_file()}
    digests.update({path.name: _sample(path) for path in weight_files})
    return list_digest(digests)


def _sample(path: Path) -> str:
    """Length, safetensors header (its first PIECE_BYTES at least, whole when it is longer) and SAMPLES evenly spread pieces."""
    size = path.stat().st_size
    digest = hashlib.sha256(size.to_bytes(8, "little"))
    with path.open("rb") as stream:
        head = int.from_bytes(stream.read(8), "little") + 8 if path.suffix == ".safetensors" else 0
        stream.seek(0)
        digest.update(stream.read(max(min(head, size), PIECE_BYTES)))
        for index in range(SAMPLES):
            stream.seek(max(size - PIECE_BYTES, 0) * index // (SAMPLES - 1))
            digest.update(stream.read(PIECE_BYTES))
    return digest.hexdigest()
