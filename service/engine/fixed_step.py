"""The arrays of a decode step at fixed places on the device, so that a recorded step finds them there: filled by one copy.

numpy and tensors; it does not know how a step is recorded or what is computed. Invariant: rows beyond those of the step are copies of the
one with the shortest context, so they read what is there, write what is written anyway, and nobody looks at what they give.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from service.engine.batch import Batch
from service.engine.far_choices import Anchors
from service.engine.graph_memory import Shape, far_groups, fixed_values
from service.engine.paged_attend import StepTensors
from service.engine.upload import sendable
from service.types.kv_layout import KvLayout


class Fields(NamedTuple):
    """The parts of one flat array of int32, numpy's or torch's: [rows] each, tables [rows, blocks]; of far groups ends, budgets, counts."""

    tokens: Any
    positions: Any
    offsets: Any
    context_lengths: Any
    block_ids: tuple[Any, ...]
    tables: tuple[Any, ...]
    far: Mapping[int, tuple[Any, Any, Any]]


class FixedStep:
    """One step's arrays within a `room`, a flat tensor of int32 that is large enough for them; other shapes may use the same one."""

    def __init__(self, layout: KvLayout, shape: Shape, room: Tensor) -> None:
        self.shape = shape
        self._layout = layout
        self._room = room[: fixed_values(layout, shape)]
        self.fields = _cut(self._room, layout, shape)
        starts = torch.arange(shape.rows + 1, dtype=torch.int32, device=room.device)
        fields = self.fields
        self.where = StepTensors(fields.tables, fields.block_ids, fields.offsets, starts, fields.context_lengths)

    def fill(self, batch: Batch, anchors: Mapping[int, Anchors]) -> None:
        """Let these be the arrays of `batch`, whose slices have one token each; `anchors` are those of its far groups."""
        count = len(batch.rows)
        take = np.full(self.shape.rows, batch.context_lengths.argmin())
        take[:count] = np.arange(count)
        sent = sendable(len(self._room), torch.int32, self._room.device)
        to = _cut(sent.numpy(), self._layout, self.shape)
        for name in ("tokens", "positions", "offsets", "context_lengths"):
            getattr(to, name)[:] = getattr(batch, name)[take]
        for ids, found in zip(to.block_ids, batch.block_ids, strict=True):
            if len(found):
                ids[:] = found[take]
        for table, entries in zip(to.tables, batch.block_tables, strict=True):
            table[:, : entries.shape[1]] = entries[take]
            table[:, entries.shape[1] :] = 0
        for group, (ends, budgets, counts) in to.far.items():
            of = anchors[group]
            ends[:], budgets[:], counts[:] = of.ends[take], of.budgets[take], of.counts[take]
        self._room.copy_(sent, non_blocking=True)


def _cut(flat: Any, layout: KvLayout, shape: Shape) -> Fields:
    """The parts of a flat array, which they share the memory of."""
    at = 0

    def next_part(*size: int) -> Any:
        nonlocal at
        at += int(np.prod(size))
        return flat[at - int(np.prod(size)) : at].reshape(size)

    groups, rows = range(len(layout.groups)), shape.rows
    return Fields(
        tokens=next_part(rows),
        positions=next_part(rows),
        offsets=next_part(rows),
        context_lengths=next_part(rows),
        block_ids=tuple(next_part(rows) for _ in groups),
        tables=tuple(next_part(rows, shape.blocks) for _ in groups),
        far={group: (next_part(rows), next_part(rows), next_part(rows)) for group in far_groups(layout)},
    )
