"""Attention of one step over the pool's blocks, for every kind of layer: stores the step's keys and values, then reads over block tables.

What is the same for all layers of a KV group (tables, plans, choices) is made once for the step. It does not know sequences or sampling.
Invariant: keys and values are written before anything of the layer is read, and a layer reads through its own group's tables only.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from service.engine.batch import Batch, Ints
from service.engine.far_choices import FarChoices, StepChoices, find_anchors
from service.engine.kv_pool import KvPool
from service.engine.upload import upload
from service.kernels.dispatch import chosen_name, resolve
from service.kernels.native.decoder import PagedStep
from service.kernels.reference_sparse import ChosenFar, FarBlocks
from service.types.kv_layout import FarSpec
from service.types.model_spec import GroupedQueryAttention, ModelSpec


class StepTensors(NamedTuple):
    """Where the T tokens of a step's S sequences stand, on the device, as in `Batch`; tables and block ids of each KV group."""

    tables: Sequence[Tensor]
    block_ids: Sequence[Tensor]
    offsets: Tensor
    query_starts: Tensor
    context_lengths: Tensor

    @classmethod
    def of(cls, batch: Batch, device: torch.device) -> StepTensors:
        """The step of these slices."""
        groups, alone = len(batch.block_tables), (batch.offsets, batch.query_starts, batch.context_lengths)
        there = upload((*batch.block_tables, *batch.block_ids, *alone), device)
        return cls(there[:groups], there[groups : 2 * groups], *there[2 * groups :])


class Rule(NamedTuple):
    """By which rule a layer with far blocks reads: tokens of the window, tokens that share a choice, sinks."""

    window: int
    refresh: int
    sink_blocks: int


class Plans(Protocol):
    """What the attention of a step needs besides its tensors, made once for the layers of a KV group."""

    def dense(self, tables: Tensor, block_tokens: int, window: int | None) -> object:
        """For layers that read everything, or everything in their window."""

    def sparse(self, tables: Tensor, block_tokens: int, rule: Rule, far: ChosenFar | None) -> object:
        """For layers with far blocks."""


class Choices(Protocol):
    """What the step's rows read of the far blocks of one group's layers."""

    def of(self, layer: int, query: Tensor, blocks: FarBlocks, sink_blocks: int) -> ChosenFar:
        """The choices that query rows [T, Hq, D] of a layer make."""

    def keep(self) -> None:
        """The step succeeded."""


class HostPlans:
    """Plans from the lengths on the host, so that no layer waits for the device."""

    def __init__(self, batch: Batch, place: tuple[torch.device, torch.dtype]) -> None:
        self._lengths = torch.from_numpy(batch.query_starts), torch.from_numpy(batch.context_lengths)
        self._dense, self._sparse = (resolve(name, *place) for name in ("plan_attention", "plan_sparse"))

    def dense(self, tables: Tensor, block_tokens: int, window: int | None) -> object:
        """See Plans."""
        return self._dense(tables, *self._lengths, block_tokens=block_tokens, window=window)

    def sparse(self, tables: Tensor, block_tokens: int, rule: Rule, far: ChosenFar | None) -> object:
        """See Plans."""
        return self._sparse(tables, *self._lengths, far=far, block_tokens=block_tokens, **rule._asdict())


class PagedAttend:
    """The `Attend` of one step; `turns` where one kernel rotates and writes.

    `chosen` are the choices of its far groups, by the group's index; a group without reads nothing far.
    """

    def __init__(
        self, spec: ModelSpec, pool: KvPool, where: StepTensors, plans: Plans, chosen: Mapping[int, Choices], on_layer: Callable[[], None]
    ) -> None:
        self._layers = spec.layers
        self._pool = pool
        self._where = where
        self._made = plans
        self._chosen = chosen
        self._on_layer = on_layer
        place = pool.place
        self.turns = chosen_name("rotate_write", *place) != "separate"
        self._write = resolve("rotate_write" if self.turns else "write_kv", *place)
        self._attention = resolve("paged_attention", *place)
        self._sparse = resolve("window_sparse_attention", *place) if any(group.far for group in pool.layout.groups) else None
        self._plans: dict[int, object] = {}

    def __call__(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """query [T, Hq, D], key [T, Hkv, D], value [T, Hkv, Dv], where it does not turn -> [T, Hq, Dv]."""
        self._write(key, value, *self._pool.blocks_of(layer), self._where.block_ids[self._pool.group_of(layer)], self._where.offsets)
        return self._attend(layer, query)

    def turned(self, layer: int, heads: Tensor, value: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
        """See models.attention.TurningAttend."""
        where = self._where.block_ids[self._pool.group_of(layer)], self._where.offsets
        return self._attend(layer, self._write(heads, value, *rotation, *self._pool.blocks_of(layer), *where))

    def _attend(self, layer: int, query: Tensor) -> Tensor:
        self._on_layer()
        group, where = self._pool.group_of(layer), self._where
        keys, values = self._pool.blocks_of(layer)
        spec = self._layers[layer].attention
        if spec.far is not None:
            return self._attend_sparse(layer, spec, spec.far, query)
        tables, starts, lengths = where.tables[group], where.query_starts, where.context_lengths
        if group not in self._plans:
            self._plans[group] = self._made.dense(tables, keys.shape[2], spec.window)
        scoring = {"scale": _scale(spec), "window": spec.window, "softcap": spec.softcap}
        seen: Tensor = self._attention(query, keys, values, tables, starts, lengths, **scoring, plan=self._plans[group])
        return seen

    def step(self, done: Ints) -> PagedStep:
        """Where the step stands in the cache, for a kernel that computes all layers: it then does what calls of this object would.

        `done` [1] counts the layers that such a call has computed.
        """
        where, pool = self._where, self._pool
        chosen = [self._chosen.get(index) for index in range(len(pool.layout.groups))]
        far = [choices.step if isinstance(choices, StepChoices) else None for choices in chosen]
        lengths = where.query_starts, where.context_lengths
        placed = where.tables, where.block_ids, where.offsets, *lengths, torch.from_numpy(done)
        return PagedStep(pool.stores, pool.groups, *placed, pool.far_layers, far)

    def keep_choices(self) -> None:
        """The step succeeded: later steps go on with what its rows chose last."""
        for chosen in self._chosen.values():
            chosen.keep()

    def _attend_sparse(self, layer: int, spec: GroupedQueryAttention, far_spec: FarSpec, query: Tensor) -> Tensor:
        if self._sparse is None or spec.window is None:
            raise ValueError(f"Layer {layer} has far blocks and no window: the model's spec is contradictory.")
        group, far_group = self._pool.group_of(layer), self._pool.far_group_of(layer)
        keys, values = self._pool.blocks_of(layer)
        chosen = None if far_group is None else self._chosen.get(far_group)
        far = None if chosen is None else chosen.of(layer, query, self._pool.far_of(layer), far_spec.sink_blocks)
        where = self._where.tables[group], self._where.query_starts, self._where.context_lengths
        rule = Rule(spec.window, far_spec.refresh, far_spec.sink_blocks)
        if group not in self._plans:
            self._plans[group] = self._made.sparse(where[0], keys.shape[2], rule, far)
        scoring = {"scale": _scale(spec), "softcap": spec.softcap}
        seen: Tensor = self._sparse(query, keys, values, *where, far=far, **scoring, **rule._asdict(), plan=self._plans[group])
        return seen


def choose(pool: KvPool, batch: Batch, tables: Sequence[Tensor], kept: FarChoices) -> tuple[dict[int, StepChoices], int]:
    """The choices of a step's far groups, by the group's index, and how many far blocks are read: for each row, layer and K/V head."""
    chosen, read = {}, 0
    for index, group in enumerate(pool.layout.groups):
        if group.source is None or group.far is None:
            continue
        anchors = find_anchors(batch, group, group.far, pool.layout.block_tokens)
        if anchors.read:
            chosen[index] = StepChoices(anchors, index, kept, batch, tables[index], resolve("choose_far", *pool.place))
            read += anchors.read * group.kv_heads * len(group.layers)
    return chosen, read


def _scale(spec: GroupedQueryAttention) -> float:
    return spec.head_dim**-0.5 if spec.scale is None else spec.scale
