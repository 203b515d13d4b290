"""Compiled demotion against the reference, byte for byte: stores, types, shapes, instruction sets, bad values, rounding, layouts, teeth."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from service.kernels import dispatch, far_store, reference_sparse
from service.kernels.kv_store import quantise_rows, row_size, widen_rows
from service.kernels.native import far_store as kernel
from service.kernels.reference_sparse import FarBlocks, quantise
from tests.kernels.conftest import needs_native
from tests.kernels.sparse_batches import LEVELS, make_store

pytestmark = [needs_native, pytest.mark.usefixtures("nan_memory")]
STORES = ("int8", "int4", "native")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Sizes of keys and values, tokens of a block and parts of it.
SHAPES = (((64, 64), 64, 4), ((80, 80), 16, 1), ((24, 2), 8, 2), ((6, 130), 20, 5), ((2, 34), 3, 3))
NEAR, FAR = torch.tensor([4, 0, 3, 1]), torch.tensor([1, 5, 3, 4])
Demote = Callable[[Tensor, Tensor, FarBlocks, Tensor, Tensor], None]


def same(one: FarBlocks, other: FarBlocks) -> bool:
    """Whether both stores hold the same bytes, NaN and untouched garbage included."""
    pairs = [(a, b) for a, b in zip(one, other, strict=True) if a is not None and b is not None]
    return all(torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8)) for a, b in pairs)


def rows_of(size: int, tokens: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Blocks [6, 2, tokens, size] of all magnitudes; some rows, and all of block 1, are zeros."""
    generator = torch.Generator().manual_seed(seed)
    spread = torch.logspace(-8, 4, tokens)[torch.randperm(tokens, generator=generator), None]
    rows = torch.randn(6, 2, tokens, size, generator=generator) * spread
    rows[1], rows[3, 0, tokens // 2], rows[4, 1, 0] = 0, 0, -0.0
    return rows.to(dtype)


def both(keys: Tensor, values: Tensor, store: str, parts: int, demote: Demote = kernel.demote) -> tuple[FarBlocks, FarBlocks]:
    """What `demote` and the reference make of the blocks NEAR."""
    shape = (6, *keys.shape[1:3], (row_size(keys), row_size(values)), store, parts, keys.dtype)
    found, expected = make_store(*shape), make_store(*shape)
    demote(keys, values, found, NEAR, FAR)
    reference_sparse.demote(keys, values, expected, NEAR, FAR)
    return found, expected


@pytest.mark.parametrize("store", STORES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("sizes", "tokens", "parts"), SHAPES)
def test_the_bytes_of_the_reference(
    sizes: tuple[int, int], tokens: int, parts: int, dtype: torch.dtype, store: str, instructions: str
) -> None:
    assert same(*both(rows_of(sizes[0], tokens, dtype), rows_of(sizes[1], tokens, dtype, seed=1), store, parts))


@pytest.mark.parametrize("store", ["int8", "native"])
@pytest.mark.parametrize("size", [1, 5, 33, 67])
def test_odd_sizes_where_bytes_are_whole(size: int, store: str, instructions: str) -> None:
    for dtype in DTYPES:
        assert same(*both(rows_of(size, 8, dtype), rows_of(size + 2, 8, dtype, seed=1), store, 2))


@pytest.mark.parametrize("store", ["int8", "int4"])
@pytest.mark.parametrize(("sizes", "tokens", "parts"), SHAPES)
def test_near_blocks_in_8_bits_give_the_bytes_of_what_they_stand_for(
    sizes: tuple[int, int], tokens: int, parts: int, store: str, instructions: str
) -> None:
    keys, values = (quantise_rows(rows_of(size, tokens, torch.float32, seed)) for seed, size in enumerate(sizes))
    keys[4, 1, 0, -4:] = torch.tensor([torch.nan]).view(torch.int8)
    found, expected = both(keys, values, store, parts)
    assert same(found, expected) and same(found, both(keys, values, store, parts, far_store.demote)[0])
    assert same(found, both(widen_rows(keys), widen_rows(values), store, parts)[1])
    layers = torch.stack([torch.zeros_like(keys), keys], dim=1)[:, 1]
    assert same(found, both(layers, values, store, parts)[0])
    if store == "int8":
        scales = keys[NEAR, ..., -4:].contiguous().view(torch.float32).squeeze(-1)
        held = (scales > 1e-4) & (scales < 6e4)  # by float16, to eleven bits
        assert held.any() and torch.equal(found.keys[FAR][held], keys[NEAR, ..., :-4][held])


@pytest.mark.parametrize("store", STORES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite(poison: float, dtype: torch.dtype, store: str, instructions: str) -> None:
    """Rows get zeros and a scale that is not finite, and a block with such a key bounds of zeros; other heads and blocks are whole."""
    keys, values = rows_of(34, 16, dtype), rows_of(18, 16, dtype, seed=1)
    keys[3, 0, 5, 33] = keys[4, 1, 15, 0] = values[0, 1, 7, 17] = values[4, 0, 0, 2] = poison
    found, expected = both(keys, values, store, 4)
    assert same(found, expected)
    assert not found.bound_scales[[3, 1], [0, 1]].isfinite().any() and not found.bounds[[3, 1], [0, 1]].any()
    assert found.bound_scales[[3, 1, 5], [1, 0, 1]].isfinite().all() and found.bounds[[3, 1, 5], [1, 0, 1]].any()


@pytest.mark.parametrize("store", STORES)
def test_scales_that_float16_does_not_hold(store: str, instructions: str) -> None:
    """Rows whose scale is infinite, the largest, subnormal (units are clamped then), or too small for any."""
    largest = torch.tensor([1e38, 9e6, 65504.0 * 127, 65519.0 * 127, 65504.0 * 7, 1.4e-6 * 127, 8.4e-8 * 127, 8.8e-8 * 7, 2.9e-8, 1e-44])
    keys = torch.linspace(-1, 1, 40) * largest[:, None]
    blocks = torch.stack([keys.roll(turn, 0)[:, None].expand(10, 5, 40).reshape(1, 50, 40) for turn in range(6)])
    assert same(*both(blocks, blocks.flip(3), store, 10))
    one_row = torch.stack([keys[at : at + 1][None] for at in (0, 1, 5, 6, 8, 9)])
    assert same(*both(one_row, one_row, store, 1))


def halves(unit: float, levels: int) -> Tensor:
    """Blocks [6, 1, 8, 64] whose rows have this unit, and else whole and half numbers of units."""
    generator = torch.Generator().manual_seed(5)
    counts = torch.randint(-2 * levels, 2 * levels + 1, (6, 1, 8, 64), generator=generator) / 2
    counts[..., 9] = levels
    return counts * torch.tensor(unit, dtype=torch.float16).float()


def beside_whole(unit: float) -> Tensor:
    """Blocks [6, 1, 8, 64] with keys next to whole numbers of units of their bounds, whose quotients are rounded to these."""
    whole = torch.randint(-120, 120, (6, 1, 8, 64), generator=torch.Generator().manual_seed(6)).float()
    whole *= torch.tensor(unit, dtype=torch.float16).float()
    keys = torch.nextafter(whole, torch.tensor(float("inf")))
    keys[:, :, ::2] = torch.nextafter(whole[:, :, ::2], torch.tensor(-float("inf")))
    keys[:, :, 3, 3] = 127 * torch.tensor(unit, dtype=torch.float16).float()
    return keys


@pytest.mark.parametrize("unit", [1.0, 0.0123, 0.4484, 31.3])
def test_halves_and_what_lies_beside_whole_numbers(unit: float, instructions: str) -> None:
    for store, levels in LEVELS.items():
        assert same(*both(halves(unit, levels), halves(unit / 3, levels), store, 2))
    assert same(*both(beside_whole(unit), beside_whole(unit), "native", 8))


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 10**6), st.floats(1e-12, 1e12), st.sampled_from(DTYPES), st.sampled_from(STORES))
def test_any_scale_gives_the_bytes_of_the_reference(seed: int, factor: float, dtype: torch.dtype, store: str) -> None:
    generator = torch.Generator().manual_seed(seed)
    keys, values = ((torch.randn(6, 1, 16, size, generator=generator) * factor).to(dtype) for size in (24, 38))
    assert same(*both(keys, values, store, 4))


@pytest.mark.parametrize("store", STORES)
def test_blocks_lie_by_their_strides(store: str, instructions: str) -> None:
    """Layers, heads and tokens interleaved, as blocks of a larger allocation may lie."""
    keys, values = rows_of(64, 16, torch.bfloat16), rows_of(32, 16, torch.bfloat16, seed=1)
    layers = torch.stack([torch.full_like(keys, torch.nan), keys], dim=1)[:, 1]
    tokens = values.transpose(1, 2).contiguous().transpose(1, 2)
    assert not layers.is_contiguous() and not tokens.is_contiguous()
    assert same(*both(layers, tokens, store, 4))


def test_the_same_bytes_with_any_number_of_threads() -> None:
    keys, values = rows_of(64, 64, torch.bfloat16), rows_of(64, 64, torch.bfloat16, seed=1)
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            for store in STORES:
                assert same(*both(keys, values, store, 4))
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("store", ["int8", "int4"])
def test_other_near_types_go_to_torch(store: str) -> None:
    keys, values = (torch.randn(6, 2, 8, size, dtype=torch.float64).mul(20) for size in (16, 8))
    assert same(*both(keys, values, store, 2))


def test_other_layouts_go_to_torch() -> None:
    keys, ids = rows_of(16, 8, torch.float32), (torch.tensor([-2, 0], dtype=torch.int32), torch.tensor([2, -1], dtype=torch.int32))
    turned = keys.transpose(2, 3).contiguous().transpose(2, 3)
    stores = [make_store(6, 2, 8, (16, 16), "int8", 2, torch.float32) for _ in range(4)]
    wide = torch.zeros(6, 2, 8, 20, dtype=torch.int8)[..., :16]
    stores[2] = stores[2]._replace(keys=wide.copy_(stores[2].keys))
    reference_sparse.demote(keys, keys, stores[0], *ids)
    for near, found in zip((keys, keys, turned), stores[1:], strict=True):
        kernel.demote(near, turned, found, *ids)
        assert same(found._replace(keys=found.keys.contiguous()), stores[0])


def test_what_does_not_fit_is_refused() -> None:
    keys, ids = rows_of(16, 8, torch.float32), torch.tensor([1, 2])
    found, before = (make_store(6, 2, 8, (16, 16), "int8", 2, torch.float32) for _ in range(2))
    for wrong in (torch.tensor([1, 6]), torch.tensor([-7, 1])):
        with pytest.raises(IndexError):
            kernel.demote(keys, keys, found, wrong, ids)
    for call in ((keys, keys, found, ids, torch.tensor([1, 2, 3])), (keys[..., :12], keys, found, ids, ids)):
        with pytest.raises(RuntimeError, match="shape mismatch"):
            kernel.demote(*call)
    kernel.demote(keys, keys, found, ids[:0], ids[:0])
    assert same(found, before)
    with pytest.raises(IndexError):
        kernel.demote(keys, keys, found, ids, torch.tensor([1, 6]))


def test_the_cpu_chooses_it() -> None:
    place = ("demote", "cpu", torch.bfloat16)
    choices = dispatch.Dispatch(dispatch.TABLE)
    assert choices.resolve(*place) is not far_store.demote
    assert choices.chosen() == {"demote[cpu,bfloat16]": "native"}


def by_reciprocal(x: Tensor, levels: int) -> tuple[Tensor, Tensor]:
    scales = quantise(x, levels)[1]
    return torch.round(x.float() * (1 / scales.float())[..., None]).clamp(-levels, levels).to(torch.int8), scales


def half_up(x: Tensor, levels: int) -> tuple[Tensor, Tensor]:
    scales = quantise(x, levels)[1]
    return torch.floor(x.float() / scales.float()[..., None] + 0.5).clamp(-levels, levels).to(torch.int8), scales


def scale_beside(x: Tensor, levels: int) -> tuple[Tensor, Tensor]:
    units, scales = quantise(x, levels)
    return units, (scales.view(torch.int16) + 1).view(torch.float16)


@pytest.mark.parametrize(
    ("operation", "faulty"),
    [
        ("quantise", by_reciprocal),
        ("quantise", half_up),
        ("quantise", scale_beside),
        ("_upward", lambda x, unit: torch.round(x / unit)),
    ],
)
def test_teeth(operation: str, faulty: Callable[..., object], monkeypatch: pytest.MonkeyPatch) -> None:
    """One planted fault at a time is seen by the same comparison over the same blocks."""
    blocks, store = (halves(0.4484, 127), "int8") if operation == "quantise" else (beside_whole(0.0123), "native")
    assert same(*both(blocks, blocks, store, 2))
    monkeypatch.setattr(reference_sparse, operation, faulty)
    assert not same(*both(blocks, blocks, store, 2))
