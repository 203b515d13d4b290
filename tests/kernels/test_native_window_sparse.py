"""Compiled window + far attention and choosing against the references: stores, types, instruction sets, poison, the same bits, teeth."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from service.kernels.native import attention
from service.kernels.native import window_sparse as kernel
from service.kernels.reference_sparse import choose_far, demote
from tests.kernels.conftest import check_close, multiplies_pairs, needs_native
from tests.kernels.sparse_batches import SparseBatch, choosing_faults, make_sparse, make_store, of_one_value, permuted

pytestmark = [needs_native, pytest.mark.usefixtures("nan_memory")]
MIXED = ([77, 1, 96, 0, 21, 64, 130, 300], [1, 1, 30, 0, 21, 1, 3, 1])
STORES = ("int8", "int4", "native", "evict")
CHOOSE = kernel.choose_far


def run(batch: SparseBatch, **changes: Any) -> torch.Tensor:
    return batch.run(kernel.window_sparse_attention, **changes)


def part(batch: SparseBatch, start: int, end: int) -> torch.Tensor:
    """Rows start … end − 1 of a batch of one sequence, all of whose tokens are queries."""
    far = None if batch.far is None else batch.far._replace(anchors=batch.far.anchors[start:end])
    lengths = {"query_starts": torch.tensor([0, end - start], dtype=torch.int32), "context_lengths": torch.tensor([end], dtype=torch.int32)}
    return run(batch, query=batch.query[start:end], far=far, **lengths)


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), 3.0])
@pytest.mark.parametrize("store", STORES)
def test_mixed_batch_equals_the_reference(store: str, poison: float, instructions: str) -> None:
    batch = make_sparse(*MIXED, store=store, poison=poison)
    check_close(run(batch), batch.reference(), torch.float32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("store", STORES)
def test_16_bits_are_computed_in_float32(store: str, dtype: torch.dtype, instructions: str) -> None:
    if multiplies_pairs(instructions, dtype):
        pytest.skip("rounds weights: see test_pairs.py")
    batch = make_sparse(*MIXED, store=store, dtype=dtype)
    check_close(run(batch), batch.reference(), dtype)


@pytest.mark.parametrize("refresh", [1, 2, 8])
@pytest.mark.parametrize("window", [1, 7, 8, 9, 16, 17, 63, 400])
def test_windows_and_anchors(window: int, refresh: int) -> None:
    batch = make_sparse(*MIXED, window=window, refresh=refresh)
    check_close(run(batch), batch.reference(), torch.float32)


@pytest.mark.parametrize("sinks", [0, 1, 3])
@pytest.mark.parametrize("budget", [1, 5, 100])
def test_sinks_and_budgets(budget: int, sinks: int) -> None:
    batch = make_sparse(*MIXED, budget=budget, sink_blocks=sinks)
    check_close(run(batch), batch.reference(), torch.float32)


@pytest.mark.parametrize("store", ["int8", "int4"])
@pytest.mark.parametrize("size", [8, 64, 80, 128])
@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (6, 2), (7, 1), (8, 1)])
def test_head_shapes(heads: int, kv_heads: int, size: int, store: str) -> None:
    batch = make_sparse([99, 60, 72], [1, 1, 9], heads=heads, kv_heads=kv_heads, size=size, store=store)
    check_close(run(batch), batch.reference(), torch.float32)


@pytest.mark.parametrize("store", ["int8", "int4"])
@pytest.mark.parametrize("scoring", [{"softcap": 1.5}, {"sink_logits": torch.tensor([0.5, -3.0, 4.0, 0.0])}, {"value_size": 24}])
def test_score_cap_sinks_and_wider_values(scoring: dict[str, Any], store: str) -> None:
    batch = make_sparse(*MIXED, store=store, **scoring)
    check_close(run(batch), batch.reference(), torch.float32)


@pytest.mark.parametrize("refresh", [1, 16])
@pytest.mark.parametrize("store", ["int8", "int4", "native"])
def test_the_same_bits_in_one_pass_in_pieces_and_one_by_one(store: str, refresh: int) -> None:
    """400 tokens in blocks of 64 cross splits of eight entries; rows meet within and across anchors."""
    whole = make_sparse([700], [700], budget=3, refresh=refresh, window=130, block_tokens=64, heads=5, kv_heads=1, size=64, store=store)
    expected = run(whole)
    for start, end in ((0, 700), (100, 101), (650, 651), (333, 349), (128, 420), (5, 699)):
        assert torch.equal(part(whole, start, end), expected[start:end])


def test_the_same_bits_in_a_batch_and_with_any_number_of_threads() -> None:
    batch = make_sparse(*MIXED)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 4):
            torch.set_num_threads(count)
            results.append(run(batch))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(results[0], other) for other in results[1:])


@pytest.mark.parametrize("contexts", [[20, 13, 8], [19], [9, 20]])
def test_what_lies_in_the_window_has_the_bits_of_dense_attention(contexts: list[int]) -> None:
    for counts in ([1] * len(contexts), contexts):
        batch = make_sparse(contexts, counts)
        arguments = (batch.query, batch.key_blocks, batch.value_blocks, batch.near_tables, batch.query_starts, batch.context_lengths)
        dense = attention.paged_attention(*arguments, scale=batch.scale, window=None)
        assert torch.equal(run(batch), dense) and torch.equal(run(batch, far=None), dense)


@pytest.mark.parametrize("store", ["int8", "int4", "native"])
def test_below_the_budget_it_is_dense_attention_over_both_stores(store: str) -> None:
    batch = make_sparse([300, 130], [1, 1], budget=100, store=store)
    check_close(run(batch), batch.dense(stored=True), torch.float32)
    if store == "native":
        slices = make_sparse([300, 130], [20, 130], budget=100, store=store)
        check_close(run(slices), slices.dense(), torch.float32)


def test_sequences_that_see_nothing() -> None:
    batch = make_sparse([0, 5], [1, 1])
    out = run(batch)
    assert not out[0].any() and out[1].any()


@pytest.mark.parametrize("sinks", [0, 1, 3])
@pytest.mark.parametrize("context", [19, 20, 21, 27, 28, 29, 35, 36, 37, 43, 44, 45, 51, 52, 53])
def test_around_the_window_the_sinks_and_the_budget(context: int, sinks: int) -> None:
    """A window of 20 tokens, and one to four blocks of 8 more."""
    batch = make_sparse([context, context], [1, 3], sink_blocks=sinks, budget=2)
    check_close(run(batch), batch.reference(), torch.float32)


@pytest.mark.parametrize("store", STORES)
def test_permuting_physical_blocks_changes_nothing(store: str) -> None:
    batch = make_sparse(*MIXED, store=store)
    other = permuted(batch)
    assert not torch.equal(other.near_tables, batch.near_tables) and torch.equal(run(other), run(batch))
    if batch.choosing is not None and other.choosing is not None:
        assert not torch.equal(other.choosing.tables, batch.choosing.tables)
        for ours, theirs in zip(other.choosing.run(CHOOSE), batch.choosing.run(CHOOSE), strict=True):
            assert torch.equal(ours, theirs)


@pytest.mark.parametrize("store", STORES)
def test_constant_values_come_out_unchanged(store: str) -> None:
    batch = make_sparse(*MIXED, store=store)
    out, seen = run(of_one_value(batch)), batch.reference().abs().sum(dim=(1, 2)) > 0
    assert seen.any()
    torch.testing.assert_close(out[seen], torch.full_like(out[seen], 0.75), rtol=1e-6, atol=0)


@pytest.mark.parametrize("wrong", ["scale", "values", "choice", "window", "sinks", "count"])
def test_teeth(wrong: str) -> None:
    """One planted fault at a time is seen by the same comparison."""
    batch = make_sparse(*MIXED)
    assert batch.far is not None
    blocks, far = batch.far.blocks, batch.far
    choices = far.choices.clone()
    choices[far.counts > 1, :, 1] = choices[far.counts > 1, :, 0]
    faults: dict[str, dict[str, Any]] = {
        "scale": {"far": far._replace(blocks=blocks._replace(key_scales=blocks.key_scales * 1.02))},  # type: ignore[operator]
        "values": {"far": far._replace(blocks=blocks._replace(value_scales=blocks.value_scales * 1.02))},  # type: ignore[operator]
        "choice": {"far": far._replace(choices=choices)},
        "window": {"window": 12},
        "sinks": {"sink_blocks": 0, "near_tables": torch.where(batch.near_tables > 0, batch.near_tables, 1).clamp(max=3)},
        "count": {"far": far._replace(counts=(far.counts - 1).clamp(min=0))},
    }
    with pytest.raises(AssertionError):
        check_close(run(batch, **faults[wrong]), batch.reference(), torch.float32)


def test_indices_of_another_type_are_refused() -> None:
    batch = make_sparse(*MIXED)
    assert batch.far is not None
    with pytest.raises(ValueError, match="anchors int64"):
        run(batch, far=batch.far._replace(anchors=batch.far.anchors.int()))


class TestChoosing:
    @pytest.mark.parametrize("budget", [1, 2, 5])
    @pytest.mark.parametrize("kv_heads", [1, 2, 4])
    @pytest.mark.parametrize("counts", [[1, 1, 1, 1], [40, 1, 0, 300], [0, 0, 0, 1]])
    def test_the_same_blocks_as_the_reference(self, counts: list[int], kv_heads: int, budget: int, instructions: str) -> None:
        contexts = [290, 77, 30, 300]
        call = make_sparse(contexts, counts, heads=4, kv_heads=kv_heads, budget=budget, refresh=8).choosing
        assert call is not None
        expected, found = call.run(), call.run(kernel.choose_far)
        assert torch.equal(found[1], expected[1]) and torch.equal(found[0], expected[0])
        assert found[0].dtype == found[1].dtype == torch.int32

    @pytest.mark.parametrize("store", ["int8", "int4", "native"])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    @pytest.mark.parametrize(("heads", "kv_heads", "block_tokens"), [(8, 1, 8), (14, 2, 16), (4, 2, 64)])
    def test_keys_of_every_store_and_many_heads(
        self, heads: int, kv_heads: int, block_tokens: int, dtype: torch.dtype, store: str, instructions: str
    ) -> None:
        # Enough anchors that a choice by bounds alone is another one in some.
        sizes = {"block_tokens": block_tokens, "window": 2 * block_tokens, "budget": 5}
        call = make_sparse([40 * block_tokens], [24], heads=heads, kv_heads=kv_heads, size=32, dtype=dtype, store=store, **sizes).choosing
        assert call is not None
        assert torch.equal(call.run(kernel.choose_far)[0], call.run()[0])

    def test_budgets_differ_within_a_call(self) -> None:
        call = make_sparse([300, 300, 120, 60], [9, 1, 1, 1], budget=6).choosing
        assert call is not None
        budgets = torch.arange(len(call.budgets), dtype=torch.int32) % 7
        expected, found = call.run(budgets=budgets), call.run(kernel.choose_far, budgets=budgets)
        assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])

    @pytest.mark.parametrize("size", [4, 20, 80])
    def test_key_sizes_that_fill_no_vector(self, size: int, instructions: str) -> None:
        call = make_sparse([300, 210], [3, 1], size=size, dtype=torch.float16).choosing
        assert call is not None
        assert torch.equal(call.run(kernel.choose_far)[0], call.run()[0])

    def test_ties_go_to_the_lower_index(self) -> None:
        far = make_store(12, 2, 8, (4, 4), "int8", 2, torch.float32)
        keys = torch.ones(1, 2, 8, 4)
        ids = torch.arange(1, 11)
        demote(keys, keys, far, torch.zeros(10, dtype=torch.int64), ids)
        tables = ids.flip(0).to(torch.int32)[None]
        call = torch.tensor([0]), torch.tensor([10], dtype=torch.int32), torch.tensor([3], dtype=torch.int32)
        choices, _ = kernel.choose_far(torch.randn(1, 4, 4), far, tables, *call, sink_blocks=1, most=4)
        assert choices.tolist() == [[[1, 2, 3, -1]] * 2]

    @pytest.mark.parametrize("levels", [0, 2, 40, 1000])
    @pytest.mark.parametrize("budget", [1, 20, 90, 149, 150, 599])
    def test_among_many_candidates_with_many_ties(self, budget: int, levels: int, instructions: str) -> None:
        """Keys of a block are all its strength, so blocks of one strength tie; every stage drops some at the lower budgets."""
        generator = torch.Generator().manual_seed(levels)
        strengths = torch.randint(-levels, levels + 1, (600,), generator=generator)
        far = make_store(601, 1, 4, (16, 16), "native", 2, torch.float32)
        keys, ids = strengths.float()[:, None, None, None].expand(600, 1, 4, 16), torch.arange(600)
        demote(keys, keys, far, ids, ids + 1)
        tables, heads = (ids + 1).flip(0).to(torch.int32)[None], torch.randn(3, 6, 16, generator=generator)
        ends, budgets = torch.tensor([600, 555, 600]), torch.full((3,), budget)
        call = heads, far, tables, torch.zeros(3, dtype=torch.int64), ends.to(torch.int32), budgets.to(torch.int32)
        for found, expected in zip(*(choose(*call, sink_blocks=1, most=budget) for choose in (CHOOSE, choose_far)), strict=True):
            assert torch.equal(found, expected)

    @pytest.mark.parametrize(("store", "sub_blocks", "kv_heads"), [("int8", 8, 1), ("int8", 2, 2), ("int4", 1, 3), ("native", 4, 6)])
    def test_anchors_choose_the_same_alone_and_together(self, store: str, sub_blocks: int, kv_heads: int, instructions: str) -> None:
        """Anchors of a sequence share what is packed: as many as come together, which the number of threads decides."""
        shape = {"heads": 6, "kv_heads": kv_heads, "sub_blocks": sub_blocks, "budget": 3, "refresh": 1}
        call = make_sparse([400, 260, 90], [70, 9, 1], store=store, **shape).choosing
        assert call is not None and len(call.query) == 80
        together, threads = call.run(CHOOSE), torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            assert all(torch.equal(ours, theirs) for ours, theirs in zip(call.run(CHOOSE), together, strict=True))
        finally:
            torch.set_num_threads(threads)
        for at in range(len(call.query)):
            one = {name: getattr(call, name)[at : at + 1] for name in ("query", "sequences", "candidate_ends", "budgets")}
            choices, counts = replace(call, **one).run(CHOOSE)
            assert torch.equal(choices[0], together[0][at]) and counts[0] == together[1][at]

    @pytest.mark.parametrize("value", [0.0, 1e-44, 1e-30, float("nan"), float("inf")])
    def test_queries_without_a_unit_choose_something_there(self, value: float, instructions: str) -> None:
        """Zeros tie and take the first; of what is not finite only the order and the range of the choice are told."""
        call = make_sparse([400, 300], [1, 1], budget=3).choosing
        assert call is not None
        query = torch.full_like(call.query, value)
        choices, _ = replace(call, query=query).run(CHOOSE)
        assert (choices.diff() > 0).all() and (choices >= 1).all() and (choices[..., -1] < call.candidate_ends[:, None]).all()
        if value == 0.0:
            assert choices.tolist() == [[[1, 2, 3]] * 2] * 2

    @pytest.mark.parametrize("store", ["int8", "int4", "native"])
    def test_teeth(self, store: str) -> None:
        """One planted fault at a time, in what each stage reads, is seen by the same comparison."""
        call = make_sparse([400], [24], budget=3, refresh=1, store=store).choosing
        assert call is not None and call.candidate_ends.max() > 2 * 4 * 3
        expected = call.run()
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(call.run(CHOOSE), expected, strict=True))
        for fault, wrong in choosing_faults(call).items():
            found = wrong.run(CHOOSE)
            assert not (torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])), fault

    def test_nothing_to_choose_from(self) -> None:
        call = make_sparse([5, 8], [1, 1]).choosing
        assert call is not None
        choices, counts = call.run(kernel.choose_far)
        assert not counts.any() and (choices == -1).all()


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 90), st.integers(0, 20)), min_size=1, max_size=5),
    st.integers(1, 40),
    st.sampled_from([1, 2, 4, 8]),
    st.integers(0, 2),
    st.integers(1, 6),
    st.sampled_from(["int8", "int4", "native"]),
)
def test_any_batch_equals_the_reference(
    sequences: list[tuple[int, int]], window: int, refresh: int, sinks: int, budget: int, store: str
) -> None:
    contexts, counts = [context for context, _ in sequences], [min(context, count) for context, count in sequences]
    if not sum(counts):
        counts[0] = min(1, contexts[0])
    batch = make_sparse(contexts, counts, window=window, refresh=refresh, sink_blocks=sinks, budget=budget, store=store)
    check_close(run(batch), batch.reference(), torch.float32)
