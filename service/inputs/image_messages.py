"""The messages between the server and its image children: plain data, msgpack on the wire.

Both sides import this file and nothing else of each other; it knows neither images nor processes. Invariant: the parent sends one
`Warm`, then one `Prepare` at a time, and each is answered once.
"""

from __future__ import annotations

import msgspec

from service.types.vision import VisionSpec


class Warm(msgspec.Struct, frozen=True, tag="warm"):
    """The first message. `memory_bytes` is what decoding may take beyond what the child has when idle."""

    memory_bytes: int


class Prepare(msgspec.Struct, frozen=True, tag="prepare"):
    """Decode `encoded` (at most `most_pixels` of them), turn it upright and resize it to its grid of at most `most_tokens`."""

    encoded: bytes
    vision: VisionSpec
    most_tokens: int
    most_pixels: int


class Ready(msgspec.Struct, frozen=True, tag="ready"):
    """The child is warm."""


class Prepared(msgspec.Struct, frozen=True, tag="prepared"):
    """RGB bytes, row by row, of `rows` × `columns` image tokens; `source_pixels` is the size that was decoded."""

    rows: int
    columns: int
    source_pixels: int
    pixels: bytes


class Refused(msgspec.Struct, frozen=True, tag="refused"):
    """Why there are no pixels: `kind` is format, broken, too_large (then `source_pixels` says how large) or memory."""

    kind: str
    source_pixels: int = 0


Request = Warm | Prepare
Reply = Ready | Prepared | Refused
