"""Which models are asked for: `--model` entries as sources, or the bundled line that `--version` names.

It reads no checkpoint, only whether a bundled directory is complete. Invariant: every source has a distinct name fit for a URL and a label.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from service.checkpoints.bundled import BUNDLED, bundled_directory, complete_lines
from service.types.catalog import find_line
from service.types.errors import SettingsError
from service.types.settings import ModelSource

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:-]{0,127}")


def choose_sources(models: Sequence[str], version: str, bundled: Path = BUNDLED) -> tuple[ModelSource, ...]:
    """The models to serve, the default one first. Raises SettingsError."""
    if models and version:
        raise SettingsError("--version names a bundled model and --model a directory: give only one of them.")
    if not models:
        return (bundled_source(version, bundled),)
    sources = tuple(_parse(entry) for entry in models)
    names = [source.name for source in sources]
    for name in names:
        if names.count(name) > 1:
            raise SettingsError(f"--model names {name!r} twice: give each directory its own name with --model NAME=DIR.")
    return sources


def bundled_source(version: str, bundled: Path = BUNDLED) -> ModelSource:
    """The bundled model of a line, or of the newest line that is complete when `version` is empty. Raises SettingsError."""
    complete = complete_lines(bundled)
    if not version:
        if not complete:
            raise SettingsError("no bundled model is complete in this installation: name a checkpoint with --model DIR.")
        line = complete[-1]
        return ModelSource(line.label, str(bundled_directory(line, bundled)))
    wanted = find_line(version)
    if wanted is None or wanted not in complete:
        served = ", ".join(line.label for line in complete) or "none"
        raise SettingsError(f"--version {version[:40]!r} is not bundled (bundled: {served}): choose one of these or use --model DIR.")
    return ModelSource(wanted.label, str(bundled_directory(wanted, bundled)))


def _parse(entry: str) -> ModelSource:
    name, equals, directory = entry.partition("=")
    if not equals or not _NAME.fullmatch(name):
        name, directory = Path(entry).expanduser().absolute().name, entry
    if not directory.strip():
        raise SettingsError("--model has no directory: write --model DIR or --model NAME=DIR.")
    if not _NAME.fullmatch(name):
        raise SettingsError(
            f"--model {entry[:80]!r} gives no usable name: write --model NAME=DIR with letters, digits, '.', '_', ':' or '-'."
        )
    return ModelSource(name, str(Path(directory).expanduser()))
