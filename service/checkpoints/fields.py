"""Reading configuration files that a stranger wrote: bounded, typed, and refused by name.

It does not know which fields a family has. Invariant: no value leaves here that has not been checked for its type and range, and every
failure is a CheckpointError of one sentence naming the file and the field.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from service.types.errors import CheckpointError

CONFIG_BYTES = 64 * 1024 * 1024
COUNT = 1 << 31


def read_text(path: Path, limit_bytes: int = CONFIG_BYTES) -> str:
    """The UTF-8 text of a file of at most `limit_bytes`. Raises CheckpointError."""
    try:
        if path.stat().st_size > limit_bytes:
            raise CheckpointError(f"{path} is larger than {limit_bytes} bytes, which no file of its kind is: is it damaged?")
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path} is not UTF-8 text: is it damaged?") from error


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises CheckpointError."""
    try:
        value = json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not valid JSON: copy it again from where the model came from.") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} must hold a JSON object.")
    return value


class Fields:
    """Typed access to the fields of one object; `source` is what messages call it. A missing or null field gives the default."""

    def __init__(self, values: Mapping[str, Any], source: str) -> None:
        self.values = values
        self.source = source

    def has(self, name: str) -> bool:
        """Whether the field is there and not null."""
        return self.values.get(name) is not None

    def integer(self, name: str, default: int | None = None, low: int = 1, high: int = COUNT) -> int:
        """An integer in [low, high]; required when there is no default."""
        value = self._get(name, default)
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise self.refusal(name, f"must be a whole number from {low} to {high}")
        return value

    def number(self, name: str, default: float | None = None, low: float = 0.0, high: float = 1e12) -> float:
        """A finite number in [low, high]; required when there is no default."""
        value = self._get(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or not low <= value <= high:
            raise self.refusal(name, f"must be a number from {low:g} to {high:g}")
        return float(value)

    def optional_number(self, name: str, low: float = 0.0, high: float = 1e12) -> float | None:
        """Like `number`, None when the field is missing or null."""
        return self.number(name, None, low, high) if self.has(name) else None

    def flag(self, name: str, default: bool) -> bool:
        """True or false."""
        value = self._get(name, default)
        if not isinstance(value, bool):
            raise self.refusal(name, "must be true or false")
        return value

    def text(self, name: str, default: str | None = None) -> str:
        """A string; required when there is no default."""
        value = self._get(name, default)
        if not isinstance(value, str):
            raise self.refusal(name, "must be a string")
        return value

    def ids(self, name: str, vocab_size: int) -> tuple[int, ...]:
        """Token ids below `vocab_size`: one, a list, or none when the field is missing or null."""
        value = self.values.get(name)
        found = value if isinstance(value, list) else [] if value is None else [value]
        for entry in found:
            if isinstance(entry, bool) or not isinstance(entry, int) or not 0 <= entry < vocab_size:
                raise self.refusal(name, f"must be a token id below the vocabulary's {vocab_size} or a list of them")
        return tuple(dict.fromkeys(found))

    def nested(self, name: str) -> Fields:
        """The fields of an object inside this one; empty when missing or null."""
        value = self._get(name, {})
        if not isinstance(value, dict):
            raise self.refusal(name, "must be an object")
        return Fields(value, f"{self.source}: {name}")

    def refusal(self, name: str, reason: str) -> CheckpointError:
        """The error that names a field, its value (shortened) and what is wrong with it."""
        value = json.dumps(self.values.get(name), default=str)
        shown = value if len(value) <= 60 else value[:57] + "..."
        return CheckpointError(f"{self.source}: {name} is {shown} and {reason}.")

    def _get(self, name: str, default: Any) -> Any:
        value = self.values.get(name)
        if value is not None:
            return value
        if default is None:
            raise CheckpointError(f"{self.source}: {name} is missing.")
        return default
