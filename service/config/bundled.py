"""Which models are asked for: `--model` entries as sources, what `--version` names, or what `--restore` finds in the registry.

It reads no weights. Invariant: every source has a distinct name fit for a URL and a label.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

from service.checkpoints.bundled import BUNDLED, bundled_directory, complete_lines
from service.checkpoints.manifest import read_manifest
from service.checkpoints.registry import Registry
from service.types.catalog import find_line
from service.types.errors import SettingsError
from service.types.settings import ModelSource

# What a flag takes that names no version.
_INSTEAD = {"--version": "use --model DIR", "--directory": "name a directory that exists"}
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:-]{0,127}")


def choose_sources(models: Sequence[str], version: str, restore: bool = False, registry: Path | None = None) -> tuple[ModelSource, ...]:
    """The models to serve, the default one first. Raises SettingsError or CheckpointError."""
    if sum((bool(models), bool(version), restore)) > 1:
        raise SettingsError("--model names a directory, --version a version and --restore what was served last: give only one of them.")
    if restore:
        return restored_sources(registry)
    if version:
        return (named_source(version, registry),)
    if not models:
        return (bundled_source(""), *(bundled_source(line.number) for line in reversed(complete_lines()[:-1])))
    return _distinct(tuple(_parse(entry, "--model") for entry in models), "--model")


def listed_sources(entries: Sequence[str], registry: Path | None, flag: str) -> tuple[ModelSource, ...]:
    """What a list of versions means: each a version's name as `named_source` knows it, DIR or NAME=DIR.

    Raises SettingsError, which calls the list `flag`, or CheckpointError.
    """
    sources = []
    for entry in entries:
        is_version = "=" not in entry and not Path(entry).expanduser().is_dir()
        sources.append(named_source(entry, registry, flag) if entry.strip() and is_version else _parse(entry, flag))
    return _distinct(tuple(sources), flag)


def named_directory(entry: str, registry: Path | None, flag: str) -> Path:
    """A directory named itself, or that of a version by its name as `named_source` knows it. Raises SettingsError or CheckpointError."""
    directory = Path(entry).expanduser()
    return directory if directory.is_dir() else Path(named_source(entry, registry, flag).directory)


def _distinct(sources: tuple[ModelSource, ...], flag: str) -> tuple[ModelSource, ...]:
    names = [source.name for source in sources]
    for name in names:
        if names.count(name) > 1:
            raise SettingsError(f"{flag} names {name!r} twice: give each directory its own name with {flag} NAME=DIR.")
    return sources


def restored_sources(registry: Path | None) -> tuple[ModelSource, ...]:
    """What was last served and ready, unchanged since. Raises SettingsError or CheckpointError."""
    if registry is None:
        raise SettingsError("--restore needs a registry: name its file with --registry.")
    recorded = Registry(registry).last_good()
    if not recorded:
        raise SettingsError(f"--restore finds nothing in {registry} that was served and is still there: name a model with --model DIR.")
    for source, digest in recorded:
        if read_manifest(Path(source.directory)).digest != digest:
            raise SettingsError(f"--restore: {source.directory} is not what was served as {source.name}: name a model with --model DIR.")
    return tuple(source for source, _ in recorded)


def named_source(version: str, registry: Path | None, flag: str = "--version") -> ModelSource:
    """The bundled model of a line, or a registered artifact: by patch, by digest, or of a line that is not bundled."""
    found = Registry(registry).find(version) if registry is not None else None
    line = find_line(version)
    bundled_line = line is not None and version.removeprefix("v") == line.number and line in complete_lines()
    if found is None or bundled_line or not found.is_live:
        return bundled_source(version, flag=flag)
    return ModelSource(f"v{found.version}" if found.version else Path(found.directory).name, found.directory)


def registry_path(given: str) -> Path | None:
    """Where the registry is: the file named, none for `none`, by default one in the user's data directory. Raises SettingsError."""
    if given == "none":
        return None
    try:
        if given:
            return Path(given).expanduser()
        data = os.environ.get("XDG_DATA_HOME")
        return (Path(data) if data else Path.home() / ".local" / "share") / "deepseek-service" / "registry.sqlite"
    except RuntimeError:
        raise SettingsError("this user has no home directory for the registry of versions: set --registry FILE, or none.") from None


def bundled_source(version: str, bundled: Path = BUNDLED, flag: str = "--version") -> ModelSource:
    """The bundled model of a line, or of the newest line that is complete when `version` is empty. Raises SettingsError."""
    complete = complete_lines(bundled)
    if not version:
        if not complete:
            raise SettingsError("no bundled model is complete in this installation: name a checkpoint with --model DIR.")
        line = complete[-1]
        return ModelSource(line.label, str(bundled_directory(line, bundled)))
    wanted = find_line(version)
    if wanted is None or wanted not in complete or version.removeprefix("v") != wanted.number:
        served = ", ".join(line.label for line in complete) or "none"
        instead = _INSTEAD.get(flag, "give a directory as DIR or NAME=DIR")
        raise SettingsError(
            f"{flag} {version[:40]!r} is not bundled (bundled: {served}) and not registered: choose one of these or {instead}."
        )
    return ModelSource(wanted.label, str(bundled_directory(wanted, bundled)))


def _parse(entry: str, flag: str) -> ModelSource:
    name, equals, directory = entry.partition("=")
    if not equals or not _NAME.fullmatch(name):
        name, directory = Path(entry).expanduser().absolute().name, entry
    if not directory.strip():
        raise SettingsError(f"{flag} has no directory: write {flag} DIR or {flag} NAME=DIR.")
    if not _NAME.fullmatch(name):
        raise SettingsError(
            f"{flag} {entry[:80]!r} gives no usable name: write {flag} NAME=DIR with letters, digits, '.', '_', ':' or '-'."
        )
    return ModelSource(name, str(Path(directory).expanduser()))
