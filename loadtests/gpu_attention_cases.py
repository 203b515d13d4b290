"""What `gpu_bench` measures of attention: dense over all tokens or a window, over two stores, and what fills and chooses from the far one.

Counts are those of `gpu_cases`. It does not know clocks or rows. Invariant: queries are the last rows of each sequence, blocks are
scattered at random, and plans are made ahead, as an engine's step makes them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from loadtests.gpu_cases import GPU, Case, Place, check
from loadtests.gpu_peers import Paged, library_peers
from service.kernels.reference_sparse import FIRST_STAGE, SECOND_STAGE, ChosenFar, FarBlocks, near_start

BLOCK, SUB_BLOCKS, SINKS = 64, 4, 1


@dataclass(frozen=True)
class Dense:
    """Sequences of `context` tokens, of which the last or, in a prefill, each is a query; `fp8`: a cache of half the bytes."""

    head_dim: int
    sequences: int
    context: int
    prefill: bool = False
    window: int | None = None
    fp8: bool = False
    heads: int = 32
    kv_heads: int = 8

    @property
    def rows(self) -> int:
        """Queries of a sequence."""
        return self.context if self.prefill else 1

    @property
    def read_tokens(self) -> int:
        """Tokens that some query of a sequence sees."""
        return self.context if self.window is None else min(self.context, self.window + self.rows - 1)

    @property
    def pairs(self) -> int:
        """(Row, token) pairs of a sequence."""
        reach = self.window or self.context
        return sum(min(position + 1, reach) for position in range(self.context - self.rows, self.context))


@dataclass(frozen=True)
class Sparse:
    """Sequences over two stores whose last `rows` tokens are queries: a window, one sink block, and `far_blocks` chosen for every `refresh`
    positions."""

    head_dim: int
    kv_heads: int
    sequences: int
    context: int
    far_blocks: int
    rows: int = 1
    refresh: int = 1
    store: str = "int8"
    window: int = 2048
    group: int = 2

    @property
    def anchors(self) -> range:
        """Positions of a sequence's queries that choose."""
        return range(self.context - self.rows, self.context, self.refresh)

    def end(self, position: int) -> int:
        """The table index behind the last candidate of the query at `position`."""
        return near_start(position, self.window, self.refresh, BLOCK)

    def candidates(self, position: int) -> int:
        """Far blocks that the query at `position` may choose from."""
        return max(self.end(position) - SINKS, 0)

    def seen_tokens(self, position: int) -> int:
        """Tokens that the query at `position` sees."""
        start, chosen = self.end(position), min(self.far_blocks, self.candidates(position))
        return (min(SINKS, start) + chosen) * BLOCK + position + 1 - start * BLOCK

    def row_bytes(self, itemsize: int) -> float:
        """Bytes of one token's far key, or value, of a head, with its scale."""
        return {"int8": self.head_dim + 2, "int4": self.head_dim / 2 + 2, "native": self.head_dim * itemsize}[self.store]

    def choice_bytes(self, itemsize: int) -> float:
        """What the choice of a sequence's last row reads: bounds of all candidates, of parts of some, and keys of some of these."""
        candidates = self.candidates(self.context - 1)
        kept, compared = (min(many * self.far_blocks, candidates) for many in (FIRST_STAGE, SECOND_STAGE))
        bounds = candidates * (2 * self.head_dim + 2) + kept * SUB_BLOCKS * 2 * self.head_dim
        return self.kv_heads * (bounds + compared * BLOCK * self.row_bytes(itemsize))

    def attention_bytes(self, itemsize: int) -> float:
        """What attention reads besides: near keys and values of all rows, and of the last row's chosen blocks the values."""
        start, last = self.end(self.anchors[0]), self.context - 1
        near = (min(SINKS, start) - start) * BLOCK + self.context
        chosen = min(self.far_blocks, self.candidates(last)) * BLOCK
        return self.kv_heads * (2 * near * self.head_dim * itemsize + chosen * self.row_bytes(itemsize))


PLACES = ((1, 16384), (1, 131072), (32, 16384), (32, 131072))
DENSE = (
    *(Dense(size, *place) for size in (64, 128) for place in ((1, 1024), *PLACES[:3], (256, 1024), (8, 131072))),
    *(Dense(256, *place) for place in PLACES[:3]),
    *(Dense(128, *place, window=2048) for place in PLACES[1:3]),
    *(Dense(size, *place, fp8=True) for size in (64, 128) for place in PLACES[1:3]),
    *(Dense(size, 1, context, prefill=True) for size in (64, 128) for context in (2048, 16384)),
    Dense(256, 1, 2048, prefill=True),
    Dense(128, 1, 16384, prefill=True, window=2048),
)
SPARSE = (
    *(Sparse(size, heads, *place, 16 if place[1] < 32768 else 32) for size, heads in ((128, 8), (64, 16)) for place in PLACES),
    *(Sparse(128, 8, *place, 16 if place[1] < 32768 else 32, store=store) for store in ("int4", "native") for place in PLACES[1:3]),
    Sparse(256, 4, 32, 16384, 16),
    *(Sparse(size, heads, 1, 16384, 16, rows=2048) for size, heads in ((128, 8), (64, 16))),
    Sparse(128, 8, 1, 16384, 16, rows=2048, refresh=16),
    Sparse(64, 8, 1, 131072, 32, rows=2048),
)
# Of a whole step, and its layers: 32 sequences at 16K and 128K.
TOTALS, LAYERS, DENSE_LAYERS = SPARSE[2:4], 24, 2
# Of the choice alone: decode steps, and slices of a prompt in which every token chooses.
CHOICES = (*SPARSE[:4], *(shape for shape in SPARSE if shape.rows > 1 and shape.refresh == 1))
# Blocks that leave a window at once, K/V heads and head sizes, by store: one of a decode step, those of a long prompt.
DEMOTED = tuple((blocks, 8, 128, store) for blocks in (1, 512) for store in ("int8", "int4", "native"))


def paged(place: Place, sequences: int, context: int, heads: int, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """(keys, values, tables) of sequences of `context` tokens in blocks scattered at random."""
    blocks = sequences * -(-context // BLOCK)
    keys, values = (place.drawn(blocks + 1, heads, BLOCK, size) for _ in range(2))
    tables = (torch.randperm(blocks, device=place.device) + 1).to(torch.int32).view(sequences, -1)
    return keys, values, tables


def dense(query: Tensor, keys: Tensor, values: Tensor, tables: Tensor, context: int, window: int | None = None) -> Callable[[], Tensor]:
    """Our dense attention of query rows that are the last of each sequence, planned once as an engine's step plans it."""
    from service.kernels.gpu import paged_attention as ours

    starts, lengths = _lengths(query, tables, context)
    plan = ours.plan_attention(tables, starts, lengths, block_tokens=BLOCK, window=window)
    there = starts.to(query.device), lengths.to(query.device)
    return partial(ours.paged_attention, query, keys, values, tables, *there, scale=query.shape[2] ** -0.5, window=window, plan=plan)


def _lengths(query: Tensor, tables: Tensor, context: int) -> tuple[Tensor, Tensor]:
    rows = query.shape[0] // tables.shape[0]
    return torch.arange(0, query.shape[0] + 1, rows, dtype=torch.int32), torch.full((tables.shape[0],), context, dtype=torch.int32)


def dense_case(place: Place, shape: Dense) -> Case:
    """Dense attention beside torch's on keys and values that lie in order already, of a window where there is one."""
    from torch.nn.functional import scaled_dot_product_attention as sdpa

    keys, values, tables = paged(place, shape.sequences, shape.context, shape.kv_heads, shape.head_dim)
    query = place.drawn(shape.sequences * shape.rows, shape.heads, shape.head_dim)
    if shape.fp8:
        keys, values = keys.to(torch.float8_e4m3fn), values.to(torch.float8_e4m3fn)
    run = dense(query, keys, values, tables, shape.context, shape.window)
    first = shape.context - shape.read_tokens
    ordered = [
        blocks.to(place.dtype)[tables.long()].transpose(1, 2).flatten(2, 3)[:, :, first : shape.context].contiguous()
        for blocks in (keys, values)
    ]
    asked = query.view(shape.sequences, shape.rows, shape.heads, shape.head_dim).transpose(1, 2)

    def torch_run() -> Tensor:
        return sdpa(asked, *ordered, is_causal=shape.prefill, enable_gqa=True)

    moved = 2 * shape.sequences * shape.kv_heads * shape.read_tokens * shape.head_dim * keys.itemsize + 2 * query.nbytes
    flops = 4.0 * shape.sequences * shape.pairs * shape.heads * shape.head_dim
    peers = library_peers(Paged(query, keys, values, tables, shape.context, shape.window), run)
    peers["flex_attention_in_order"] = partial(flex, asked, ordered, shape.window) if shape.prefill else partial(flex_row, asked, ordered)
    op, named = "prefill" if shape.prefill else "decode", asdict(shape) | {"rows": shape.rows}
    if shape.prefill and shape.window is not None:  # torch's would multiply what lies outside the window too
        return Case(op, named, run, moved, flops, peers=peers)
    return Case(
        op, named, run, moved, flops, peers={"torch_sdpa_in_order": lambda: torch_run} | peers, check=partial(check, run, torch_run)
    )


def flex(query: Tensor, ordered: list[Tensor], window: int | None) -> Callable[[], Any]:
    """Causal flex_attention, compiled at its first call."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    compiled, reach = torch.compile(flex_attention), window or query.shape[2]

    def seen(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (q >= k) & (q - k < reach)

    mask = create_block_mask(seen, None, None, query.shape[2], ordered[0].shape[2], device=query.device)
    return lambda: compiled(query, *ordered, block_mask=mask, enable_gqa=True)


def flex_row(query: Tensor, ordered: list[Tensor]) -> Callable[[], Any]:
    """flex_attention of one row a sequence, which sees all that is in `ordered`, compiled at its first call."""
    from torch.nn.attention.flex_attention import flex_attention

    compiled = torch.compile(flex_attention)
    return lambda: compiled(query, *ordered, enable_gqa=True)


def attention_cases() -> Iterator[Case]:
    """Dense decode and prefill."""
    return (dense_case(GPU, shape) for shape in DENSE)


class TwoStores:
    """Sequences whose blocks lie in both stores, and the anchors of their queries."""

    def __init__(self, place: Place, shape: Sparse) -> None:
        from service.kernels.gpu import far_store

        self.shape = shape
        self.near = paged(place, shape.sequences, shape.context, shape.kv_heads, shape.head_dim)
        self.query = place.drawn(shape.sequences * shape.rows, shape.kv_heads * shape.group, shape.head_dim)
        self.store = empty_store(place, self.near[0].shape, shape.store)
        ids = torch.arange(1, len(self.near[0]), device=place.device)
        far_store.demote(*self.near[:2], self.store, ids, ids)
        ends = [shape.end(position) for position in shape.anchors] * shape.sequences
        self.ends = torch.tensor(ends, dtype=torch.int32, device=place.device)
        self.budgets = torch.full_like(self.ends, shape.far_blocks)
        self.sequences = torch.arange(shape.sequences, device=place.device).repeat_interleave(len(shape.anchors))
        self.of_rows = torch.arange(len(self.query), device=place.device) // shape.refresh

    def choose(self) -> tuple[Tensor, Tensor]:
        """The choices of every anchor."""
        from service.kernels.gpu import choose_far

        where, most = (self.near[2], self.sequences, self.ends, self.budgets), self.shape.far_blocks
        return choose_far.choose_far(self.query[:: self.shape.refresh], self.store, *where, sink_blocks=SINKS, most=most)

    def attend(self) -> Callable[[], Tensor]:
        """Choice and attention, planned once."""
        from service.kernels.gpu import window_sparse

        shape, tables = self.shape, self.near[2]
        starts, lengths = _lengths(self.query, tables, shape.context)
        rule: dict[str, Any] = {"window": shape.window, "refresh": shape.refresh, "sink_blocks": SINKS}
        plan = window_sparse.plan_sparse(tables, starts, lengths, far=None, block_tokens=BLOCK, **rule)
        there = starts.to(tables.device), lengths.to(tables.device)
        rule |= {"scale": shape.head_dim**-0.5, "plan": plan}

        def run() -> Tensor:
            far = ChosenFar(self.store, tables, *self.choose(), self.of_rows, shape.far_blocks)
            return window_sparse.window_sparse_attention(self.query, *self.near, *there, far=far, **rule)

        return run


def sparse_case(place: Place, shape: Sparse) -> Case:
    """Choice and attention over two stores, beside our own dense attention over everything.

    Bytes of several rows are those of the last one's choice and of all near blocks, the least that is possible: other rows may choose the
    same. These queries are random and choose each its own, so a row is the other end: text lies between.
    """
    stores, size = TwoStores(place, shape), place.dtype.itemsize
    moved = shape.sequences * (shape.choice_bytes(size) + shape.attention_bytes(size)) + 2 * stores.query.nbytes
    seen = sum(shape.seen_tokens(position) for position in range(shape.context - shape.rows, shape.context))
    flops = 4.0 * shape.sequences * seen * shape.kv_heads * shape.group * shape.head_dim
    op, beside = "sparse_decode" if shape.rows == 1 else "sparse_prefill", partial(dense, stores.query, *stores.near, shape.context)
    return Case(op, asdict(shape), stores.attend(), moved, flops, peers={"ours_dense": beside})


def total_case(place: Place, shape: Sparse, layers: int) -> Case:
    """Attention of a whole model's step, of which DENSE_LAYERS read everything, beside one whose layers all do.

    Layers share their tensors: what one reads is more than a cache holds.
    """
    sparse, rows, heads = sparse_case(place, shape), Dense(shape.head_dim, shape.sequences, shape.context), shape.kv_heads * shape.group
    wide = dense_case(place, replace(rows, heads=heads, kv_heads=shape.kv_heads))
    narrow = layers - DENSE_LAYERS

    def run() -> list[Tensor]:
        return [sparse.run() for _ in range(narrow)] + [wide.run() for _ in range(DENSE_LAYERS)]

    def all_dense() -> list[Tensor]:
        return [wide.run() for _ in range(layers)]

    moved, flops = (narrow * a + DENSE_LAYERS * b for a, b in ((sparse.moved_bytes, wide.moved_bytes), (sparse.flops, wide.flops)))
    named = asdict(shape) | {"layers": layers, "dense_layers": DENSE_LAYERS}
    return Case("attention_total", named, run, moved, flops, peers={"ours_all_dense": lambda: all_dense}, check=wide.check)


def total_cases() -> Iterator[Case]:
    """Decode steps of a model with as many layers as the reference shape has."""
    return (total_case(GPU, shape, LAYERS) for shape in TOTALS)


def choice_case(place: Place, shape: Sparse) -> Case:
    """The choice alone."""
    stores = TwoStores(place, shape)
    moved = shape.sequences * shape.choice_bytes(place.dtype.itemsize) + stores.query.nbytes
    return Case("choose_far", asdict(shape), stores.choose, moved, 0.0)


def demote_case(place: Place, blocks: int, kv_heads: int, size: int, store: str) -> Case:
    """Blocks that leave the window, beside torch's operations one after the other."""
    from service.kernels import far_store as plain
    from service.kernels.gpu import far_store

    keys, values = (place.drawn(blocks + 1, kv_heads, BLOCK, size) for _ in range(2))
    ids = torch.arange(1, blocks + 1, device=place.device)
    arguments = (keys, values, empty_store(place, keys.shape, store), ids, ids)
    stored = sum(tensor[1:].nbytes for tensor in arguments[2] if tensor is not None)
    shape = {"blocks": blocks, "kv_heads": kv_heads, "head_dim": size, "store": store}
    beside = partial(partial, plain.demote, *arguments)
    return Case("demote", shape, partial(far_store.demote, *arguments), 2 * keys[1:].nbytes + stored, 0.0, peers={"torch": beside})


def sparse_cases() -> Iterator[Case]:
    """Decode and prefill over two stores."""
    return (sparse_case(GPU, shape) for shape in SPARSE)


def far_cases() -> Iterator[Case]:
    """Demotion and choice."""
    for demoted in DEMOTED:
        yield demote_case(GPU, *demoted)
    for shape in CHOICES:
        yield choice_case(GPU, shape)


def empty_store(place: Place, shape: torch.Size, store: str) -> FarBlocks:
    """A far store of blocks of this shape."""
    blocks, heads, tokens, size = shape
    kind, width = {"int8": (torch.int8, size), "int4": (torch.uint8, size // 2), "native": (place.dtype, size)}[store]

    def empty(kind: torch.dtype, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=kind, device=place.device)

    data = [empty(kind, blocks, heads, tokens, width) for _ in range(2)]
    scales = [None if store == "native" else empty(torch.float16, blocks, heads, tokens) for _ in range(2)]
    bounds = empty(torch.int8, heads, blocks, 2, size).transpose(0, 1)
    parts = empty(torch.int8, blocks, heads, SUB_BLOCKS, 2, size)
    return FarBlocks(*data, *scales, bounds, parts, empty(torch.float16, heads, blocks).T)


CASES: dict[str, Callable[[], Iterator[Case]]] = {
    "attention": attention_cases,
    "sparse": sparse_cases,
    "total": total_cases,
    "far": far_cases,
}
