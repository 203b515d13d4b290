"""How versions and artifacts are written and ordered.

It does not know files or what is served. Invariant: an artifact's name is a function of its line (or served name) and digest alone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from service.checkpoints.manifest import Manifest

DIGEST_CHARACTERS = 12


def artifact_name(manifest: Manifest, served_name: str) -> str:
    """The immutable name: the line (or served name) and the start of the digest, as `v2.3@0123456789ab`."""
    stem = f"v{manifest.line.removeprefix('v')}" if manifest.line else served_name
    return f"{stem}@{manifest.digest[:DIGEST_CHARACTERS]}"


def version_key(version: str | None) -> tuple[int, ...]:
    """What versions are ordered by: `2.3.10` after `2.3.9` after `2.3`; no version before all."""
    parts = (version or "").removeprefix("v").split(".")
    return tuple(int(part) for part in parts) if all(part.isascii() and part.isdigit() for part in parts) else ()
