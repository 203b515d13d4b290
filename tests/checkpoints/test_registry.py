"""What was registered, verified and served is found again by every name; what is not there any more is not restored."""

from __future__ import annotations

import shutil
import sqlite3
from dataclasses import replace
from pathlib import Path

import pytest

from service.checkpoints.lock import current_lock
from service.checkpoints.manifest import Manifest, read_manifest
from service.checkpoints.names import artifact_name, version_key
from service.checkpoints.registry import Registry
from service.types.errors import CheckpointError
from service.types.settings import ModelSource
from tests.tiny_models import build_tiny


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    return Registry(tmp_path / "deep" / "registry.sqlite")


@pytest.fixture(scope="module")
def foreign(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return read_manifest(build_tiny(tmp_path_factory.mktemp("models") / "tiny"))


def patch(foreign: Manifest, version: str, directory: Path) -> Manifest:
    """A manifest of a patch of v2.3, its digest made of its version."""
    directory.mkdir(parents=True, exist_ok=True)
    digest = (version.replace(".", "") + "ab" * 32)[:64]
    return replace(foreign, line="2.3", version=version, digest=digest, directory=directory)


def test_an_empty_registry_makes_no_file(registry: Registry, tmp_path: Path) -> None:
    assert registry.artifacts() == [] and registry.last_good() == [] and registry.find("v2.3") is None
    assert list(tmp_path.iterdir()) == []


def test_registering_twice_keeps_one_entry_and_the_new_place(registry: Registry, foreign: Manifest, tmp_path: Path) -> None:
    name = registry.register(foreign)
    assert name == f"tiny@{foreign.digest[:12]}"
    registry.register(replace(foreign, directory=tmp_path))
    (artifact,) = registry.artifacts()
    assert (artifact.name, artifact.directory, artifact.verified, artifact.served) == (name, str(tmp_path), None, None)


def test_verifying_records_the_environment(registry: Registry, foreign: Manifest) -> None:
    registry.mark_verified(foreign)
    (artifact,) = registry.artifacts()
    assert artifact.verified is not None and artifact.lock == current_lock()


def test_names(registry: Registry, foreign: Manifest, tmp_path: Path) -> None:
    for version in ("2.3", "2.3.10", "2.3.9", "2.3.11"):
        registry.register(patch(foreign, version, tmp_path / version))
    shutil.rmtree(tmp_path / "2.3.11")
    assert [artifact.version for artifact in registry.artifacts()] == ["2.3.11", "2.3.10", "2.3.9", "2.3"]

    def version(name: str) -> str | None:
        found = registry.find(name)
        return found and found.version

    assert version("v2.3") == version("2.3") == "2.3.10"
    assert version("v2.3.9") == "2.3.9"
    assert version("v2.3.11") is None and version("2.3.1") is None and version("v1.0") is None
    digest = patch(foreign, "2.3.9", tmp_path / "x").digest
    assert version(digest) == version(digest[:12]) == version(f"v2.3@{digest[:12]}") == "2.3.9"
    assert version(digest[:11]) is None and version("f" * 12) is None


def test_the_last_serving_that_is_there_is_the_last_good(registry: Registry, foreign: Manifest, tmp_path: Path) -> None:
    one, two = patch(foreign, "2.3.1", tmp_path / "one"), patch(foreign, "2.3.2", tmp_path / "two")
    registry.mark_served([("v2.3", one)])
    registry.mark_served([("main", two), ("old", one)])
    assert registry.last_good() == [
        (ModelSource("main", str(tmp_path / "two")), two.digest),
        (ModelSource("old", str(tmp_path / "one")), one.digest),
    ]
    assert all(artifact.served for artifact in registry.artifacts())
    shutil.rmtree(tmp_path / "two")
    assert registry.last_good() == [(ModelSource("v2.3", str(tmp_path / "one")), one.digest)]
    shutil.rmtree(tmp_path / "one")
    assert registry.last_good() == []


def test_a_file_that_is_no_registry(tmp_path: Path, foreign: Manifest) -> None:
    (tmp_path / "a").write_text("this is no database, and long enough to be seen as none" * 20)
    (tmp_path / "b").mkdir()
    with sqlite3.connect(tmp_path / "c") as connection:
        connection.execute("PRAGMA user_version = 99")
    for name, words in (("a", "cannot be used"), ("b", "cannot be used"), ("c", "layout 99"), ("a/deeper", "cannot be used")):
        with pytest.raises(CheckpointError, match=rf"{words}.*--registry"):
            Registry(tmp_path / name).register(foreign)


def test_versions_are_ordered_by_number() -> None:
    versions = ["2.3.10", None, "10.0", "2.3", "v2.3.9"]
    assert sorted(versions, key=version_key) == [None, "2.3", "v2.3.9", "2.3.10", "10.0"]
    assert version_key("1.x") == ()


def test_artifact_names(foreign: Manifest) -> None:
    assert artifact_name(foreign, "mine") == f"mine@{foreign.digest[:12]}"
    assert artifact_name(replace(foreign, line="2.3"), "mine") == f"v2.3@{foreign.digest[:12]}"
