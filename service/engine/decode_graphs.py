"""Decode steps that are recorded once for a number of rows and a length of block tables, then replayed as CUDA graphs.

A step of few rows is bound by its launches, one after the other from Python; a replay is one launch. What is recorded goes from token ids
to final states; sampling stays outside. It does not know what a graph is: a `Recorder` makes and replays it. Invariant: every step is
computed, replayed or not, and counted by how; recording that fails costs a line in the log and nothing else.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Mapping
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from service.engine.batch import Batch
from service.engine.far_choices import Anchors, FixedChoices, find_anchors
from service.engine.fixed_step import FixedStep
from service.engine.graph_memory import MOST_GRAPHS, MOST_SPLITS, Shape, far_groups, fixed_values, rows_for, splits_of, tables_for
from service.engine.kv_pool import KvPool
from service.engine.paged_attend import PagedAttend, Rule
from service.kernels.dispatch import again, apart, resolve
from service.kernels.reference_sparse import ChosenFar
from service.models.decoder import Decoder
from service.types.kv_layout import FAR_POSITION

Replay = Callable[[], Tensor]
# How a step's forward was computed: labels of a metric. The first two are those of recorded shapes.
REPLAYED, RECORDED = "replayed", "recorded"


class Recorder(Protocol):
    """Makes graphs; all of them may use the same memory, since one runs at a time and what it gives is read before the next."""

    def record(self, work: Callable[[], Tensor]) -> Replay:
        """Record what `work` does on the device. The replay does it again and gives the same tensor. Raises RuntimeError."""


class Recorded(NamedTuple):
    """A step's fixed arrays, its replay, and the kernel calls that a replay makes."""

    step: FixedStep
    replay: Replay
    calls: Mapping[tuple[str, str], int]


class FixedPlans:
    """Plans of a recorded step; see paged_attend.Plans."""

    def __init__(self, context_lengths: Tensor, most_tokens: int, place: tuple[torch.device, torch.dtype]) -> None:
        self._lengths, self._most = context_lengths, most_tokens
        self._plan = resolve("plan_decode", *place)

    def dense(self, tables: Tensor, block_tokens: int, window: int | None) -> object:
        """Splits of what each row sees."""
        del tables, block_tokens
        return self._plan(self._lengths, most_tokens=self._most, window=window)

    def sparse(self, tables: Tensor, block_tokens: int, rule: Rule, far: ChosenFar | None) -> object:
        """Splits of each row's list."""
        del tables, block_tokens, far
        return self._plan(self._lengths, most_tokens=self._most, window=rule.window)


class DecodeGraphs:
    """The graphs of one worker for steps of up to `rows` sequences of `context_tokens`. `on_layer` is called for every layer computed."""

    def __init__(
        self, decoder: Decoder, pool: KvPool, recorder: Recorder, rows: int, context_tokens: int, on_layer: Callable[[], None]
    ) -> None:
        self._decoder, self._pool, self._recorder, self._on_layer = decoder, pool, recorder, on_layer
        self._layout = pool.layout
        most = Shape(rows_for(rows), tables_for(-(-context_tokens // pool.layout.block_tokens)))
        self._room = torch.zeros(fixed_values(pool.layout, most), dtype=torch.int32, device=decoder.device)
        self._recorded: dict[Shape, Recorded] = {}
        self._failed = False
        self._counts: Counter[str] = Counter()
        self._refreshes = any(group.far is not None and group.far.refresh > 1 for group in pool.layout.groups)

    def hidden(self, batch: Batch, sees_images: bool) -> tuple[Tensor, int] | None:
        """Final states [S, dim] of a step's rows and how many far blocks they read; None, and counted why, where it is to be computed
        as any other step is."""
        shape = Shape(rows_for(len(batch.rows)), tables_for(batch.block_tables[0].shape[1]))
        layout, groups = self._layout, self._layout.groups
        how = self._refusal(batch, shape, sees_images)
        anchors: dict[int, Anchors] = {}
        for group in far_groups(layout) if how is None else ():
            far = groups[group].far
            if far is None:
                continue
            anchors[group] = find_anchors(batch, groups[group], far, layout.block_tokens)
            # A token of the prompt that reads all far blocks.
            how = "prompt" if anchors[group].budgets.max() > far.budget(FAR_POSITION) else how
        if how is not None:
            self._counts[how] += 1
            return None
        read = sum(found.read * groups[group].kv_heads * len(groups[group].layers) for group, found in anchors.items())
        return self._replayed(batch, shape, anchors)[: len(batch.rows)], read

    def take_counts(self) -> tuple[tuple[str, int], ...]:
        """Forwards since the last call by how they were computed."""
        counts, self._counts = self._counts, Counter()
        return tuple(counts.items())

    def _refusal(self, batch: Batch, shape: Shape, sees_images: bool) -> str | None:
        if len(batch.tokens) > len(batch.rows):
            return "prefill"
        if sees_images:
            return "images"
        if self._refreshes:
            return "refresh"
        if shape.rows * splits_of(self._layout, shape.blocks) > MOST_SPLITS:
            return "long"
        if shape not in self._recorded and (self._failed or len(self._recorded) >= MOST_GRAPHS):
            return "failed" if self._failed else "full"
        return None

    def _replayed(self, batch: Batch, shape: Shape, anchors: Mapping[int, Anchors]) -> Tensor:
        known = self._recorded.get(shape)
        step = FixedStep(self._layout, shape, self._room) if known is None else known.step
        step.fill(batch, anchors)
        if known is None:
            # The step itself is computed as it will be recorded, which also lets the libraries allocate and compile what they need.
            hidden = self._compute(step, self._on_layer)
            self._record(step)
            self._counts[RECORDED] += 1
            return hidden
        hidden = known.replay()
        again(known.calls)
        for _ in self._decoder.layers:
            self._on_layer()
        self._counts[REPLAYED] += 1
        return hidden

    def _record(self, step: FixedStep) -> None:
        try:
            replay, calls = apart(lambda: self._recorder.record(lambda: self._compute(step, _nothing)))
        except (RuntimeError, MemoryError) as error:
            self._failed = True
            print(f"decode steps of {step.shape.rows} rows are not recorded, nor further ones: {error}", file=sys.stderr, flush=True)
            return
        self._recorded[step.shape] = Recorded(step, replay, calls)

    def _compute(self, step: FixedStep, on_layer: Callable[[], None]) -> Tensor:
        fields, pool, decoder = step.fields, self._pool, self._decoder
        plans = FixedPlans(fields.context_lengths, step.shape.blocks * self._layout.block_tokens, pool.place)
        chosen = {group: self._choices(group, step) for group in fields.far}
        attend = PagedAttend(decoder.spec, pool, step.where, plans, chosen, on_layer)
        return decoder.hidden(fields.tokens, fields.positions, attend)

    def _choices(self, group: int, step: FixedStep) -> FixedChoices:
        far, tables = self._layout.groups[group].far, step.fields.tables[group]
        budget, most = (0, 0) if far is None else (far.budget(0), far.budget(FAR_POSITION))
        return FixedChoices(step.fields.far[group], tables, budget, most, resolve("choose_far", *self._pool.place))


def _nothing() -> None:
    """Recording computes no layer."""
