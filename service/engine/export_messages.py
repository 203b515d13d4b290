"""The messages between a worker and the child that exports a graph for it.

Both sides import this file and nothing else of each other. Invariant: one `Export` is answered with one `Exported` or one `Refused`.
"""

from __future__ import annotations

import msgspec

from service.types.settings import AttentionSettings


class Export(msgspec.Struct, frozen=True, array_like=True, tag="export"):
    """Export the checkpoint in `directory`, its attention adapted, into the directory `target`, with weights as `quantize` says.

    It computes with so many `threads`, 0 for one on each core.
    """

    directory: str
    attention: AttentionSettings
    quantize: str
    target: str
    threads: int = 0


class Exported(msgspec.Struct, frozen=True, array_like=True, tag="exported"):
    """It lies there, whole and checked."""


class Refused(msgspec.Struct, frozen=True, array_like=True, tag="refused"):
    """It cannot be; `message` says why in one sentence."""

    message: str


Answer = Exported | Refused
