"""`deepseek-versions`: what the registry knows of artifacts: list them, show one, register a directory, verify one against its digests.

It joins flags, the registry and the terminal; it loads no model and no torch. Invariant: what is refused leaves the registry as it was.
"""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Callable, Sequence
from pathlib import Path

from service import __version__
from service.checkpoints.lock import lock_differences
from service.checkpoints.manifest import Manifest, read_manifest, verify
from service.checkpoints.names import DIGEST_CHARACTERS
from service.checkpoints.registry import Artifact, Registry
from service.cli.ending import run_command
from service.config.bundled import registry_path
from service.config.flags import FlagParser
from service.types.errors import CheckpointError, SettingsError

PROGRAM = "deepseek-versions"
DESCRIPTION = (
    "What the registry knows of artifacts. ACTION is list; show NAME; register DIRECTORY; verify NAME or DIRECTORY. A NAME is a line (its "
    "newest patch that is there), a patch, or the start of a digest."
)


def versions_parser() -> FlagParser:
    """The flags of `deepseek-versions`."""
    parser = FlagParser(PROGRAM, DESCRIPTION, __version__)
    parser.usage = f"{PROGRAM} ACTION [NAME or DIRECTORY] [flags]"
    parser.add_argument("action", choices=tuple(_ACTIONS), help="what to do")
    parser.add_argument("subject", nargs="?", default="", help="an artifact's name or a model directory")
    parser.add_argument("--registry", metavar="FILE", default="", help="registry file (default: in the user's data directory)")
    return parser


def main() -> int:
    """Run the command; returns its exit code."""
    return run_command(PROGRAM, _versions, sys.argv[1:])


def _versions(arguments: Sequence[str]) -> int:
    given = Namespace(**versions_parser().read(arguments))
    path = registry_path(given.registry)
    if path is None:
        raise SettingsError("--registry none keeps no record, so there is nothing to show: name a file.")
    if bool(given.subject) != (given.action != "list"):
        words = "takes no name" if given.action == "list" else "needs a name or a directory"
        raise SettingsError(f"{given.action} {words}; see {PROGRAM} --help.")
    _ACTIONS[given.action](Registry(path), given.subject)
    return 0


def _list(registry: Registry, subject: str) -> None:
    del subject
    from rich.console import Console
    from rich.table import Table

    table = Table("version", "artifact", "verified", "served", "directory")
    for artifact in registry.artifacts():
        place = artifact.directory if artifact.is_live else f"{artifact.directory} (gone)"
        version = f"v{artifact.version}" if artifact.version else "-"
        table.add_row(version, artifact.name, artifact.verified or "-", artifact.served or "-", place)
    Console(width=None if sys.stdout.isatty() else 200).print(table)


def _show(registry: Registry, subject: str) -> None:
    artifact = _find(registry, subject)
    print(artifact.name)
    for title, value in (
        ("version", f"v{artifact.version}" if artifact.version else None),
        ("digest", artifact.digest),
        ("directory", artifact.directory if artifact.is_live else f"{artifact.directory} (gone)"),
        ("registered", artifact.registered),
        ("verified", artifact.verified),
        ("verified with", ", ".join(f"{name} {version}" for name, version in artifact.lock.items()) or None),
        ("differs here", "; ".join(lock_differences(artifact.lock)) or None),
        ("served", artifact.served),
    ):
        if value is not None:
            print(f"  {title:<14} {value}")


def _register(registry: Registry, subject: str) -> None:
    manifest = read_manifest(Path(subject))
    print(f"registered {registry.register(manifest)}: {manifest.directory}")


def _verify(registry: Registry, subject: str) -> None:
    directory = Path(subject)
    manifest = _of(_find(registry, subject)) if not directory.is_dir() else read_manifest(directory)
    verify(manifest)
    registry.mark_verified(manifest)
    print(f"verified {manifest.directory}: every file is the one that its digest names ({manifest.digest[:DIGEST_CHARACTERS]})")
    for difference in lock_differences(dict(manifest.lock)):
        print(f"  published with {difference}")


def _of(artifact: Artifact) -> Manifest:
    """The manifest of an artifact, whose directory must still hold it."""
    manifest = read_manifest(Path(artifact.directory))
    if manifest.digest != artifact.digest:
        raise CheckpointError(f"{artifact.directory} no longer holds {artifact.name}: register the directory anew.")
    return manifest


def _find(registry: Registry, name: str) -> Artifact:
    artifact = registry.find(name)
    if artifact is None:
        raise CheckpointError(f"the registry has no {name[:80]!r}: see {PROGRAM} list, or register its directory.")
    return artifact


_ACTIONS: dict[str, Callable[[Registry, str], None]] = {"list": _list, "show": _show, "register": _register, "verify": _verify}

if __name__ == "__main__":
    sys.exit(main())
