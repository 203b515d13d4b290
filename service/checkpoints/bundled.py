"""Where the models lie that come with the program, and which of them are complete.

It reads no checkpoint and needs no torch. Invariant: a line has at most one bundled model, in the directory `nano-<label>`.
"""

from __future__ import annotations

from pathlib import Path

import service
from service.types.catalog import LINES, VersionLine

BUNDLED = Path(service.__file__).parent / "bundled"
REQUIRED_FILES = ("config.yaml", "manifest.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")


def bundled_directory(line: VersionLine, bundled: Path = BUNDLED) -> Path:
    """Where the bundled model of a line lies, whether it is there or not."""
    return bundled / f"nano-{line.label}"


def complete_lines(bundled: Path = BUNDLED) -> list[VersionLine]:
    """The lines whose bundled directory holds every file, oldest first."""
    return [line for line in LINES if all((bundled_directory(line, bundled) / name).is_file() for name in REQUIRED_FILES)]
