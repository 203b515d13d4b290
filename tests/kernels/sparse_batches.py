"""Batches over two stores with poisoned memory: what a step's rows may read is there, everything else is NaN or garbage."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from service.kernels import reference, reference_sparse
from service.kernels.reference_sparse import ChosenFar, FarBlocks
from tests.kernels.conftest import GARBAGE

LEVELS = {"int8": 127, "int4": 7}


@dataclass(frozen=True)
class Choosing:
    """Arguments of one call that chooses far blocks."""

    query: Tensor
    blocks: FarBlocks
    tables: Tensor
    sequences: Tensor
    candidate_ends: Tensor
    budgets: Tensor
    sink_blocks: int
    most: int

    def run(self, choose: Callable[..., tuple[Tensor, Tensor]] = reference_sparse.choose_far, **changes: Any) -> tuple[Tensor, Tensor]:
        call = replace(self, **changes)
        positional = (call.query, call.blocks, call.tables, call.sequences, call.candidate_ends, call.budgets)
        return choose(*positional, sink_blocks=call.sink_blocks, most=call.most)


@dataclass(frozen=True)
class SparseBatch:
    """Arguments of one attention call over two stores. `keys` and `values` are what each sequence holds, [context, Hkv, D]."""

    query: Tensor
    key_blocks: Tensor
    value_blocks: Tensor
    near_tables: Tensor
    query_starts: Tensor
    context_lengths: Tensor
    far: ChosenFar | None
    scale: float
    window: int
    refresh: int
    sink_blocks: int
    keys: list[Tensor]
    values: list[Tensor]
    choosing: Choosing | None = None
    softcap: float | None = None
    sink_logits: Tensor | None = None

    def run(self, attention: Callable[..., Tensor] = reference_sparse.window_sparse_attention, **changes: Any) -> Tensor:
        batch = replace(self, **changes)
        options = ("far", "scale", "window", "refresh", "sink_blocks", "softcap", "sink_logits")
        tables = (batch.near_tables, batch.query_starts, batch.context_lengths)
        return attention(batch.query, batch.key_blocks, batch.value_blocks, *tables, **{name: getattr(batch, name) for name in options})

    def reference(self) -> Tensor:
        """The answer in float64."""
        wide = {name: getattr(self, name).double() for name in ("query", "key_blocks", "value_blocks")}
        return self.run(**wide)

    def dense(self, stored: bool = False) -> Tensor:
        """Plain dense attention over everything in float64; with `stored` far blocks as they are kept, not as they were computed."""
        blocks = self.key_blocks.shape[2]
        keys, values = ([tensor.double() for tensor in tensors] for tensors in (self.keys, self.values))
        if stored and self.far is not None:
            for sequence, table in enumerate(self.far.tables.tolist()):
                for index in self.far_indices(sequence):
                    span = slice(index * blocks, (index + 1) * blocks)
                    for whole, store, scales in (
                        (keys, self.far.blocks.keys, self.far.blocks.key_scales),
                        (values, self.far.blocks.values, self.far.blocks.value_scales),
                    ):
                        kept = reference_sparse.dequantise(store[table[index]], None if scales is None else scales[table[index]])
                        whole[sequence][span] = kept.double().transpose(0, 1)
        return _dense(self, keys, values)

    def far_indices(self, sequence: int) -> range:
        """The table indices of a sequence's far blocks."""
        newest, size = int(self.context_lengths[sequence]) - 1, self.key_blocks.shape[2]
        return range(self.sink_blocks, reference_sparse.near_start(newest, self.window, self.refresh, size))


def permuted(batch: SparseBatch, seed: int = 1) -> SparseBatch:
    """The same sequences with the blocks of both stores elsewhere, but for the null block; so are they for whoever chooses."""
    generator = torch.Generator().manual_seed(seed)

    def order_of(count: int) -> Tensor:
        return torch.cat((torch.zeros(1, dtype=torch.int64), torch.randperm(count - 1, generator=generator) + 1))

    def there(tables: Tensor, order: Tensor) -> Tensor:
        valid = (tables > 0) & (tables < len(order))
        return torch.where(valid, order.argsort()[tables.clamp(0, len(order) - 1).long()].to(tables.dtype), tables)

    near = order_of(len(batch.key_blocks))
    moved = replace(
        batch, key_blocks=batch.key_blocks[near], value_blocks=batch.value_blocks[near], near_tables=there(batch.near_tables, near)
    )
    if batch.far is None or batch.choosing is None:
        return moved
    far = order_of(len(batch.far.blocks.bounds))
    blocks = FarBlocks(*(None if tensor is None else tensor[far] for tensor in batch.far.blocks))
    tables = there(batch.far.tables, far)
    choosing = replace(batch.choosing, blocks=blocks, tables=tables)
    return replace(moved, far=batch.far._replace(blocks=blocks, tables=tables), choosing=choosing)


def of_one_value(batch: SparseBatch) -> SparseBatch:
    """The same batch with values of 0.75 in both stores, which every format holds as it is."""
    changes: dict[str, Any] = {"value_blocks": torch.full_like(batch.value_blocks, 0.75)}
    if batch.far is not None:
        store = batch.far.blocks
        units, scale = {torch.int8: (64, 0.75 / 64), torch.uint8: (0x66, 0.75 / 6)}.get(store.values.dtype, (0.75, 1.0))
        scales = None if store.value_scales is None else torch.full_like(store.value_scales, scale)
        blocks = store._replace(values=torch.full_like(store.values, units), value_scales=scales)
        changes["far"] = batch.far._replace(blocks=blocks)
    return replace(batch, **changes)


def choosing_faults(call: Choosing) -> dict[str, Choosing]:
    """Calls with one fault each: every stage's input is wrong in one of them. `call` has more candidates than any stage keeps."""
    store, odd = call.blocks, call.query.clone()
    odd[:, -1] = -odd[:, -1]
    blocks = {
        "bounds of blocks": store._replace(bounds=torch.zeros_like(store.bounds)),
        "bounds of parts": store._replace(part_bounds=torch.zeros_like(store.part_bounds)),
        "scales of bounds": store._replace(bound_scales=store.bound_scales.roll(1, 0)),
        "keys": store._replace(keys=torch.zeros_like(store.keys)),
    }
    if store.key_scales is not None:
        # A scale is 5 % off in each second block.
        scales = store.key_scales.clone()
        scales[::2] *= 1.05
        blocks["scales of keys"] = store._replace(key_scales=scales)
    faults = {name: replace(call, blocks=wrong) for name, wrong in blocks.items()}
    faults |= {
        "a head of the queries": replace(call, query=odd),
        "budgets": replace(call, budgets=call.budgets - 1),
        "ends": replace(call, candidate_ends=call.candidate_ends - 1),
        "sinks": replace(call, sink_blocks=call.sink_blocks + 1),
    }
    return faults


def _dense(batch: SparseBatch, keys: list[Tensor], values: list[Tensor]) -> Tensor:
    """Attention over whole sequences, one block for each."""
    longest = max(len(key) for key in keys)
    shape = (len(keys) + 1, keys[0].shape[1], longest)
    key_blocks = torch.zeros(*shape, keys[0].shape[2], dtype=torch.float64)
    value_blocks = torch.zeros(*shape, values[0].shape[2], dtype=torch.float64)
    for sequence, (key, value) in enumerate(zip(keys, values, strict=True)):
        key_blocks[sequence + 1, :, : len(key)] = key.transpose(0, 1)
        value_blocks[sequence + 1, :, : len(value)] = value.transpose(0, 1)
    tables = torch.arange(1, len(keys) + 1)[:, None]
    options = {"scale": batch.scale, "window": None, "softcap": batch.softcap, "sink_logits": batch.sink_logits}
    return reference.paged_attention(
        batch.query.double(), key_blocks, value_blocks, tables, batch.query_starts, batch.context_lengths, **options
    )


def make_store(
    blocks: int, kv_heads: int, tokens: int, sizes: tuple[int, int], store: str, sub_blocks: int, dtype: torch.dtype
) -> FarBlocks:
    """A far store full of garbage: scales NaN, integers at their limits."""
    shape, pairs = (blocks, kv_heads, tokens), (2, sizes[0])
    whole = torch.full((kv_heads, blocks, *pairs), 127, dtype=torch.int8).transpose(0, 1)
    parts = torch.full((blocks, kv_heads, sub_blocks, *pairs), 127, dtype=torch.int8)
    bounds = whole, parts, torch.full((kv_heads, blocks), torch.nan, dtype=torch.float16).T
    if store == "native":
        keys, values = (torch.full((*shape, size), torch.nan, dtype=dtype) for size in sizes)
        return FarBlocks(keys, values, None, None, *bounds)
    kind, per_byte, filled = (torch.uint8, 2, 0x77) if store == "int4" else (torch.int8, 1, 127)
    keys, values = (torch.full((*shape, size // per_byte), filled, dtype=kind) for size in sizes)
    scales = [torch.full(shape, torch.nan, dtype=torch.float16) for _ in sizes]
    return FarBlocks(keys, values, *scales, *bounds)


def make_sparse(
    contexts: list[int],
    counts: list[int],
    *,
    heads: int = 4,
    kv_heads: int = 2,
    size: int = 16,
    value_size: int | None = None,
    block_tokens: int = 8,
    sub_blocks: int = 2,
    window: int = 20,
    refresh: int = 4,
    budget: int = 2,
    sink_blocks: int = 1,
    store: str = "int8",
    poison: float = float("nan"),
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    **scoring: Any,
) -> SparseBatch:
    """Sequences of contexts[s] tokens whose last counts[s] are queries, with choices made by the reference.

    A choice whose anchor lies before the slice was made by the anchor's own query, as an earlier step does. `store` "evict" keeps
    nothing far.
    """
    generator = torch.Generator().manual_seed(seed)
    sizes = (size, value_size or size)
    width = max(-(-context // block_tokens) for context in contexts) + 2
    keys = [torch.randn(context, kv_heads, sizes[0], generator=generator).to(dtype) for context in contexts]
    values = [torch.randn(context, kv_heads, sizes[1], generator=generator).to(dtype) for context in contexts]
    lengths = [max(context, count) for context, count in zip(contexts, counts, strict=True)]
    queries = [(torch.randn(length, heads, sizes[0], generator=generator) * 2).to(dtype) for length in lengths]
    total = sum(-(-context // block_tokens) for context in contexts) + 3
    ids = {kind: iter((torch.randperm(total - 1, generator=generator) + 1).tolist()) for kind in ("near", "far")}
    key_blocks = torch.full((total, kv_heads, block_tokens, sizes[0]), poison, dtype=dtype)
    value_blocks = torch.full((total, kv_heads, block_tokens, sizes[1]), poison, dtype=dtype)
    garbage = (*GARBAGE, total)
    tables = {
        kind: torch.tensor([[garbage[(s + i) % 4] for i in range(width)] for s in range(len(contexts))], dtype=torch.int32)
        for kind in ("near", "far")
    }
    blocks = make_store(total, kv_heads, block_tokens, sizes, "int8" if store == "evict" else store, sub_blocks, dtype)
    whole = (torch.empty(1, kv_heads, block_tokens, sizes[0], dtype=dtype), torch.empty(1, kv_heads, block_tokens, sizes[1], dtype=dtype))
    for sequence, (context, count) in enumerate(zip(contexts, counts, strict=True)):
        oldest = reference_sparse.near_start(max(context - count, 0), window, refresh, block_tokens)
        newest = reference_sparse.near_start(max(context - 1, 0), window, refresh, block_tokens)
        for index in range(-(-context // block_tokens) if count else 0):
            start, end = index * block_tokens, min((index + 1) * block_tokens, context)
            if index < sink_blocks or index >= oldest:
                physical = next(ids["near"])
                tables["near"][sequence, index] = physical
                key_blocks[physical, :, : end - start] = keys[sequence][start:end].transpose(0, 1)
                value_blocks[physical, :, : end - start] = values[sequence][start:end].transpose(0, 1)
            if sink_blocks <= index < newest and store != "evict":
                physical = next(ids["far"])
                tables["far"][sequence, index] = physical
                whole[0][0], whole[1][0] = keys[sequence][start:end].transpose(0, 1), values[sequence][start:end].transpose(0, 1)
                reference_sparse.demote(*whole, blocks, torch.tensor([0]), torch.tensor([physical]))
    choosing, anchors = _choosing(queries, contexts, counts, tables["far"], blocks, (window, refresh, block_tokens, sink_blocks, budget))
    far = None if store == "evict" else ChosenFar(blocks, tables["far"], *choosing.run(), anchors, budget)
    return SparseBatch(
        torch.cat([query[len(query) - count :] for query, count in zip(queries, counts, strict=True)]),
        key_blocks,
        value_blocks,
        tables["near"],
        torch.tensor([0, *counts]).cumsum(0).to(torch.int32),
        torch.tensor(contexts, dtype=torch.int32),
        far,
        size**-0.5,
        window,
        refresh,
        sink_blocks,
        keys,
        values,
        None if store == "evict" else choosing,
        **scoring,
    )


def _choosing(
    queries: list[Tensor], contexts: list[int], counts: list[int], tables: Tensor, blocks: FarBlocks, rule: tuple[int, int, int, int, int]
) -> tuple[Choosing, Tensor]:
    """The choices that all rows need, one for each anchor of each sequence, and which of them each row uses."""
    window, refresh, block_tokens, sink_blocks, budget = rule
    made: dict[tuple[int, int], int] = {}
    rows: list[int] = []
    for sequence, (context, count) in enumerate(zip(contexts, counts, strict=True)):
        for position in range(context - count, context):
            rows.append(-1 if position < 0 else made.setdefault((sequence, position // refresh * refresh), len(made)))
    picked = [queries[sequence][anchor] for sequence, anchor in made]
    ends = [reference_sparse.near_start(anchor, window, refresh, block_tokens) for _, anchor in made]
    query = torch.stack(picked) if picked else queries[0].new_zeros(0, *queries[0].shape[1:])
    sequences = torch.tensor([sequence for sequence, _ in made], dtype=torch.int64)
    budgets = torch.full((len(made),), budget, dtype=torch.int32)
    call = Choosing(query, blocks, tables, sequences, torch.tensor(ends, dtype=torch.int32), budgets, sink_blocks, budget)
    return call, torch.tensor(rows, dtype=torch.int64)
