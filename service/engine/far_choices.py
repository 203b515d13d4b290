"""Which far blocks the rows of a step read: anchors and budgets by position, choices made now or kept from an earlier step.

numpy and small tensors; it does not know keys, scores or blocks' contents. Invariant: a row's choice is that of its anchor's query,
whichever step computed it; choices are kept only once a step has succeeded, so a step that is computed again starts from the same ones.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from service.engine.batch import Batch
from service.engine.upload import upload
from service.kernels.choices import Kernel
from service.kernels.native.decoder import FarStep
from service.kernels.reference_sparse import ChosenFar, FarBlocks
from service.types.kv_layout import FAR_POSITION, FarSpec, KvGroup, KvLayout

Ints = NDArray[np.int64]


class Anchors(NamedTuple):
    """The A anchors that the T tokens of a step share, for the layers of one far group.

    `of_tokens` [T] is each token's anchor; of each anchor `tokens` is the first token that uses it, `sequences` its slice, `ends` the table
    index behind its last candidate, `budgets` how many it may choose, `counts` how many it does. `fresh` marks those that are chosen in
    this step; `last` [S] is the anchor that each slice ends with. `read` counts the far blocks that all tokens read, for one head.
    """

    of_tokens: Ints
    tokens: Ints
    sequences: Ints
    ends: Ints
    budgets: Ints
    counts: Ints
    fresh: NDArray[np.bool_]
    last: Ints
    read: int


def find_anchors(batch: Batch, group: KvGroup, spec: FarSpec, block_tokens: int) -> Anchors:
    """The anchors of a step's tokens in the layers of a far group."""
    begins = batch.positions % spec.refresh == 0
    begins[batch.query_starts[:-1]] = True
    of_tokens = np.cumsum(begins) - 1
    tokens = np.flatnonzero(begins)
    positions = batch.positions[tokens] // spec.refresh * spec.refresh
    sequences = np.repeat(np.arange(len(batch.rows)), batch.lengths)[tokens]
    ends = np.maximum(positions - (group.window or 0) + 1, 0) // block_tokens
    candidates = np.maximum(ends - spec.sink_blocks, 0)
    budgets = np.where(positions < FAR_POSITION, spec.budget(0), spec.budget(FAR_POSITION))
    if spec.dense_prompts:
        budgets = np.where(positions < batch.prompt_tokens[sequences], np.maximum(candidates, budgets), budgets)
    counts = np.minimum(candidates, budgets)
    # Where all candidates are chosen there is nothing to remember.
    fresh = (batch.positions[tokens] == positions) | (counts == candidates)
    read = int(counts[of_tokens].sum())
    return Anchors(of_tokens, tokens, sequences, ends, budgets, counts, fresh, of_tokens[batch.query_starts[1:] - 1], read)


class FarChoices:
    """The last choice of every row, for every layer that has a far group."""

    def __init__(self, layout: KvLayout, rows: int, device: torch.device) -> None:
        self.layout = layout
        self._kept: dict[int, Tensor] = {}
        for index, group in enumerate(layout.groups):
            if group.source is not None and group.far is not None:
                shape = (len(group.layers), rows, group.kv_heads, group.far.budget(FAR_POSITION))
                self._kept[index] = torch.full(shape, -1, dtype=torch.int32, device=device)

    @property
    def reserved_bytes(self) -> int:
        """Bytes of the choices of all rows."""
        return sum(kept.nbytes for kept in self._kept.values())

    def of(self, group: int, rows: Tensor) -> Tensor:
        """The choices of `rows` [n] in the L layers of a far group, [L, n, Hkv, most] int32."""
        return self._kept[group][:, rows]

    def keep(self, group: int, rows: Tensor, choices: Tensor) -> None:
        """Remember what `rows` [n] chose last, [L, n, Hkv, …] int32."""
        kept = self._kept[group]
        width = min(choices.shape[3], kept.shape[3])
        kept[:, rows, :, :width] = choices[..., :width]


class StepChoices:
    """The choices of one step for the layers of one far group, whose index in the layout is `group`.

    Those that an earlier step made are there from the start, and so are those of anchors whose budget covers all candidates; the others are
    made layer by layer: by `of`, or by a call that computes all layers and is given `step`.
    """

    def __init__(self, anchors: Anchors, group: int, kept: FarChoices, batch: Batch, tables: Tensor, choose: Kernel) -> None:
        self.read = anchors.read
        self._group, self._kept, self._tables, self._choose = group, kept, tables, choose
        self._places = {layer: at for at, layer in enumerate(kept.layout.groups[group].layers)}
        far = kept.layout.groups[group].far
        sink_blocks, self._budget = (far.sink_blocks, far.budget(0)) if far is not None else (0, 0)
        # Who may choose all candidates has nothing to ask.
        whole = anchors.counts == np.maximum(anchors.ends - sink_blocks, 0)
        fresh, stale = np.flatnonzero(anchors.fresh & ~whole), np.flatnonzero(~anchors.fresh)
        ends, budgets, counts = (ints.astype(np.int32) for ints in (anchors.ends, anchors.budgets, anchors.counts))
        made_now = fresh, anchors.tokens[fresh], anchors.sequences[fresh], ends[fresh], budgets[fresh]
        made_before = np.flatnonzero(whole), stale, batch.rows[anchors.sequences[stale]]
        there = upload((*made_now, *made_before, counts, anchors.of_tokens, anchors.last, batch.rows), tables.device)
        self._fresh, self._query_rows, *self._arguments = there[:5]
        all_at, kept_at, kept_rows, self._counts, self._of_tokens, self._last, self._rows = there[5:]
        most = max(int(anchors.budgets.max()), int(anchors.counts.max()))
        shape = (len(self._places), len(anchors.tokens), kept.layout.groups[group].kv_heads, most)
        self._most = int(anchors.budgets[fresh].max()) if len(fresh) else 0
        self._made = torch.full(shape, -1, dtype=torch.int32, device=tables.device)
        if len(all_at):
            indices = torch.arange(most, dtype=torch.int32, device=tables.device)
            among = indices < self._counts[all_at, None, None]
            self._made[:, all_at] = torch.where(among, indices + sink_blocks, -1)
        if len(kept_at):
            before = kept.of(group, kept_rows)
            width = min(before.shape[3], most)
            self._made[:, kept_at, :, :width] = before[..., :width]

    def of(self, layer: int, query: Tensor, blocks: FarBlocks, sink_blocks: int) -> ChosenFar:
        """What the step's query rows [T, Hq, D] read of the layer's far blocks."""
        made = self._made[self._places[layer]]
        if self._most:
            asked = query.index_select(0, self._query_rows)
            choices, _ = self._choose(asked, blocks, self._tables, *self._arguments, sink_blocks=sink_blocks, most=self._most)
            made[self._fresh, :, : self._most] = choices
        return ChosenFar(blocks, self._tables, made, self._counts, self._of_tokens, self._budget)

    @property
    def step(self) -> FarStep:
        """The same for a call that chooses itself, for all layers."""
        return FarStep(self._tables, self._made, self._counts, self._of_tokens, self._fresh, self._query_rows, *self._arguments)

    @property
    def made_bytes(self) -> int:
        """Bytes of the choices of the step."""
        return self._made.nbytes

    def keep(self) -> None:
        """The step succeeded: each row's last choice is what the next step goes on with."""
        self._kept.keep(self._group, self._rows, self._made[:, self._last])


class FixedChoices:
    """The choices of rows that decode, one token each and a choice for every token, from tensors at fixed places.

    `ends`, `budgets` and `counts` [S] int32 are filled before the step, as `Anchors` has them; `budget` is the smallest of these and `most`
    the largest that there is.
    Nothing is kept: a choice for every token goes on with none.
    """

    def __init__(self, fields: tuple[Tensor, Tensor, Tensor], tables: Tensor, budget: int, most: int, choose: Kernel) -> None:
        self._ends, self._budgets, self._counts = fields
        self._tables, self._budget, self._most, self._choose = tables, budget, most, choose
        self._rows = torch.arange(len(tables), dtype=torch.int32, device=tables.device)

    def of(self, layer: int, query: Tensor, blocks: FarBlocks, sink_blocks: int) -> ChosenFar:
        """What query rows [S, Hq, D] read of the layer's far blocks."""
        del layer
        where = self._tables, self._rows, self._ends, self._budgets
        choices, _ = self._choose(query, blocks, *where, sink_blocks=sink_blocks, most=self._most)
        return ChosenFar(blocks, self._tables, choices, self._counts, self._rows, self._budget)

    def keep(self) -> None:
        """Nothing is kept."""
