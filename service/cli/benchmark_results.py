"""The files that a user of `deepseek-benchmark` names for results: looked at before anything is measured, written after it was shown.

It does not know what a row says. Invariant: a row is on stdout before it goes anywhere that may fail.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from service.types.errors import SettingsError


def check_file(flag: str, path: str) -> None:
    """Refuse what can be told now that it cannot be written. Raises SettingsError."""
    if not path:
        return
    file = Path(path).absolute()
    if not file.parent.is_dir():
        raise SettingsError(f"--{flag} {path} lies in a directory that does not exist: make it first.")
    if file.is_dir():
        raise SettingsError(f"--{flag} {path} is a directory: name a file in it.")
    if not os.access(file if file.exists() else file.parent, os.W_OK):
        raise SettingsError(f"--{flag} {path} cannot be written by this user: name another file.")


def tell_row(path: str, row: dict[str, Any]) -> None:
    """Print the row as a line of JSON, then add it to the file of `--out` if there is one. Raises SettingsError."""
    line = json.dumps(row)
    print(line, flush=True)
    if not path:
        return
    try:
        with Path(path).open("a", encoding="utf-8") as file:
            file.write(line + "\n")
    except OSError as error:
        raise SettingsError(f"--out {path} cannot be written: {error.strerror}.") from None
