"""Writing a safetensors file chunk by chunk, so that a model larger than the memory can be written.

It does not know what tensors are for or where chunks come from. Invariant: every value written is finite, and a file that is left has
exactly the bytes that its header tells of.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from service.checkpoints.stage import sync
from service.checkpoints.stored_tensors import DTYPES, ITEM_BYTES
from service.types.errors import CheckpointError

KINDS = {dtype: kind for kind, dtype in DTYPES.items()}


class Entry(NamedTuple):
    """One tensor to write: its name, dtype as torch names it (float32, bfloat16 or float16) and shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]


def write_safetensors(path: Path, entries: Sequence[Entry], chunks: Callable[[Entry], Iterable[Tensor]]) -> None:
    """Write the entries in their order; `chunks` gives an entry's values in order, flat or not, in any float dtype.

    Raises CheckpointError when a value is not finite in the entry's dtype.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, dtype, shape in entries:
        kind = KINDS[dtype]
        start, end = end, end + _count(shape) * ITEM_BYTES[kind]
        header[name] = {"dtype": kind, "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for entry in entries:
            dtype = getattr(torch, entry.dtype)
            for chunk in chunks(entry):
                value = chunk.detach().to("cpu", dtype).contiguous()
                require_finite(entry, chunk, value)
                stream.write(value.view(-1).view(torch.uint8).numpy().data)
        sync(stream)


def require_finite(entry: Entry, chunk: Tensor, value: Tensor) -> None:
    """Refuse values that are not finite, telling damaged weights (`chunk`) from a dtype that is too small for them (`value`)."""
    if value.numel() and not _is_finite(value):
        if _is_finite(chunk):
            raise CheckpointError(f"{entry.name} has values that are not finite in {entry.dtype}: store it as bfloat16 or float32.")
        raise CheckpointError(f"{entry.name} holds values that are not finite numbers, and such a model is not published.")


def _is_finite(values: Tensor) -> bool:
    """One pass for the smallest and largest value; NaN and infinities show in them."""
    return bool(torch.stack(torch.aminmax(values)).isfinite().all())


def _count(shape: tuple[int, ...]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count
