"""Words for a setting, taken from its type: what a flag's value looks like, what an error says is right, and the table of the docs.

It does not know sources or values. Invariant: words follow from the definition, so a bound that changes there changes here.
"""

from __future__ import annotations

import typing

import annotated_types
from pydantic.fields import FieldInfo

from service.config.definition import ENVIRONMENT_PREFIX, SECTIONS, Former, Unit, to_bytes

# From here on a bound only keeps numbers within what machines count in.
_UNBOUNDED = 1 << 40


def is_list(field: FieldInfo) -> bool:
    """Whether the flag may be repeated."""
    return typing.get_origin(field.annotation) is list


def metavar(field: FieldInfo) -> str:
    """What stands for the value in help texts."""
    if typing.get_origin(field.annotation) is typing.Literal:
        return "|".join(str(choice) for choice in typing.get_args(field.annotation))
    if _is_size(field):
        return "SIZE"
    if field.annotation is bool:
        return "true|false"
    unit = _unit(field)
    return unit.metavar if unit else "N" if field.annotation is int else "TEXT"


def expectation(field: FieldInfo) -> str:
    """What a right value is, to follow "must be": `a whole number from 0 to 65535`."""
    if typing.get_origin(field.annotation) is typing.Literal:
        return "one of " + ", ".join(str(choice) for choice in typing.get_args(field.annotation))
    if field.annotation is bool:
        return "true or false"
    if is_list(field):
        unit = _unit(field)
        return unit.words if unit else "a text or a list of texts"
    if field.annotation is str:
        return f"{field.description}" if any(hasattr(item, "pattern") for item in field.metadata) else "a text"
    unit = _unit(field)
    what = "a size such as 512MiB or 2GB" if _is_size(field) else unit.words if unit else "a whole number"
    return what + _bounds(field)


def renamed(field: FieldInfo, value: object) -> str:
    """` (1 is now always)` where the value is one that the setting took before, or nothing."""
    former = next((item.names for item in field.metadata if isinstance(item, Former)), {})
    return f" ({value} is now {former[str(value)]})" if str(value) in former else ""


def default_note(field: FieldInfo) -> str:
    """` (default 8000)`, or nothing where there is none to speak of."""
    shown = default_text(field)
    return f" (default {shown})" if shown else ""


def default_text(field: FieldInfo) -> str:
    """The default as one would write it, or nothing."""
    if field.default in ("", []):
        return ""
    if isinstance(field.default, bool):
        return str(field.default).lower()
    if _is_size(field) and field.default:
        for unit, name in ((1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")):
            if field.default % unit == 0:
                return f"{field.default // unit}{name}"
    return str(field.default)


def settings_tables() -> str:
    """Markdown: one table for each section of the definition."""
    parts = []
    for section in SECTIONS:
        rows = [f"### {section.__doc__}", "", "| flag | value | default | environment | meaning |", "|---|---|---|---|---|"]
        for name, field in section.model_fields.items():
            value = metavar(field).replace("|", "\\|")
            cells = (f"`--{name}`", value, default_text(field), f"`{ENVIRONMENT_PREFIX}{name.upper()}`", field.description or "")
            rows.append("| " + " | ".join(cells) + " |")
        parts.append("\n".join(rows))
    return "\n\n".join(parts)


def _unit(field: FieldInfo) -> Unit | None:
    return next((item for item in field.metadata if isinstance(item, Unit)), None)


def _is_size(field: FieldInfo) -> bool:
    return any(getattr(item, "func", None) is to_bytes for item in field.metadata)


def _bounds(field: FieldInfo) -> str:
    least = [item.ge for item in field.metadata if isinstance(item, annotated_types.Ge)]
    above = [item.gt for item in field.metadata if isinstance(item, annotated_types.Gt)]
    most = [item.le for item in field.metadata if isinstance(item, annotated_types.Le) and item.le < _UNBOUNDED]  # type: ignore[operator]
    low = f" from {max(least)}" if least else f" above {max(above)}" if above else ""  # type: ignore[type-var]
    return f"{low} up to {min(most):.0f}" if most else low  # type: ignore[type-var]
