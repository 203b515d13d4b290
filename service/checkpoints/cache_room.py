"""The cache directory's bound: quantised weights and exported graphs lie side by side, and what was used longest ago makes room.

It does not know what the entries hold. Invariant: after `make_room` the entries and `size` more bytes stay under the bound, or nothing of
ours is left there.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from pathlib import Path

SUFFIXES = (".quantised.safetensors", ".onnx")


def make_room(directory: Path, size: int, most_bytes: int) -> None:
    """Remove the entries used longest ago until `size` more bytes fit. Raises OSError where the directory cannot be read."""
    found = [(path.stat().st_mtime, entry_bytes(path), path) for path in directory.iterdir() if path.name.endswith(SUFFIXES)]
    taken = sum(entry for _, entry, _ in found)
    for _, entry, path in sorted(found):
        if taken + size <= most_bytes:
            return
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
        taken -= entry


def entry_bytes(path: Path) -> int:
    """Bytes of a file, or of all files in a directory."""
    return sum(file.stat().st_size for file in path.iterdir()) if path.is_dir() else path.stat().st_size


def touch(path: Path) -> None:
    """An entry is in use now; a directory that cannot be written keeps its times."""
    with contextlib.suppress(OSError):
        os.utime(path)
