"""The registry: which artifacts were seen, verified and served, in one SQLite file; no torch, no HTTP.

It does not load models. Invariants: an artifact is known by its digest alone and an entry never changes what it names; a serving is
recorded when every model of it had been ready, so the last one recorded is the last that was good.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from service.checkpoints.lock import current_lock
from service.checkpoints.manifest import Manifest
from service.checkpoints.names import DIGEST_CHARACTERS, artifact_name, version_key
from service.types.catalog import find_line
from service.types.errors import CheckpointError
from service.types.settings import ModelSource

_LAYOUT = 1
_TABLES = """
CREATE TABLE artifacts (digest TEXT PRIMARY KEY, name TEXT NOT NULL, version TEXT, directory TEXT NOT NULL,
                        registered TEXT NOT NULL, verified TEXT, verified_lock TEXT) STRICT;
CREATE TABLE servings (id INTEGER PRIMARY KEY, at TEXT NOT NULL) STRICT;
CREATE TABLE served (serving INTEGER NOT NULL REFERENCES servings, place INTEGER NOT NULL, served_name TEXT NOT NULL,
                     digest TEXT NOT NULL REFERENCES artifacts, PRIMARY KEY (serving, place)) STRICT;
"""


@dataclass(frozen=True, slots=True)
class Artifact:
    """One artifact. `version` is a line or a patch of it, None for other families; times are ISO 8601; `lock` is that of the check."""

    digest: str
    name: str
    version: str | None
    directory: str
    registered: str
    verified: str | None
    lock: dict[str, str]
    served: str | None

    @property
    def is_live(self) -> bool:
        """Whether its directory is still there."""
        return Path(self.directory).is_dir()


class Registry:
    """The file at `path`, made when something is recorded. Every method raises CheckpointError when the file cannot be used."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def register(self, manifest: Manifest) -> str:
        """Record an artifact, or where it lies now; returns its name."""
        name = artifact_name(manifest, manifest.directory.name)
        with self._transaction() as connection:
            _register(connection, manifest, name)
        return name

    def mark_verified(self, manifest: Manifest) -> None:
        """Record that every file of the artifact was compared with its digest, and in which environment."""
        with self._transaction() as connection:
            _register(connection, manifest, artifact_name(manifest, manifest.directory.name))
            values = (_now(), json.dumps(current_lock()), manifest.digest)
            connection.execute("UPDATE artifacts SET verified = ?, verified_lock = ? WHERE digest = ?", values)

    def mark_served(self, models: Sequence[tuple[str, Manifest]]) -> None:
        """Record that these models, by served name and the default first, were each ready in one process."""
        with self._transaction() as connection:
            serving = connection.execute("INSERT INTO servings (at) VALUES (?)", (_now(),)).lastrowid
            for place, (served_name, manifest) in enumerate(models):
                _register(connection, manifest, artifact_name(manifest, served_name))
                connection.execute("INSERT INTO served VALUES (?, ?, ?, ?)", (serving, place, served_name, manifest.digest))

    def artifacts(self) -> list[Artifact]:
        """Everything recorded, the newest version first, then the newest entry."""
        if not self._path.is_file():
            return []
        query = (
            "SELECT a.*, (SELECT max(s.at) FROM servings s JOIN served d ON d.serving = s.id WHERE d.digest = a.digest)"
            " FROM artifacts a ORDER BY registered DESC, rowid DESC"
        )
        with self._transaction() as connection:
            found = [_artifact(*row) for row in connection.execute(query)]
        return sorted(found, key=lambda artifact: version_key(artifact.version), reverse=True)

    def find(self, name: str) -> Artifact | None:
        """What a name means: a digest or the start of one (with or without `v2.3@`), a patch, or a line: its newest patch that is there."""
        stem, mark, digest = name.rpartition("@")
        digest = digest if mark else stem or name
        found = self.artifacts()
        if len(digest) >= DIGEST_CHARACTERS and set(digest) <= set("0123456789abcdef"):
            return next((one for one in found if one.digest.startswith(digest)), None)
        number, line = name.removeprefix("v"), find_line(name)
        same = [one for one in found if line is not None and one.is_live and one.version is not None and find_line(one.version) == line]
        exact = [one for one in same if one.version == number]
        return next(iter(exact), None) if line is None or number != line.number else next(iter(same), None)

    def last_good(self) -> list[tuple[ModelSource, str]]:
        """The models of the last serving whose directories are all there, the default first, each with its digest."""
        if not self._path.is_file():
            return []
        query = (
            "SELECT d.serving, d.served_name, a.directory, a.digest FROM served d JOIN artifacts a ON a.digest = d.digest"
            " ORDER BY d.serving DESC, d.place"
        )
        with self._transaction() as connection:
            rows = connection.execute(query).fetchall()
        servings: dict[int, list[tuple[ModelSource, str]]] = {}
        for serving, served_name, directory, digest in rows:
            servings.setdefault(serving, []).append((ModelSource(served_name, directory), digest))
        there = (models for models in servings.values() if all(Path(source.directory).is_dir() for source, _ in models))
        return next(there, [])

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with closing(sqlite3.connect(self._path, timeout=10.0)) as connection, connection:
                connection.execute("BEGIN IMMEDIATE")
                _prepare(connection, self._path)
                yield connection
        except sqlite3.Error as error:
            raise CheckpointError(f"the registry {self._path} cannot be used ({error}): name another with --registry.") from error
        except OSError as error:
            raise CheckpointError(f"the registry {self._path} cannot be used: {error.strerror}; name another with --registry.") from error


def _artifact(*row: Any) -> Artifact:
    """A row of the table with the time of its last serving."""
    digest, name, version, directory, registered, verified, lock, served = row
    return Artifact(digest, name, version, directory, registered, verified, json.loads(lock or "{}"), served)


def _register(connection: sqlite3.Connection, manifest: Manifest, name: str) -> None:
    values = (manifest.digest, name, manifest.version, str(manifest.directory.absolute()), _now())
    connection.execute(
        "INSERT INTO artifacts (digest, name, version, directory, registered) VALUES (?, ?, ?, ?, ?)"
        " ON CONFLICT (digest) DO UPDATE SET directory = excluded.directory",
        values,
    )


def _prepare(connection: sqlite3.Connection, path: Path) -> None:
    layout = connection.execute("PRAGMA user_version").fetchone()[0]
    if layout == 0:
        for statement in _TABLES.strip().split(";\n"):
            connection.execute(statement)
        connection.execute(f"PRAGMA user_version = {_LAYOUT}")
    elif layout != _LAYOUT:
        raise CheckpointError(f"the registry {path} is of layout {layout}, and this program knows {_LAYOUT}: name another with --registry.")


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
