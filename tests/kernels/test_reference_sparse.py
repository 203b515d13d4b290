"""The references of the two-store path against their definitions: quantisation, true bounds, the choice, equality with dense attention."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from service.kernels import reference_sparse as sparse
from tests.kernels.conftest import check_close
from tests.kernels.sparse_batches import LEVELS, make_sparse, make_store

MIXED = ([77, 1, 96, 0, 21, 64, 130], [1, 1, 30, 0, 21, 1, 3])


def rows_of(*shape: int, seed: int = 0) -> Tensor:
    spread = torch.logspace(-3, 3, shape[-2])[:, None]
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * spread


@pytest.mark.parametrize("levels", [127, 7])
def test_quantised_rows_are_within_half_a_unit(levels: int) -> None:
    x = rows_of(3, 40, 16)
    units, scales = sparse.quantise(x, levels)
    assert units.dtype == torch.int8 and scales.dtype == torch.float16 and units.abs().max() == levels
    unit = scales.float()[..., None]
    # Half a unit, and what rounding the scale to float16 takes from the largest values.
    assert ((units.float() * unit - x).abs() <= unit * 0.5 + x.abs() * 2**-10).all()


def test_zero_rows_have_scale_zero_and_bad_rows_stay_bad() -> None:
    x = torch.zeros(3, 8)
    x[1, 2], x[2, 3] = torch.nan, torch.inf
    units, scales = sparse.quantise(x, 127)
    assert scales[0] == 0 and not units[0].any()
    back = sparse.dequantise(units, scales)
    assert torch.equal(back[0], torch.zeros(8)) and torch.isnan(back[1:]).all()


def test_nibbles_keep_their_order() -> None:
    x = torch.tensor([[-7, 7, 0, 3, -1, -8, 5, 1]], dtype=torch.int8)
    packed = sparse.pack_nibbles(x)
    assert packed.dtype == torch.uint8 and packed[0, 0] == 0x79
    assert torch.equal(sparse.unpack_nibbles(packed), x)


@pytest.mark.parametrize("store", ["int8", "int4", "native"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_demoted_blocks_and_their_bounds(store: str, dtype: torch.dtype) -> None:
    keys, values = rows_of(5, 2, 16, 8, seed=1).to(dtype), rows_of(5, 2, 16, 12, seed=2).to(dtype)
    far = make_store(4, 2, 16, (8, 12), store, 4, dtype)
    sparse.demote(keys, values, far, torch.tensor([4, 2]), torch.tensor([1, 3]))
    for near, target in ((4, 1), (2, 3)):
        back = sparse.dequantise(far.keys[target], None if far.key_scales is None else far.key_scales[target])
        back_values = sparse.dequantise(far.values[target], None if far.value_scales is None else far.value_scales[target])
        if store == "native":
            assert torch.equal(back, keys[near]) and torch.equal(back_values, values[near])
        else:
            units, scales = sparse.quantise(keys[near], LEVELS[store])
            assert torch.equal(back, units.float() * scales.float()[..., None])
            assert (back_values - values[near].float()).abs().max() < values[near].float().abs().max() / LEVELS[store]
        bounds = (
            torch.cat((far.bounds[target, :, None], far.part_bounds[target]), dim=1).float()
            * far.bound_scales[target].float()[:, None, None, None]
        )
        parts = torch.cat((back.float().amax(1, keepdim=True), back.float().view(2, 4, 4, 8).amax(2)), dim=1)
        floors = torch.cat((back.float().amin(1, keepdim=True), back.float().view(2, 4, 4, 8).amin(2)), dim=1)
        unit = far.bound_scales[target].float()[:, None, None]
        assert (bounds[:, :, 0] >= parts).all() and (bounds[:, :, 0] < parts + unit * 1.001).all()
        assert (bounds[:, :, 1] <= floors).all() and (bounds[:, :, 1] > floors - unit * 1.001).all()
    untouched = make_store(4, 2, 16, (8, 12), store, 4, dtype)
    for after, before in zip(far, untouched, strict=True):
        if after is not None and before is not None:
            assert torch.equal(after[[0, 2]].nan_to_num(), before[[0, 2]].nan_to_num())


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10**6), st.floats(1e-9, 1e5))
def test_bounds_are_true_for_any_scale(seed: int, factor: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    keys = torch.randn(1, 8, 5, generator=generator) * factor
    bounds, scales = sparse.key_bounds(keys, 2)
    real = bounds.double() * scales.double()[:, None, None, None]
    assert (real[:, 0, 0] >= keys.double().amax(1)).all() and (real[:, 0, 1] <= keys.double().amin(1)).all()
    query = torch.randn(3, 5, generator=generator)
    far = sparse.FarBlocks(keys[None], keys[None], None, None, bounds[None, :, 0], bounds[None, :, 1:], scales[None])
    products = (query.double() @ keys[0].double().T).amax(0)
    highest = torch.cat((products.max()[None], products.view(2, 4).amax(1)))
    assert (sparse.bound_scores(query, far, 0, 0).double() >= highest - 1e-5 * highest.abs()).all()


def test_the_rule_of_the_window() -> None:
    assert [sparse.near_start(position, 20, 4, 8) for position in (0, 19, 26, 27, 28, 35, 36)] == [0, 0, 0, 0, 1, 1, 2]
    assert sparse.near_start(27, 20, 1, 8) == 1


class TestChoice:
    def planted(self, strengths: list[float], subs: list[float] | None = None) -> sparse.FarBlocks:
        """One K/V head of one feature; block i's keys reach strengths[i], the second half of its tokens subs[i]."""
        far = make_store(len(strengths) + 1, 1, 4, (2, 2), "native", 2, torch.float32)
        for index, strength in enumerate(strengths):
            keys = torch.zeros(1, 1, 4, 2)
            keys[0, 0, :2, 0] = strength
            keys[0, 0, 2:, 1] = 0 if subs is None else subs[index]
            sparse.demote(keys, keys, far, torch.tensor([0]), torch.tensor([index + 1]))
        return far

    def choose(self, far: sparse.FarBlocks, query: Tensor, end: int, budget: int, sinks: int = 0) -> list[int]:
        tables = torch.arange(1, 20, dtype=torch.int32)[None]
        calls = torch.tensor([0]), torch.tensor([end], dtype=torch.int32), torch.tensor([budget], dtype=torch.int32)
        choices, counts = sparse.choose_far(query[None], far, tables, *calls, sink_blocks=sinks, most=6)
        assert choices.dtype == counts.dtype == torch.int32 and (choices[0, :, int(counts[0]) :] == -1).all()
        return choices[0, 0, : int(counts[0])].tolist()

    def test_the_strongest_in_ascending_order(self) -> None:
        far, query = self.planted([1, 9, 3, 7, 5]), torch.tensor([[1.0, 0.0]])
        assert self.choose(far, query, 5, 2) == [1, 3]
        assert self.choose(far, query, 3, 2) == [1, 2]
        assert self.choose(far, query, 5, 2, sinks=2) == [3, 4]

    def test_no_more_candidates_than_the_budget_are_all_chosen(self) -> None:
        far = self.planted([1, 9, 3, 7, 5])
        assert self.choose(far, torch.tensor([[-1.0, 0.0]]), 5, 6) == [0, 1, 2, 3, 4]
        assert self.choose(far, torch.tensor([[1.0, 0.0]]), 0, 6) == []
        assert self.choose(far, torch.tensor([[1.0, 0.0]]), 1, 6, sinks=3) == []

    def test_ties_go_to_the_lower_index(self) -> None:
        assert self.choose(self.planted([4, 4, 4, 4, 4]), torch.tensor([[1.0, 0.0]]), 5, 3) == [0, 1, 2]

    def test_sub_blocks_decide_among_what_the_block_bounds_keep(self) -> None:
        # Block 0 reaches 8 + 8 only in different halves; block 1 reaches 10 in one.
        far = self.planted([8, 10, 0, 0, 0, 0], [8, 0, 0, 0, 0, 0])
        assert self.choose(far, torch.tensor([[1.0, 1.0]]), 2, 1) == [1]
        # Of six candidates the first stage keeps four.
        far = self.planted([5, 5, 5, 5, 9, 6], [5, 5, 5, 5, 0, 0])
        assert self.choose(far, torch.tensor([[1.0, 1.0]]), 6, 1) == [0]

    def test_keys_decide_among_what_the_sub_block_bounds_keep(self) -> None:
        # One token of block 0 reaches 9 in one feature, its neighbour in the other: no key has both. Block 1 has a key with both.
        far = self.planted([0, 0, 5, 5], [0, 0, 0, 0])
        for block, rows in ((1, [[9.0, 0.0], [0.0, 9.0]] * 2), (2, [[7.0, 7.0]] * 4)):
            keys = torch.tensor(rows)[None, None]
            sparse.demote(keys, keys, far, torch.tensor([0]), torch.tensor([block]))
        assert self.choose(far, torch.tensor([[1.0, 1.0]]), 4, 1) == [1]
        # Behind three better bounds nobody looks at its keys.
        keys = torch.tensor([[9.0, 0.0], [0.0, 9.0]] * 2)[None, None]
        for block in (2, 3):
            sparse.demote(keys, keys, far, torch.tensor([0]), torch.tensor([block]))
        keys = torch.tensor([[8.0, 8.0]] * 4)[None, None]
        sparse.demote(keys, keys, far, torch.tensor([0]), torch.tensor([1]))
        assert self.choose(far, torch.tensor([[1.0, 1.0]]), 4, 1) == [0]

    def test_heads_of_a_group_choose_together(self) -> None:
        far = self.planted([6, 0, 5], [0, 6, 5])
        assert self.choose(far, torch.tensor([[1.0, 0.0]]), 3, 1) == [0]
        assert self.choose(far, torch.tensor([[0.0, 1.0]]), 3, 1) == [1]
        # What one head alone looks for is found, though block 2 has more for both together.
        keys = torch.tensor([4.0, 4.0]).expand(1, 1, 4, 2).contiguous()
        sparse.demote(keys, keys, far, torch.tensor([0]), torch.tensor([3]))
        assert self.choose(far, torch.tensor([[1.0, 0.0], [0.0, 1.0]]), 3, 2) == [0, 1]


@pytest.mark.parametrize("store", ["int8", "int4", "native"])
@pytest.mark.parametrize("scoring", [{}, {"softcap": 1.5}, {"sink_logits": torch.tensor([0.5, -3.0, 4.0, 0.0])}, {"value_size": 24}])
def test_within_the_budget_it_equals_dense_attention_over_the_same_stores(store: str, scoring: dict[str, object]) -> None:
    batch = make_sparse(*MIXED, budget=20, store=store, **scoring)
    if batch.choosing is not None:
        assert batch.choosing.candidate_ends.max() > 10
    # Rows of a prefill slice that still see a block in the near store read it there.
    if store == "native":
        check_close(batch.reference().float(), batch.dense().float(), torch.float32)
    decoding = make_sparse(MIXED[0], [min(count, 1) for count in MIXED[1]], budget=20, store=store, **scoring)
    check_close(decoding.reference().float(), decoding.dense(stored=True).float(), torch.float32)


@pytest.mark.parametrize("store", ["int8", "evict"])
def test_inside_the_window_it_equals_dense_attention(store: str) -> None:
    batch = make_sparse([20, 7, 18], [20, 1, 5], store=store)
    check_close(batch.reference().float(), batch.dense().float(), torch.float32)


def test_chosen_blocks_matter_and_evicting_reads_none() -> None:
    batch = make_sparse(*MIXED)
    assert batch.far is not None and int(batch.far.counts.max()) == 2
    without = make_sparse(*MIXED, store="evict").reference()
    assert not torch.allclose(batch.reference(), without, atol=1e-3)
    none = batch.far._replace(counts=batch.far.counts * 0)
    assert torch.equal(batch.run(far=none, query=batch.query.double()), batch.run(far=None, query=batch.query.double()))


def test_what_is_not_to_be_read_is_poisoned() -> None:
    batch = make_sparse(*MIXED)
    assert torch.isnan(batch.key_blocks).any() and torch.isfinite(batch.run()).all()


@pytest.mark.parametrize("chunk", [1, 3, 8])
def test_slices_do_not_show(chunk: int) -> None:
    """The rows of a sequence of 90 tokens are the same whichever slice computes them."""
    whole = make_sparse([90], [90], budget=3).reference()
    for start in range(60, 90, chunk):
        end = min(start + chunk, 90)
        part = make_sparse([90], [90], budget=3)
        sliced = replace(
            part,
            query=part.query[start:end],
            query_starts=torch.tensor([0, end - start], dtype=torch.int32),
            context_lengths=torch.tensor([end], dtype=torch.int32),
            far=None if part.far is None else part.far._replace(anchors=part.far.anchors[start:end]),
        )
        assert torch.equal(sliced.reference(), whole[start:end])
