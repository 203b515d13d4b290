"""The flags of attention as commands other than `deepseek-serve` take them, read by its definition.

It does not know those commands. Invariant: what is right for `deepseek-serve` is right here, with the same words for what is wrong.
"""

from __future__ import annotations

from collections.abc import Mapping

from pydantic import TypeAdapter, ValidationError

from service.config.definition import NUMBERS, AttentionSection, Layers
from service.config.describe import expectation
from service.types.errors import SettingsError
from service.types.settings import AttentionSettings


def read_layers(texts: list[str] | None) -> tuple[int, ...] | None:
    """What `--dense_layers` says, which may stand more than once; None where it was not given. Raises SettingsError."""
    if texts is None:
        return None
    try:
        return tuple(TypeAdapter(Layers).validate_python(texts))
    except ValidationError:
        raise SettingsError(f"--dense_layers must be {NUMBERS.words}, not {','.join(texts)[:80]!r}.") from None


def read_attention(values: Mapping[str, object], dense_layers: list[str] | None) -> AttentionSettings:
    """All other settings of attention by name, and `--dense_layers`. Raises SettingsError."""
    try:
        read = AttentionSection.model_validate(dict(values))
    except ValidationError as error:
        name = str(error.errors(include_url=False)[0]["loc"][0])
        wanted = expectation(AttentionSection.model_fields[name])
        raise SettingsError(f"--{name} must be {wanted}, not {str(values[name])[:80]!r}.") from None
    return AttentionSettings(**{name: getattr(read, name) for name in values}, dense_layers=read_layers(dense_layers))
