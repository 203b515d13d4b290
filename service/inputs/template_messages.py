"""The messages between the server and its template child: plain data, msgpack on the wire.

Both sides import this file and nothing else of each other; it knows neither templates nor processes. Invariant: the parent sends one
`Warm`, then one `Render` at a time, and each is answered once.
"""

from __future__ import annotations

from typing import Any

import msgspec


class Warm(msgspec.Struct, frozen=True, tag="warm"):
    """The first message: limits of the child's life. `memory_bytes` is what rendering may take beyond what the child has when idle."""

    memory_bytes: int


class Render(msgspec.Struct, frozen=True, tag="render"):
    """Render `template` with `variables`; more than `characters` of output are refused."""

    template: str
    variables: dict[str, Any]
    characters: int


class Ready(msgspec.Struct, frozen=True, tag="ready"):
    """The child is warm."""


class Rendered(msgspec.Struct, frozen=True, tag="rendered"):
    """The text."""

    text: str


class Refused(msgspec.Struct, frozen=True, tag="refused"):
    """Why there is no text: `kind` is message (the template's own words), too_long, memory or failed."""

    kind: str
    message: str = ""


Request = Warm | Render
Reply = Ready | Rendered | Refused
