"""Demotion and choice on the GPU's kernels: the bytes and the choices of the reference, ties, bad values, and what they must not touch."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

pytest.importorskip("triton")

import triton
import triton.language as tl

from service.kernels import reference_sparse
from service.kernels.gpu import choose_far, far_store
from service.kernels.gpu.choose_far import best_of
from service.kernels.native import binding
from service.kernels.native.window_sparse import choose_far as native_choose_far
from service.kernels.reference_sparse import FarBlocks
from tests.kernels.gpu.conftest import COMPILED, DEVICE, DTYPES, FAR_BLOCK, FarApart, needs_e4m3, past_int32
from tests.kernels.sparse_batches import choosing_faults, make_sparse, make_store, permuted


def placed(store: FarBlocks) -> FarBlocks:
    return FarBlocks(*(None if tensor is None else tensor.to(DEVICE) for tensor in store))


def same(one: FarBlocks, other: FarBlocks) -> bool:
    pairs = [(a, b) for a, b in zip(one, other, strict=True) if a is not None and b is not None]
    return all(torch.equal(a.cpu().nan_to_num(nan=9.0), b.cpu().nan_to_num(nan=9.0)) for a, b in pairs)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("store", ["int8", "int4", "native"])
@pytest.mark.parametrize("size", [16, 24])
def test_demoted_blocks_are_those_of_the_reference_byte_for_byte(size: int, store: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    spread = torch.logspace(-3, 3, 16)[:, None]
    keys, values = (torch.randn(5, 2, 16, size) * spread).to(dtype), torch.randn(5, 2, 16, 12).to(dtype)
    keys[1], keys[3, 0, 5, 3] = 0, float("inf")
    ids = torch.tensor([4, 1, 3]), torch.tensor([1, 3, 4])
    actual = placed(make_store(6, 2, 16, (size, 12), store, 4, dtype))
    expected = make_store(6, 2, 16, (size, 12), store, 4, dtype)
    far_store.demote(keys.to(DEVICE), values.to(DEVICE), actual, *(tensor.to(DEVICE) for tensor in ids))
    reference_sparse.demote(keys, values, expected, *ids)
    # Bounds of a block with an infinite key may be anything: whoever reads the key gets what is not finite.
    sound = [0, 1, 2, 3, 5]
    one, other = (FarBlocks(*(None if tensor is None else tensor[sound] for tensor in far)) for far in (actual, expected))
    assert same(one, other)
    if actual.key_scales is not None:
        assert torch.equal(actual.key_scales[4].cpu(), expected.key_scales[4]) and actual.key_scales[4, 0, 5] == torch.inf


@pytest.mark.parametrize(("store", "size"), [("int8", 64), ("int4", 80), ("native", 96), ("int8", 256)])
def test_head_sizes_of_models(store: str, size: int) -> None:
    torch.manual_seed(3)
    keys, values = (torch.randn(3, 1, 64, size).to(torch.float16) for _ in range(2))
    expected, ids = make_store(3, 1, 64, (size, size), store, 4, torch.float16), (torch.tensor([2]), torch.tensor([1]))
    actual = FarBlocks(*(None if tensor is None else tensor.clone().to(DEVICE) for tensor in expected))
    far_store.demote(keys.to(DEVICE), values.to(DEVICE), actual, *(tensor.to(DEVICE) for tensor in ids))
    reference_sparse.demote(keys, values, expected, *ids)
    assert same(actual, expected)


@pytest.mark.parametrize("part", FarBlocks._fields)
def test_one_value_off_is_seen(part: str) -> None:
    """A bit of a stored number, a scale by 2 %; and a scale that nobody owns."""
    torch.manual_seed(4)
    keys, values = (torch.randn(2, 1, 16, 16, device=DEVICE) for _ in range(2))
    ids = torch.tensor([1], device=DEVICE), torch.tensor([1], device=DEVICE)
    found, expected = (placed(make_store(3, 1, 16, (16, 16), "int8", 4, torch.float32)) for _ in range(2))
    for store in (found, expected):
        far_store.demote(keys, values, store, *ids)
    expected = FarBlocks(*(None if tensor is None else tensor.cpu() for tensor in expected))
    assert same(found, expected)
    tensor = getattr(found, part)
    scaled = tensor.is_floating_point()
    for block in (1, 2) if scaled else (1,):
        first = tensor[block].view(-1)[:1]
        before = first.clone()
        first.copy_((first * 1.02).nan_to_num(nan=0.0) if scaled else first ^ 1)
        assert not same(found, expected)
        first.copy_(before)
    assert same(found, expected)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**6), st.floats(1e-9, 1e5))
def test_any_scale_gives_the_bytes_of_the_reference(seed: int, factor: float) -> None:
    keys = torch.randn(1, 1, 16, 16, generator=torch.Generator().manual_seed(seed)) * factor
    actual, expected = (
        placed(make_store(2, 1, 16, (16, 16), "int8", 2, torch.float32)),
        make_store(2, 1, 16, (16, 16), "int8", 2, torch.float32),
    )
    ids = torch.tensor([0]), torch.tensor([1])
    far_store.demote(keys.to(DEVICE), keys.to(DEVICE), actual, *(tensor.to(DEVICE) for tensor in ids))
    reference_sparse.demote(keys, keys, expected, *ids)
    assert same(actual, expected)


@needs_e4m3
@pytest.mark.parametrize("store", ["int8", "int4"])
def test_near_blocks_in_eight_bits_are_demoted_as_what_they_widen_to(store: str) -> None:
    torch.manual_seed(1)
    keys, values = (torch.randn(4, 2, 16, 32, device=DEVICE).to(torch.float8_e4m3fn) for _ in range(2))
    ids = torch.tensor([1, 3], device=DEVICE), torch.tensor([2, 1], device=DEVICE)
    found, expected = (placed(make_store(4, 2, 16, (32, 32), store, 4, torch.float32)) for _ in range(2))
    far_store.demote(keys, values, found, *ids)
    far_store.demote(keys.float(), values.float(), expected, *ids)
    assert same(found, placed(expected)) and found.keys[ids[1]].any()


@pytest.mark.parametrize("store", ["int8", "int4", "native"])
def test_blocks_far_past_int32_elements_are_demoted(store: str, far_apart: FarApart) -> None:
    torch.manual_seed(2)
    keys, values = (torch.randn(4, 2, 16, 16).to(torch.float16) for _ in range(2))
    expected, ids = make_store(4, 2, 16, (16, 16), store, 4, torch.float16), (torch.tensor([3, 1]), torch.tensor([1, 2]))
    actual, near = far_apart.store(expected), [far_apart.place(tensor) for tensor in (keys, values)]
    far_store.demote(*near, actual, *(FAR_BLOCK + tensor.to(DEVICE) for tensor in ids))
    reference_sparse.demote(keys, values, expected, *ids)
    assert same(FarBlocks(*(None if tensor is None else tensor[FAR_BLOCK:] for tensor in actual)), expected)


def test_nothing_to_demote_and_other_layouts() -> None:
    store = placed(make_store(2, 1, 16, (16, 16), "int8", 2, torch.float32))
    keys, none = torch.zeros(2, 1, 16, 16, device=DEVICE), torch.zeros(0, dtype=torch.int64, device=DEVICE)
    far_store.demote(keys, keys, store, none, none)
    with pytest.raises(ValueError, match="contiguous"):
        far_store.demote(keys, keys, store._replace(bounds=store.bounds.transpose(2, 3)), none, none)


def choices_of(call: Any) -> tuple[Tensor, Tensor]:
    positional = (call.query, call.tables, call.sequences, call.candidate_ends, call.budgets)
    query, tables, sequences, ends, budgets = (tensor.to(DEVICE) for tensor in positional)
    chosen = choose_far.choose_far(
        query, placed(call.blocks), tables, sequences, ends, budgets, sink_blocks=call.sink_blocks, most=call.most
    )
    return chosen[0].cpu(), chosen[1].cpu()


@pytest.mark.parametrize("store", ["int8", "int4", "native"])
@pytest.mark.parametrize("budget", [1, 2, 3, 20])
def test_choices_are_those_of_the_reference(store: str, budget: int) -> None:
    batch = make_sparse([150, 30, 200, 101], [1, 1, 5, 1], window=16, budget=budget, store=store, seed=budget)
    assert batch.choosing is not None
    expected = batch.choosing.run()
    chosen = choices_of(batch.choosing)
    assert torch.equal(chosen[0], expected[0]) and torch.equal(chosen[1], expected[1])
    assert expected[1].max() == min(budget, int(batch.choosing.candidate_ends.max()) - 1)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "size", "store"), [(8, 2, 64, "int8"), (3, 1, 80, "int4"), (7, 1, 96, "native"), (8, 1, 256, "int8")]
)
def test_choices_of_head_shapes(heads: int, kv_heads: int, size: int, store: str) -> None:
    call = make_sparse([150, 90], [1, 1], heads=heads, kv_heads=kv_heads, size=size, window=16, store=store).choosing
    assert call is not None
    found, expected = choices_of(call), call.run()
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])


# Query and K/V heads; groups that are no power of two, too.
GROUPS = ((1, 1), (4, 2), (3, 1), (5, 1))


@pytest.mark.parametrize("store", ["int8", "int4"])
@pytest.mark.parametrize(("heads", "kv_heads"), GROUPS)
def test_anchors_in_tiles_choose_what_each_chooses_alone(heads: int, kv_heads: int, store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Anchors of three sequences, of which tiles hold one or more; scores are those of one anchor's kernels, bit for bit."""
    monkeypatch.setattr(choose_far, "TILE_ROWS", 4 << (heads // kv_heads - 1).bit_length())  # four anchors
    shape = {"heads": heads, "kv_heads": kv_heads, "window": 16, "store": store, "seed": heads}
    call = make_sparse([120, 150, 90], [3, 9, 2], refresh=1, budget=2, **shape).choosing
    assert call is not None and choose_far.FEWEST_ANCHORS == 4  # Runs of three are left to the kernels of one anchor.
    budgets = 1 + torch.arange(len(call.query), dtype=torch.int32) % 3
    mixed = replace(call, budgets=budgets, most=3)
    found, expected = choices_of(mixed), mixed.run()
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])
    for scores in zip(scores_of(mixed, tiled=True), scores_of(mixed, tiled=False), strict=True):
        assert torch.equal(*scores)


def scores_of(call: Any, tiled: bool) -> tuple[Tensor, Tensor]:
    """What candidates are kept, and the highest products of their keys, 0 where there are none."""
    tensors = (tensor.to(DEVICE) for tensor in (call.tables, call.sequences, call.candidate_ends, call.budgets))
    compared = reference_sparse.SECOND_STAGE * call.most
    asked = choose_far._Asked(call.query.to(DEVICE), placed(call.blocks), *tensors, call.sink_blocks, compared)
    if not tiled:
        asked = type("Alone", (choose_far._Asked,), {"tile": 0})(*asked)
    assert bool(asked.tile) == tiled
    steps = choose_far._steps(asked)
    kept = choose_far._keep_by_bounds(asked, steps)
    products = choose_far._compare_keys(asked, steps, kept)
    candidates = (call.candidate_ends - call.sink_blocks).clamp(min=0)
    counts = torch.minimum(reference_sparse.SECOND_STAGE * call.budgets, candidates) * (candidates > call.budgets)
    there = (torch.arange(compared) < counts[:, None])[:, None].expand(kept.shape)
    return kept.cpu().where(there, -1), products.cpu().where(there, 0.0)


@pytest.mark.skipif(binding.absent() is not None, reason="no compiled CPU kernels here")
@pytest.mark.parametrize("seed", [0, 1])
def test_choices_are_those_of_the_compiled_cpu_kernels(seed: int) -> None:
    """Queries whose heads differ by powers of ten, so that the unit that they share leaves little of some."""
    call = make_sparse([400], [24], refresh=1, budget=4, heads=4, kv_heads=2, size=32, window=16, seed=seed).choosing
    assert call is not None and call.candidate_ends.max() > 4 * call.most + 4
    loud = replace(call, query=call.query * torch.logspace(-2, 1, 4)[:, None])
    found, expected = choices_of(loud), loud.run(native_choose_far)
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])


# One fault for each kernel where they are interpreted, which takes a second each.
FAULTS = ("bounds of blocks", "bounds of parts", "keys", "budgets")


@pytest.mark.parametrize("tiled", [False, True])
@pytest.mark.parametrize("store", ["int8", "int4", "native"] if COMPILED else ["int4"])
def test_a_fault_in_what_any_stage_reads_is_seen(store: str, tiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choose_far, "FEWEST_ANCHORS", 1 if tiled else 1000)
    shape = {"budget": 3} if COMPILED else {"budget": 2, "heads": 2, "kv_heads": 1}
    call = make_sparse([400 if COMPILED else 180], [24 if COMPILED else 2], refresh=1, store=store, **shape).choosing
    assert call is not None and call.candidate_ends.max() > 4 * call.most + 4
    expected = call.run()
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(choices_of(call), expected, strict=True))
    for fault, wrong in choosing_faults(call).items():
        if COMPILED or fault in FAULTS:
            found = choices_of(wrong)
            assert not (torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])), fault


@pytest.mark.parametrize("store", ["int8", "int4", "native"])
def test_permuting_physical_blocks_changes_no_choice(store: str) -> None:
    batch = make_sparse([150], [1], window=16, heads=2, kv_heads=1, store=store, dtype=torch.float16)
    other = permuted(batch).choosing
    assert batch.choosing is not None and other is not None and not torch.equal(other.tables, batch.choosing.tables)
    for ours, theirs in zip(choices_of(other), choices_of(batch.choosing), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("store", ["int8", "int4", "native"])
def test_blocks_far_past_int32_elements_are_compared(store: str, far_apart: FarApart) -> None:
    call = make_sparse([150, 130], [1, 1], window=16, store=store, dtype=torch.float16, seed=3).choosing
    assert call is not None
    there = replace(call, blocks=far_apart.store(call.blocks), tables=past_int32(call.tables, len(call.blocks.bounds)))
    found, expected = choices_of(there), call.run()
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(-3, 3), min_size=1, max_size=24), st.integers(1, 5), st.integers(0, 2), st.booleans())
def test_ties_go_to_the_lower_index(strengths: list[int], budget: int, sinks: int, negative: bool) -> None:
    far = make_store(len(strengths) + 1, 1, 4, (2, 2), "native", 2, torch.float32)
    for index, strength in enumerate(strengths):
        keys = torch.zeros(1, 1, 4, 2)
        keys[0, 0, :2] = strength
        reference_sparse.demote(keys, keys, far, torch.tensor([0]), torch.tensor([index + 1]))
    query = torch.tensor([[[1.0, 0.0]]]) * (-1 if negative else 1)
    tables = torch.arange(1, len(strengths) + 3, dtype=torch.int32)[None]
    tensors = (tables, torch.tensor([0]), torch.tensor([len(strengths)], dtype=torch.int32), torch.tensor([budget], dtype=torch.int32))
    chosen = choose_far.choose_far(query.to(DEVICE), placed(far), *(tensor.to(DEVICE) for tensor in tensors), sink_blocks=sinks, most=5)
    expected = reference_sparse.choose_far(query, far, *tensors, sink_blocks=sinks, most=5)
    assert torch.equal(chosen[0].cpu(), expected[0]) and torch.equal(chosen[1].cpu(), expected[1])


@triton.jit
def best_kernel(p_scores, p_best, valid, count, SIZE: tl.constexpr):
    """What `best_of` takes of the first `valid` scores."""
    o_index = tl.arange(0, SIZE)
    b_best = best_of(tl.load(p_scores + o_index), o_index < valid, count)
    tl.store(p_best + o_index, b_best.to(tl.int32))


@pytest.mark.parametrize(("size", "valid"), [(2, 1), (64, 64), (128, 77), (256, 256), (2048, 1500), (4096, 4096)])
@pytest.mark.parametrize("count", [0, 1, 16, 50, 5000])
def test_the_best_of_any_number(size: int, valid: int, count: int) -> None:
    """Each with each, three bits at a time and bit by bit: scores of both signs, infinite ones, zeros of both signs, and many ties."""
    generator = torch.Generator().manual_seed(size + count)
    scores = torch.randn(size, generator=generator)
    scores[::3] = scores[::3].round()
    scores[1::7] = 0.0
    scores[2::7] = -0.0
    scores[size // 2] = float("inf")
    scores[size - 1] = float("-inf")
    found = torch.empty(size, dtype=torch.int32, device=DEVICE)
    best_kernel[(1,)](scores.to(DEVICE), found, valid, count, SIZE=size)
    order = scores[:valid].sort(descending=True, stable=True).indices[:count]
    expected = torch.zeros(size, dtype=torch.int32)
    expected[order] = 1
    assert torch.equal(found.cpu(), expected)


def test_no_anchors_give_no_choices() -> None:
    far = placed(make_store(3, 2, 4, (2, 2), "int8", 2, torch.float32))
    none = torch.zeros(0, dtype=torch.int32, device=DEVICE)
    choices, counts = choose_far.choose_far(
        torch.zeros(0, 4, 2, device=DEVICE),
        far,
        torch.zeros(1, 5, dtype=torch.int32, device=DEVICE),
        none,
        none,
        none,
        sink_blocks=1,
        most=3,
    )
    assert choices.shape == (0, 2, 3) and counts.shape == (0,)
