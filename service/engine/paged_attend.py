"""Attention of one step over the pool's blocks, for every kind of layer: stores the step's keys and values, then reads over block tables.

What is the same for all layers of a KV group (tables, plans, anchors) is made once for the step. It does not know sequences or sampling.
Invariant: keys and values are written before anything of the layer is read, and a layer reads through its own group's tables only.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from service.engine.batch import Batch, Ints
from service.engine.far_choices import FarChoices, StepChoices, find_anchors
from service.engine.kv_pool import KvPool
from service.kernels.dispatch import resolve
from service.kernels.native.decoder import PagedStep
from service.types.kv_layout import FarSpec, KvGroup
from service.types.model_spec import GroupedQueryAttention, ModelSpec


class PagedAttend:
    """The `Attend` of one step. `far_blocks_read` counts far blocks for each row, layer and K/V head."""

    def __init__(self, spec: ModelSpec, pool: KvPool, batch: Batch, choices: FarChoices, on_layer: Callable[[], None]) -> None:
        self._layers = spec.layers
        self._pool = pool
        self._on_layer = on_layer
        keys = pool.blocks_of(0)[0]
        device = keys.device
        self._tables = [torch.from_numpy(table).to(device) for table in batch.block_tables]
        self._block_ids = [torch.from_numpy(ids).to(device) for ids in batch.block_ids]
        self._offsets = torch.from_numpy(batch.offsets).to(device)
        # Plans are made from the lengths on the host, so that no layer waits for the device.
        self._lengths = torch.from_numpy(batch.query_starts), torch.from_numpy(batch.context_lengths)
        self._query_starts, self._context_lengths = (lengths.to(device) for lengths in self._lengths)
        self._write = resolve("write_kv", device, keys.dtype)
        self._attention = resolve("paged_attention", device, keys.dtype)
        self._sparse = resolve("window_sparse_attention", device, keys.dtype) if any(group.far for group in pool.layout.groups) else None
        self._plan = resolve("plan_attention", device, keys.dtype)
        self._plans: dict[int, object] = {}
        self._plan_sparse = resolve("plan_sparse", device, keys.dtype)
        self._chosen: dict[int, StepChoices] = {}
        self.far_blocks_read = 0
        for index, group in enumerate(pool.layout.groups):
            if group.source is not None and group.far is not None:
                self._plan_choices(index, group, group.far, batch, choices)

    def __call__(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """query [T, Hq, D], key [T, Hkv, D], value [T, Hkv, Dv] -> [T, Hq, Dv]."""
        self._on_layer()
        group = self._pool.group_of(layer)
        keys, values = self._pool.blocks_of(layer)
        self._write(key, value, keys, values, self._block_ids[group], self._offsets)
        spec = self._layers[layer].attention
        if spec.far is not None:
            return self._attend_sparse(layer, spec, spec.far, query)
        tables, starts, lengths = self._tables[group], self._query_starts, self._context_lengths
        if group not in self._plans:
            self._plans[group] = self._plan(tables, *self._lengths, block_tokens=keys.shape[2], window=spec.window)
        scoring = {"scale": _scale(spec), "window": spec.window, "softcap": spec.softcap}
        seen: Tensor = self._attention(query, keys, values, tables, starts, lengths, **scoring, plan=self._plans[group])
        return seen

    def step(self, done: Ints) -> PagedStep:
        """Where the step stands in the cache, for a kernel that computes all layers: it then does what calls of this object would.

        `done` [1] counts the layers that such a call has computed.
        """
        where = self._offsets, self._query_starts, self._context_lengths
        return PagedStep(self._pool.stores, self._pool.groups, self._tables, self._block_ids, *where, torch.from_numpy(done))

    def keep_choices(self) -> None:
        """The step succeeded: later steps go on with what its rows chose last."""
        for chosen in self._chosen.values():
            chosen.keep()

    def _plan_choices(self, index: int, group: KvGroup, spec: FarSpec, batch: Batch, choices: FarChoices) -> None:
        anchors = find_anchors(batch, group, spec, self._pool.layout.block_tokens)
        if anchors.read:
            table = self._tables[index]
            choose = resolve("choose_far", table.device, self._pool.blocks_of(group.layers[0])[0].dtype)
            self._chosen[index] = StepChoices(anchors, choices, batch, table, choose)
            self.far_blocks_read += anchors.read * group.kv_heads * len(group.layers)

    def _attend_sparse(self, layer: int, spec: GroupedQueryAttention, far_spec: FarSpec, query: Tensor) -> Tensor:
        if self._sparse is None or spec.window is None:
            raise ValueError(f"Layer {layer} has far blocks and no window: the model's spec is contradictory.")
        group, far_group = self._pool.group_of(layer), self._pool.far_group_of(layer)
        keys, values = self._pool.blocks_of(layer)
        chosen = None if far_group is None else self._chosen.get(far_group)
        far = None if chosen is None else chosen.of(layer, query, self._pool.far_of(layer), far_spec.sink_blocks)
        where = self._tables[group], self._query_starts, self._context_lengths
        window, refresh, sinks = spec.window, far_spec.refresh, far_spec.sink_blocks
        rule = {"window": window, "refresh": refresh, "sink_blocks": sinks}
        if group not in self._plans:
            self._plans[group] = self._plan_sparse(where[0], *self._lengths, far=far, block_tokens=keys.shape[2], **rule)
        scoring = {"scale": _scale(spec), "softcap": spec.softcap}
        seen: Tensor = self._sparse(query, keys, values, *where, far=far, **scoring, **rule, plan=self._plans[group])
        return seen


def _scale(spec: GroupedQueryAttention) -> float:
    return spec.head_dim**-0.5 if spec.scale is None else spec.scale
