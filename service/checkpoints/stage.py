"""Appearing whole or not at all: a directory or a file is written beside its place, synced to disk, and renamed into it.

It does not know what is written. Invariant: under the final name there is at every moment what was there before or what is complete now.
What a killed process leaves is one hidden directory beside, unlocked, which the next write of that name takes away.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO


@contextlib.contextmanager
def staged_directory(directory: Path) -> Iterator[Path]:
    """A new directory to fill; it becomes `directory`, replacing one that is there, when the block ends, and goes when the block fails."""
    with partial_directory(directory) as partial:
        yield partial
        _publish(partial, directory)


@contextlib.contextmanager
def staged_file(path: Path) -> Iterator[Path]:
    """A path to write; the file becomes `path`, replacing one that is there, when the block ends, and goes when the block fails."""
    with partial_directory(path) as partial:
        yield partial / path.name
        with (partial / path.name).open("rb") as stream:
            os.fsync(stream.fileno())
        (partial / path.name).rename(path)
        sync_directory(path.parent)


def write_synced(path: Path, content: bytes) -> None:
    """Write a file and wait until it is on disk."""
    with path.open("wb") as stream:
        stream.write(content)
        sync(stream)


def sync(stream: IO[bytes]) -> None:
    """Wait until what was written is on disk."""
    stream.flush()
    os.fsync(stream.fileno())


def sync_directory(directory: Path) -> None:
    """Wait until the names in a directory are on disk."""
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def partial_directory(target: Path) -> Iterator[Path]:
    """A hidden directory beside `target` to work in, locked while it is in use; whatever is left of it at the end is removed."""
    prefix = f".{target.name}.partial-"
    target.parent.mkdir(parents=True, exist_ok=True)
    _sweep(target.parent, prefix)
    partial = Path(tempfile.mkdtemp(prefix=prefix, dir=target.parent))
    handle = os.open(partial, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_SH)
        partial.chmod(0o755)
        yield partial
    finally:
        os.close(handle)
        shutil.rmtree(partial, ignore_errors=True)


def _sweep(parent: Path, prefix: str) -> None:
    """Remove what killed processes left: hidden directories that nobody holds locked."""
    for left in [path for path in parent.iterdir() if path.name.startswith(prefix)]:
        with contextlib.suppress(OSError):
            handle = os.open(left, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(left, ignore_errors=True)
            finally:
                os.close(handle)


def _publish(partial: Path, directory: Path) -> None:
    """Rename into place. A directory that is there is set aside first and removed last, so at every moment one of the two is whole."""
    sync_directory(partial)
    if not directory.exists():
        partial.rename(directory)
        sync_directory(directory.parent)
        return
    aside = Path(tempfile.mkdtemp(prefix=f".{directory.name}.old-", dir=directory.parent))
    directory.rename(aside / directory.name)
    try:
        partial.rename(directory)
    except OSError:
        (aside / directory.name).rename(directory)
        raise
    sync_directory(directory.parent)
    shutil.rmtree(aside, ignore_errors=True)
