"""Attention over two stores on the GPU's kernels: the references, equality with dense attention bit for bit, slices, planted faults."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from service.kernels import reference_sparse, splits
from service.kernels.gpu import paged_attention, tile_visits, window_sparse
from service.kernels.gpu.paged_attention import FP8
from tests.kernels.gpu.conftest import COMPILED, DEVICE, DTYPES, FarApart, check_error, moved, needs_e4m3, past_int32, placed
from tests.kernels.sparse_batches import SparseBatch, make_sparse, of_one_value, permuted

MIXED = ([150, 1, 70, 17, 40], [1, 1, 6, 17, 1])
STORES = ("int8", "int4", "native", "evict")


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Splits of two blocks, and products that compute each row by itself: BLAS bits depend on where in a tile a row lies."""
    monkeypatch.setattr(paged_attention, "SPLIT_TOKENS", 32)
    monkeypatch.setattr(splits, "SPLIT_TOKENS", 32)
    if not COMPILED:
        monkeypatch.setattr(np, "matmul", lambda a, b, dtype: np.einsum("ij,jk->ik", a, b, dtype=dtype))
        monkeypatch.setattr(paged_attention, "tile_of", lambda dtype, size, capability: paged_attention.Tile(16, 4, 1))


def batch_of(contexts: list[int], counts: list[int], **changes: Any) -> SparseBatch:
    return make_sparse(contexts, counts, **({"block_tokens": 16, "window": 40} | changes))


def run(batch: SparseBatch, **changes: Any) -> Tensor:
    return moved(batch).run(window_sparse.window_sparse_attention, **changes).cpu()


def check(batch: SparseBatch) -> None:
    check_error(run(batch), batch.reference(), batch.run(), batch.query.dtype)


@pytest.mark.parametrize("refresh", [1, 4, 16])
@pytest.mark.parametrize("store", STORES)
def test_a_mixed_batch_equals_the_reference(store: str, refresh: int) -> None:
    check(batch_of(*MIXED, store=store, refresh=refresh))


@pytest.mark.parametrize("dtype", DTYPES[1:])
@pytest.mark.parametrize("store", STORES)
def test_sixteen_bits(store: str, dtype: torch.dtype) -> None:
    check(batch_of(*MIXED, store=store, dtype=dtype))


@needs_e4m3
@pytest.mark.parametrize("store", ["int8", "native"])
def test_eight_bits_have_the_bits_of_what_they_widen_to(store: str) -> None:
    batch = batch_of(*MIXED, store=store)
    far = batch.far
    assert far is not None
    if store == "native":
        blocks = far.blocks._replace(keys=far.blocks.keys.to(FP8), values=far.blocks.values.to(FP8))
        far = far._replace(blocks=blocks)
    narrow = replace(batch, key_blocks=batch.key_blocks.to(FP8), value_blocks=batch.value_blocks.to(FP8), far=far)
    wide_far = far._replace(blocks=far.blocks._replace(keys=far.blocks.keys.float(), values=far.blocks.values.float()))
    wide = replace(narrow, key_blocks=narrow.key_blocks.float(), value_blocks=narrow.value_blocks.float())
    found = run(narrow)
    assert found.isfinite().all() and torch.equal(found, run(replace(wide, far=wide_far if store == "native" else far)))


@pytest.mark.parametrize("store", STORES[:3])
@pytest.mark.parametrize(("heads", "kv_heads", "size"), [(3, 1, 80), (7, 1, 96), (2, 2, 128), (8, 2, 64), (8, 1, 256)])
def test_head_shapes(heads: int, kv_heads: int, size: int, store: str) -> None:
    check(batch_of([100, 66], [1, 3], heads=heads, kv_heads=kv_heads, size=size, store=store))


@pytest.mark.parametrize("scoring", [{"softcap": 1.5}, {"sink_logits": torch.tensor([0.5, -3.0, 4.0, 0.0])}, {"value_size": 24}])
def test_score_cap_sinks_and_wider_values(scoring: dict[str, Any]) -> None:
    check(batch_of(*MIXED, **scoring))


@pytest.mark.parametrize("sink_blocks", [0, 1, 3])
@pytest.mark.parametrize("context", [39, 40, 41, 55, 56, 57, 71, 72, 73, 87, 88, 89, 105])
def test_around_the_window_and_the_sinks(context: int, sink_blocks: int) -> None:
    check(batch_of([context, context], [1, 3], sink_blocks=sink_blocks))


@pytest.mark.parametrize("store", STORES[:3])
def test_blocks_far_past_int32_elements(store: str, far_apart: FarApart) -> None:
    """Near and far ones, read by a decoding row and by a tile."""
    batch = batch_of([102, 102], [1, 3], heads=2, kv_heads=1, store=store, dtype=torch.float16)
    assert batch.far is not None and (batch.far.counts == 2).all()
    blocks = len(batch.key_blocks)
    far = batch.far._replace(blocks=far_apart.store(batch.far.blocks), tables=past_int32(batch.far.tables, blocks))
    near = {"key_blocks": far_apart.place(batch.key_blocks), "value_blocks": far_apart.place(batch.value_blocks)}
    assert torch.equal(run(replace(batch, far=far, near_tables=past_int32(batch.near_tables, blocks), **near)), run(batch))


def test_what_an_earlier_sequence_left_is_not_read() -> None:
    """Behind each row's count its choices are found, behind the end of each table its blocks."""
    batch = batch_of([150, 1, 96], [1, 1, 3], heads=2, kv_heads=1, budget=3)
    far = batch.far
    assert far is not None and far.counts.tolist() == [3, 0, 2]
    left = torch.where(far.choices < 0, torch.arange(1, 4, dtype=torch.int32), far.choices)
    blocks = torch.arange(far.tables.shape[1], dtype=torch.int32) % (len(batch.key_blocks) - 1) + 1
    tables = [torch.where((table > 0) & (table < len(batch.key_blocks)), table, blocks) for table in (far.tables, batch.near_tables)]
    stale = far._replace(choices=left, tables=tables[0])
    assert torch.equal(run(replace(batch, far=stale, near_tables=tables[1])), run(batch))
    assert not torch.equal(run(replace(batch, far=stale._replace(counts=(far.counts + 1).clamp(max=3)))), run(batch))


@pytest.mark.parametrize("store", STORES)
def test_permuting_physical_blocks_changes_nothing(store: str) -> None:
    batch = batch_of(*MIXED, store=store, heads=2, kv_heads=1, dtype=torch.float16)
    other = permuted(batch)
    assert not torch.equal(other.near_tables, batch.near_tables) and torch.equal(run(other), run(batch))
    assert batch.far is None or (other.far is not None and not torch.equal(other.far.tables, batch.far.tables))


@pytest.mark.parametrize("store", STORES)
def test_constant_values_come_out_unchanged(store: str) -> None:
    batch = batch_of(*MIXED, store=store)
    out = run(of_one_value(batch))
    torch.testing.assert_close(out, torch.full_like(out, 0.75), rtol=1e-5, atol=0)


def test_inside_the_window_it_equals_plain_dense_attention_bit_for_bit() -> None:
    batch = batch_of([40, 33, 8], [1, 20, 1], window=64)
    tensors = (batch.query, batch.key_blocks, batch.value_blocks, batch.near_tables, batch.query_starts, batch.context_lengths)
    dense = paged_attention.paged_attention(*(tensor.to(DEVICE) for tensor in tensors), scale=batch.scale, window=None)
    assert torch.equal(run(batch), dense.cpu())


@pytest.mark.parametrize("store", STORES[:3])
def test_within_the_budget_it_equals_dense_attention_over_the_same_stores(store: str) -> None:
    batch = batch_of(*MIXED, budget=9, store=store)
    assert batch.choosing is not None and batch.choosing.candidate_ends.max() > 5
    check_error(run(batch), batch.dense(stored=True), batch.run(), torch.float32)


def test_native_within_the_budget_equals_plain_dense_attention_bit_for_bit() -> None:
    batch = batch_of([100, 70], [1, 6], budget=9, store="native")
    assert batch.far is not None
    keys = torch.cat((batch.key_blocks, batch.far.blocks.keys))
    values = torch.cat((batch.value_blocks, batch.far.blocks.values))
    tables = batch.near_tables.clone()
    for sequence in range(2):
        for index in batch.far_indices(sequence):
            tables[sequence, index] = len(batch.key_blocks) + batch.far.tables[sequence, index]
    tensors = (batch.query, keys, values, tables, batch.query_starts, batch.context_lengths)
    dense = paged_attention.paged_attention(*(tensor.to(DEVICE) for tensor in tensors), scale=batch.scale, window=None)
    assert torch.equal(run(batch), dense.cpu())


def cut(batch: SparseBatch, sequence: int, first: int, last: int) -> SparseBatch:
    """Rows first … last − 1 of the batch as a slice of their own: positions stay, so do the choices."""
    end = int(batch.context_lengths[sequence]) - (int(batch.query_starts[sequence + 1]) - last)
    far = None if batch.far is None else batch.far._replace(anchors=batch.far.anchors[first:last], tables=batch.far.tables[sequence][None])
    return replace(
        batch,
        query=batch.query[first:last],
        near_tables=batch.near_tables[sequence][None],
        query_starts=torch.tensor([0, last - first], dtype=torch.int32),
        context_lengths=torch.tensor([end], dtype=torch.int32),
        far=far,
    )


@pytest.mark.parametrize("dtype", DTYPES if COMPILED else DTYPES[:1])  # the interpreter has one order of sums
@pytest.mark.parametrize("refresh", [1, 4])
@pytest.mark.parametrize("size", [1, 3, 7])
def test_slices_equal_one_pass_bit_for_bit(size: int, refresh: int, dtype: torch.dtype) -> None:
    whole = batch_of([150], [10], refresh=refresh, heads=2, kv_heads=1, dtype=dtype)
    parts = [run(cut(whole, 0, start, min(start + size, 10))) for start in range(0, 10, size)]
    assert torch.equal(torch.cat(parts), run(whole))


def test_alone_equals_in_a_batch_bit_for_bit() -> None:
    batch = batch_of(*MIXED, refresh=4)
    together = run(batch)
    for sequence in range(len(MIXED[0])):
        first, last = batch.query_starts[sequence : sequence + 2].tolist()
        assert torch.equal(run(cut(batch, sequence, first, last)), together[first:last])


def test_only_chosen_blocks_are_read() -> None:
    batch = batch_of([150], [1])
    assert batch.far is not None
    chosen = batch.far.tables[0, batch.far.choices[0].flatten().long()]
    store = batch.far.blocks
    scales = torch.full_like(store.key_scales, float("nan"))
    scales[chosen.long()] = store.key_scales[chosen.long()]
    assert torch.equal(run(batch, far=placed(batch.far._replace(blocks=store._replace(key_scales=scales)))), run(batch))
    scales[int(chosen[0])] = float("nan")
    assert run(batch, far=placed(batch.far._replace(blocks=store._replace(key_scales=scales)))).isnan().any()


def test_a_plan_made_ahead_gives_the_same() -> None:
    batch = batch_of(*MIXED, refresh=4)
    tile, tokens = window_sparse.sparse_tile(torch.float32, 16, 2, 90, True)
    rule: dict[str, Any] = {"window": 40, "refresh": 4, "sink_blocks": 1}
    plan = window_sparse.plan_sparse(
        batch.near_tables.to(DEVICE), batch.query_starts, batch.context_lengths, far=None, block_tokens=16, **rule
    )
    most = splits.most_sparse_splits(40, 4, 16, 1, 2, 12)
    work = plan.sparse(tokens, most)
    # Rows 64 … 69 and 0 … 16 in runs of 8; three decoding rows, each with two splits before and three in its window.
    assert (tile.rows, tokens, work.tile_ends.tolist(), work.split_ends.tolist()) == (16, 8, [0, 0, 1, 4, 4], [5, 10, 10, 10, 15])

    assert torch.equal(run_planned(batch, plan), run(batch))


def test_a_plan_of_tiles_alone_decodes_in_them() -> None:
    batch = batch_of(*MIXED, refresh=4)
    rule: dict[str, Any] = {"window": 40, "refresh": 4, "sink_blocks": 1}
    plan = window_sparse.plan_sparse_tiles(
        batch.near_tables.to(DEVICE), batch.query_starts, batch.context_lengths, far=None, block_tokens=16, **rule
    )
    work = plan.sparse(4, 2)
    assert work.splits == 0 and work.tiles == 7 + sum(count == 1 for count in MIXED[1])
    found = run_planned(batch, plan)
    torch.testing.assert_close(found, run(batch), atol=1e-6, rtol=1e-5)


def run_planned(batch: SparseBatch, plan: object) -> Tensor:
    def attend(*tensors: Tensor, **options: Any) -> Tensor:
        placed_options = options | {"far": placed(options["far"]), "plan": plan}
        return window_sparse.window_sparse_attention(*(tensor.to(DEVICE) for tensor in tensors), **placed_options)

    return batch.run(attend).cpu()


@pytest.mark.parametrize("fault", ["window", "scale", "choice", "far scale"])
def test_planted_faults_are_seen(fault: str) -> None:
    batch = batch_of([150, 70], [1, 6])
    assert batch.far is not None
    store = batch.far.blocks
    changes: dict[str, dict[str, Any]] = {
        "window": {"window": batch.window - 16},
        "scale": {"scale": batch.scale * 1.02},
        "choice": {"far": placed(batch.far._replace(choices=(batch.far.choices - 1).clamp(min=1)))},
        "far scale": {"far": placed(batch.far._replace(blocks=store._replace(value_scales=store.value_scales * 1.02)))},
    }
    with pytest.raises(AssertionError):
        check_error(run(batch, **changes[fault]), batch.reference(), batch.run(), torch.float32)


def test_tiles_are_as_wide_as_they_fit() -> None:
    def found(kind: torch.dtype, size: int, group: int, chip: int = 90) -> tuple[tuple[int, int, int], int]:
        tile, tokens = window_sparse.sparse_tile(kind, size, group, chip, True)
        assert tokens * group <= tile.rows and tokens & (tokens - 1) == 0 and tokens <= tile_visits.MOST_TOKENS
        return tuple(tile), tokens

    assert found(torch.bfloat16, 64, 4) == ((128, 8, 3), 32)
    assert found(torch.bfloat16, 64, 2) == ((64, 4, 3), 32)
    assert found(torch.bfloat16, 64, 1) == ((32, 8, 3), 32)
    assert found(torch.bfloat16, 64, 7) == ((128, 8, 3), 16)
    assert found(torch.bfloat16, 64, 4, 80) == ((32, 8, 3), 8)
    assert found(torch.bfloat16, 128, 4) == ((128, 8, 3), 32)
    assert found(torch.bfloat16, 128, 32) == ((128, 8, 3), 4)
    assert found(torch.bfloat16, 128, 4, 80) == ((64, 8, 3), 16)
    assert found(torch.bfloat16, 256, 4) == ((64, 8, 2), 16)
    assert found(torch.bfloat16, 256, 4, 80) == ((16, 8, 1), 4)
    assert found(torch.float32, 128, 4) == ((8, 8, 1), 2)
    assert found(torch.float32, 128, 16) == ((16, 8, 1), 1)
    # Where nothing is far, those of dense attention.
    assert window_sparse.sparse_tile(torch.bfloat16, 128, 4, 90, False) == (paged_attention.Tile(128, 8, 3), 32)
    assert window_sparse.sparse_tile(torch.bfloat16, 64, 1, 80, False) == (paged_attention.Tile(128, 8, 3), 128)
    assert window_sparse.sparse_tile(torch.bfloat16, 128, 200, 90, False)[1] == 1


@pytest.mark.parametrize("sink_blocks", [0, 1, 2])
def test_rows_of_a_tile_may_differ_in_all_that_they_read(sink_blocks: int) -> None:
    """Tiles of eight tokens over starts of windows, the end of the sinks and counts of chosen blocks; splits begin where a row has them."""
    batch = batch_of([76, 130], [76, 60], heads=2, kv_heads=1, refresh=1, budget=3, sink_blocks=sink_blocks)
    far = batch.far
    assert far is not None
    counts = (far.counts - torch.arange(len(far.counts)) % 3).clamp(min=0).to(torch.int32)
    uneven = replace(batch, far=far._replace(counts=counts, choices=far.choices.masked_fill(torch.arange(3) >= counts[:, None, None], -1)))
    assert set(counts[far.anchors[76:].clamp(min=0)].tolist()) == {0, 1, 2, 3}
    together = run(uneven)
    check_error(together, uneven.reference(), uneven.run(), torch.float32)
    alone = [run(cut(uneven, 1, row, row + 1)) for row in (76, 89, 90, 91, 111, 135)]
    assert torch.equal(torch.cat(alone), together[[76, 89, 90, 91, 111, 135]])


def test_rows_that_no_program_owns_are_zero() -> None:
    """A slice longer than its context, and a sequence without rows: neither tiles nor splits."""
    batch = batch_of([0, 86], [40, 0])
    assert torch.equal(run(batch), torch.zeros_like(batch.query)) and torch.equal(batch.run(), torch.zeros_like(batch.query))


def test_whole_tiles_of_sixteen_bits_have_the_bits_of_single_rows() -> None:
    """Thirty-two tokens a tile, all bits of a visit's readers, across starts of windows."""
    batch = batch_of([170], [75], heads=2, kv_heads=1, refresh=1, budget=3, dtype=torch.float16)
    assert window_sparse.sparse_tile(torch.float16, 16, 2, 90, True)[1] == tile_visits.MOST_TOKENS == 32
    together = run(batch)
    check_error(together, batch.reference(), batch.run(), torch.float16)
    rows = (0, 1, 32, 33, 63, 64, 74)
    assert torch.equal(torch.cat([run(cut(batch, 0, row, row + 1)) for row in rows]), together[list(rows)])


def test_a_rule_without_an_order_of_sums_is_refused() -> None:
    """A refresh across blocks would begin windows of one tile two blocks apart; splits of no choice would have no end."""
    batch = batch_of([150], [1], heads=2, kv_heads=1)
    assert batch.far is not None
    for changes in ({"refresh": 7}, {"far": placed(batch.far._replace(budget=0))}):
        with pytest.raises(ValueError, match="must divide the block"):
            run(batch, **changes)


@pytest.mark.parametrize("sinks", [0, 1, 3])
@pytest.mark.parametrize("budget", [None, 1, 2, 5, 16])
def test_most_splits_bounds_those_of_every_row(budget: int | None, sinks: int) -> None:
    """Counted from where they begin: two blocks of the context, and before the window of a row's block as many more as `far_span` says."""
    for window, refresh in ((40, 1), (40, 16), (64, 4), (33, 8)):
        counts = []
        for position in range(1500):
            start, first = (reference_sparse.near_start(p, window, refresh, 16) for p in (position, position // 16 * 16))
            span = 2
            while budget is not None and first - sinks > budget and 4 * (first - sinks) > budget * span:
                span *= 2
            far = range(start if budget is not None else min(start, sinks))
            counts.append(len({block // span * span for block in far} | {block // 2 * 2 for block in range(start, position // 16 + 1)}))
        bound = splits.most_sparse_splits(window, refresh, 16, sinks, budget, 94)
        assert max(counts) <= bound <= max(counts) + 3
        for position, count in enumerate(counts):  # a table may be no longer than the context
            assert count <= splits.most_sparse_splits(window, refresh, 16, sinks, budget, position // 16 + 1)
