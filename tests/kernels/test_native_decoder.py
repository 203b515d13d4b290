"""All layers in one call: the same bits as the separate compiled kernels, however rows are batched and on however many threads."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from service.kernels.kv_store import write_kv
from service.kernels.native import attention, decoder, elementwise
from service.kernels.native.binding import functions
from service.kernels.native.decoder import BoundLayers, FarLayer, LayerParts, PagedStep
from service.kernels.native.linear import OrderedLinear
from service.kernels.native.quantised import NativeQuantisedLinear, unsupported
from service.kernels.quantised import quantise_weight
from tests.kernels.sparse_batches import make_store

pytestmark = pytest.mark.skipif(unsupported() is not None, reason="no compiled integer products here")
DIM, EPS, BLOCK, HALF = 48, 1e-5, 16, 4


@pytest.fixture(autouse=True, params=[1, 2, 3])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


class Drawn:
    """Random tensors, one after the other."""

    def __init__(self, seed: int) -> None:
        self._generator = torch.Generator().manual_seed(seed)

    def __call__(self, *shape: int, scale: float = 1.0) -> Tensor:
        return torch.randn(shape, generator=self._generator) * scale

    def product(self, outputs: int, inputs: int, kind: str, bias: bool) -> NativeQuantisedLinear:
        linear = NativeQuantisedLinear(quantise_weight(self(outputs, inputs, scale=inputs**-0.5), kind))
        linear.set_bias(self(outputs) if bias else None)
        return linear


def layer(
    drawn: Drawn,
    kind: str,
    heads: int,
    kv_heads: int,
    size: int,
    *,
    plain: bool = True,
    dim: int = DIM,
    hidden: int = 70,
    **attending: object,
) -> LayerParts:
    """A layer whose heads are normed and gated and whose products have biases unless it is plain."""
    shapes = ((heads + 2 * kv_heads) * size, dim), (dim, heads * size), (2 * hidden, dim), (dim, hidden)
    norms = (drawn(dim), drawn(dim), None if plain else drawn(size), None if plain else drawn(size))
    products = tuple(drawn.product(*shape, kind, bias=not plain) for shape in shapes)
    gate = None if plain else (OrderedLinear(drawn(heads, dim, scale=0.2)), drawn(heads))
    rule = {"window": None, "scale": size**-0.5, "softcap": None} | attending
    return LayerParts(products, norms, heads, kv_heads, size, hidden, gate=gate, **rule)  # type: ignore[arg-type]


def layers_of(kind: str) -> list[LayerParts]:
    """Three layers of which no two are alike, in two groups of blocks."""
    drawn = Drawn(1)
    return [
        layer(drawn, kind, 6, 2, 8),
        layer(drawn, kind, 4, 4, 12, plain=False, window=21, softcap=3.0),
        layer(drawn, kind, 5, 1, 24, window=21, scale=0.3),
    ]


class Cache:
    """Blocks of NaN for every layer, tables that name them in a scattered order, and the steps over them."""

    def __init__(self, parts: list[LayerParts], sequences: int, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.blocks = sequences * 8 + 1
        shapes = [(self.blocks, part.kv_heads, BLOCK, part.head_dim + (4 if dtype == torch.int8 else 0)) for part in parts]
        nan = -1 if dtype == torch.int8 else float("nan")  # bytes of -1 are a NaN too
        self.stores = tuple((torch.full(shape, nan, dtype=dtype), torch.full(shape, nan, dtype=dtype)) for shape in shapes)
        order = [torch.randperm(self.blocks - 1, generator=torch.Generator().manual_seed(seed)) + 1 for seed in (0, 1)]
        self.tables = [ids.view(sequences, 8).to(torch.int32) for ids in order]

    def step(self, befores: list[int], counts: list[int]) -> tuple[PagedStep, tuple[Tensor, Tensor]]:
        """Sequence s computes counts[s] tokens after befores[s] of them; with the angles of its rows."""
        rows = torch.tensor([s for s, count in enumerate(counts) for _ in range(count)])
        positions = torch.tensor([before + i for before, count in zip(befores, counts, strict=True) for i in range(count)])
        ids = [table[rows, positions // BLOCK].long() for table in self.tables]
        starts = torch.tensor([0, *counts]).cumsum(0).to(torch.int32)
        lengths = (torch.tensor(befores) + torch.tensor(counts)).to(torch.int32)
        where = positions % BLOCK, starts, lengths, torch.zeros(1, dtype=torch.int64)
        angles = positions[:, None] * 0.3 ** torch.arange(HALF)[None, :]
        return PagedStep(self.stores, (0, 1, 1), self.tables, ids, *where), (angles.cos(), angles.sin())


def separately(parts: list[LayerParts], update: Tensor, residual: Tensor, rotation: tuple[Tensor, Tensor], step: PagedStep) -> None:
    """The same step by calls of the kernels for one operation each."""
    tokens = len(update)
    for index, part in enumerate(parts):
        group, (keys, values) = step.group_of[index], step.stores[index]
        qkv, out, gate_up, down = part.products
        turning = part.heads + part.kv_heads
        x, total = elementwise.add_rms_norm(update, residual, part.norms[0], EPS)
        heads = qkv.apply(x, qkv.bias).view(tokens, turning + part.kv_heads, part.head_dim)
        turned = heads[:, :turning]
        if part.norms[2] is not None and part.norms[3] is not None:
            normed = elementwise.rms_norm(turned[:, : part.heads], part.norms[2], EPS)
            turned = torch.cat((normed, elementwise.rms_norm(turned[:, part.heads :], part.norms[3], EPS)), dim=1)
        turned = elementwise.rotate(turned, *rotation)
        write_kv(turned[:, part.heads :], heads[:, turning:], keys, values, step.block_ids[group], step.offsets)
        where = step.tables[group], step.query_starts, step.context_lengths
        scoring = {"scale": part.scale, "window": part.window, "softcap": part.softcap}
        seen = attention.paged_attention(turned[:, : part.heads], keys, values, *where, **scoring)  # type: ignore[arg-type]
        if part.gate is not None:
            seen = elementwise.head_gate(seen, part.gate[0].apply(x, part.gate[1]))
        x, total = elementwise.add_rms_norm(out.apply(seen.reshape(tokens, -1), out.bias), total, part.norms[1], EPS)
        update.copy_(down.apply(elementwise.swiglu(gate_up.apply(x, gate_up.bias)), down.bias))
        residual.copy_(total)


STEPS = (
    ([0, 0, 0], [40, 7, 65]),
    ([40, 7, 65], [1, 1, 1]),
    ([41, 8, 66], [1, 30, 2]),
    ([42, 38, 68], [1, 1, 50]),
)


def layers_in_tiles(kind: str) -> list[LayerParts]:
    """Sizes that fill the tiles of matrix units, where there are any: inputs in sixty-fours, heads in thirty-twos and sixty-fours."""
    drawn = Drawn(2)
    return [
        layer(drawn, kind, 6, 2, 64, dim=128, hidden=192),
        layer(drawn, kind, 4, 2, 32, dim=128, hidden=208, plain=False, window=21, softcap=3.0),
        layer(drawn, kind, 5, 1, 64, dim=128, hidden=64, window=21),
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int8])
@pytest.mark.parametrize(
    ("made", "kind"),
    [
        pytest.param(layers_of, "int8", id="int8"),
        pytest.param(layers_of, "int4", id="int4"),
        pytest.param(layers_in_tiles, "int8", id="tiles"),
    ],
)
def test_prefill_and_decode_have_the_bits_of_separate_calls(
    made: Callable[[str], list[LayerParts]], kind: str, dtype: torch.dtype, instructions: str
) -> None:
    if not functions().native_has_quantised():
        pytest.skip(f"{instructions} has no products of bytes")
    parts = made(kind)
    dim = parts[0].norms[0].numel()
    bound, mine, theirs = BoundLayers(parts, EPS), Cache(parts, 3, dtype), Cache(parts, 3, dtype)
    for number, (befores, counts) in enumerate(STEPS):
        drawn = Drawn(number)
        update, residual = drawn(sum(counts), dim), drawn(sum(counts), dim)
        wanted = update.clone(), residual.clone()
        step, rotation = mine.step(befores, counts)
        assert decoder.decoder_layers(bound, update, residual, rotation, step)
        other, _ = theirs.step(befores, counts)
        separately(parts, *wanted, rotation, other)
        assert torch.isfinite(update).all() and int(step.done) == len(parts)
        assert torch.equal(update, wanted[0]) and torch.equal(residual, wanted[1])
        for stores in zip(mine.stores, theirs.stores, strict=True):
            for found, expected in zip(*stores, strict=True):
                assert torch.equal(found.nan_to_num(7.0), expected.nan_to_num(7.0)) if dtype != torch.int8 else torch.equal(found, expected)


def test_many_rows_are_shared_and_stay_the_same() -> None:
    """Enough outputs and rows for every thread to have pieces of its own; a row alone has the bits that it has among others."""
    drawn = Drawn(3)
    wide = LayerParts(
        products=(
            drawn.product(3 * 512, DIM, "int8", bias=False),
            drawn.product(DIM, 512, "int8", bias=False),
            drawn.product(2 * 1000, DIM, "int8", bias=False),
            drawn.product(DIM, 1000, "int8", bias=False),
        ),
        norms=(drawn(DIM), drawn(DIM), None, None),
        heads=16,
        kv_heads=16,
        head_dim=32,
        hidden=1000,
        window=None,
        scale=0.2,
        softcap=None,
    )
    bound, cache = BoundLayers([wide], EPS), Cache([wide], 20, torch.float32)
    update, residual = drawn(20, DIM), torch.zeros(20, DIM)
    for row in range(20):
        cache.stores[0][0].nan_to_num_(0.5), cache.stores[0][1].nan_to_num_(0.25)
        alone = update[row : row + 1].clone(), torch.zeros(1, DIM)
        befores, counts = [100] * 20, [int(other == row) for other in range(20)]
        step, rotation = cache.step(befores, counts)
        decoder.decoder_layers(bound, *alone, rotation, replace(step, group_of=(0,)))
        together = update.clone(), residual.clone()
        step, rotation = cache.step(befores, [1] * 20)
        decoder.decoder_layers(bound, *together, rotation, replace(step, group_of=(0,)))
        assert torch.equal(alone[0][0], together[0][row])


def test_what_does_not_fit_is_refused() -> None:
    parts = layers_of("int8")
    bound, cache = BoundLayers(parts, EPS), Cache(parts, 1, torch.float32)
    step, rotation = cache.step([0], [3])
    good = torch.zeros(3, DIM), torch.zeros(3, DIM)
    for update, residual in ((good[0][:2], good[1][:2]), (good[0].double(), good[1].double()), (good[0], torch.zeros(3, DIM + 1))):
        with pytest.raises(ValueError, match="do not fit the step"):
            decoder.decoder_layers(bound, update, residual, rotation, step)
    with pytest.raises(ValueError, match="do not fit a layer"):
        decoder.decoder_layers(bound, *good, rotation, replace(step, stores=step.stores[::-1]))
    with pytest.raises(ValueError, match="attention_norm is"):
        BoundLayers([replace(parts[0], norms=(torch.ones(DIM, dtype=torch.bfloat16), *parts[0].norms[1:]))], EPS)


def test_far_stores_that_do_not_fit_are_refused() -> None:
    part = layer(Drawn(1), "int8", 6, 2, 8, window=21)
    step, rotation = Cache([part], 1, torch.float32).step([0], [2])
    step = replace(step, group_of=(0,))
    blocks = make_store(3, 2, BLOCK, (8, 8), "int8", 2, torch.float32)
    rows = torch.zeros(2, DIM), torch.zeros(2, DIM)
    with pytest.raises(ValueError, match="no rule"):
        decoder.decoder_layers(BoundLayers([part], EPS), *rows, rotation, replace(step, far_layers=(FarLayer(blocks, 0, 0),), far=(None,)))
    bound = BoundLayers([replace(part, refresh=4, sink_blocks=1)], EPS)
    with pytest.raises(ValueError, match="a later one"):
        decoder.decoder_layers(bound, *rows, rotation, replace(step, far_layers=(FarLayer(blocks, 1, 0),), far=(None,)))
    turned = blocks._replace(bounds=blocks.bounds.transpose(1, 2))
    with pytest.raises(ValueError, match="contiguous"):
        decoder.decoder_layers(bound, *rows, rotation, replace(step, far_layers=(FarLayer(turned, 0, 0),), far=(None,)))
    for far_layers in ((FarLayer(blocks, 0, 0),), (None,)):
        assert decoder.decoder_layers(bound, *rows, rotation, replace(step, far_layers=far_layers, far=(None,)))


def test_separate_computes_nothing() -> None:
    parts = layers_of("int8")
    step, rotation = Cache(parts, 1, torch.float32).step([0], [2])
    update, residual = torch.ones(2, DIM), torch.ones(2, DIM)
    assert not decoder.layer_by_layer(BoundLayers(parts, EPS), update, residual, rotation, step)
    assert (update == 1).all() and (residual == 1).all() and int(step.done) == 0
