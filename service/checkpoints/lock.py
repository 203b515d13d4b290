"""The versions of what decides a model's numbers: recorded when it is published, compared when it is loaded; no torch is imported.

It does not know models. Invariant: a lock names the interpreter, this program and the libraries that are installed, nothing of the machine.
"""

from __future__ import annotations

import platform
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version

from service import __version__

LIBRARIES = ("numpy", "safetensors", "tokenizers", "torch")


def current_lock() -> dict[str, str]:
    """Version by name, of this environment."""
    lock = {"python": platform.python_version(), "deepseek-service": __version__}
    for library in LIBRARIES:
        if (found := _installed(library)) is not None:
            lock[library] = found
    return lock


def lock_differences(lock: Mapping[str, str]) -> list[str]:
    """Where this environment differs from a lock, as `torch 2.12.0, here 2.13.0`; nothing is said of what the lock does not name."""
    here = current_lock()
    return [f"{name} {wanted}, here {here.get(name, 'none')}" for name, wanted in lock.items() if here.get(name) != wanted]


def _installed(library: str) -> str | None:
    """The release, without the build that follows a plus sign (`2.13.0+cpu`)."""
    try:
        return version(library).partition("+")[0]
    except PackageNotFoundError:
        return None
