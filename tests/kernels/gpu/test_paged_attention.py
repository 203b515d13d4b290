"""Dense paged attention on the GPU's kernels against the float64 reference: poisoned memory, boundaries, invariances, planted faults."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

pytest.importorskip("triton")

from service.kernels import reference
from service.kernels.gpu import paged_attention as kernel
from tests.kernels.conftest import PagedBatch, make_batch
from tests.kernels.gpu.conftest import COMPILED, DEVICE, DTYPES, FarApart, check_error, moved, needs_e4m3, past_int32

MIXED = ([33, 1, 16, 47, 0, 17, 40, 15], [1, 1, 1, 7, 1, 0, 40, 15])


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Splits and tiles so small that few tokens fill several."""
    monkeypatch.setattr(kernel, "SPLIT_TOKENS", 32)
    if not COMPILED:
        monkeypatch.setattr(kernel, "tile_of", lambda dtype, size, capability: kernel.Tile(16, 4, 1))


@pytest.fixture
def rows_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter's products go to BLAS, whose bits depend on where in a tile a row lies; these compute each row by itself."""
    if not COMPILED:
        monkeypatch.setattr(np, "matmul", lambda a, b, dtype: np.einsum("ij,jk->ik", a, b, dtype=dtype))


def batch_of(contexts: list[int], counts: list[int], **changes: Any) -> PagedBatch:
    return make_batch(contexts, counts, **({"block_tokens": 16} | changes))


def run(batch: PagedBatch, **changes: Any) -> Tensor:
    return moved(batch).run(kernel.paged_attention, **changes).cpu()


def check(batch: PagedBatch) -> None:
    check_error(run(batch), batch.reference(), batch.run(sixteen_bit_attention), batch.query.dtype)


def sixteen_bit_attention(query: Tensor, *arguments: Any, **options: Any) -> Tensor:
    """The reference computed in the type of its inputs: what the error of a kernel is measured by."""
    return reference.paged_attention(query, *arguments, **options)


@needs_e4m3
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [None, 33])
def test_eight_bits_have_the_bits_of_what_they_widen_to(window: int | None, dtype: torch.dtype) -> None:
    """Poison included: NaN in eight bits is NaN."""
    batch = batch_of(*MIXED, window=window, dtype=dtype)
    narrow = replace(batch, key_blocks=batch.key_blocks.to(kernel.FP8), value_blocks=batch.value_blocks.to(kernel.FP8))
    wide = replace(batch, key_blocks=narrow.key_blocks.to(dtype), value_blocks=narrow.value_blocks.to(dtype))
    assert wide.key_blocks.isnan().any() and not torch.equal(wide.key_blocks.nan_to_num(), batch.key_blocks.nan_to_num())
    found = run(narrow)
    assert found.isfinite().all() and torch.equal(found, run(wide))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [None, 1, 15, 16, 17, 33, 100])
def test_a_mixed_batch_equals_the_reference(window: int | None, dtype: torch.dtype) -> None:
    check(batch_of(*MIXED, window=window, dtype=dtype))


@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (3, 1), (8, 2), (7, 1), (8, 1)])
@pytest.mark.parametrize("size", [64, 80, 96, 128, 256])
def test_head_shapes(heads: int, kv_heads: int, size: int) -> None:
    check(batch_of([35, 8], [1, 5], heads=heads, kv_heads=kv_heads, size=size, window=20, dtype=torch.float16))


@pytest.mark.parametrize("window", [None, 18])
@pytest.mark.parametrize("scoring", [{"softcap": 1.5}, {"sink_logits": torch.tensor([0.5, -3.0, 4.0, 0.0])}, {"value_size": 24}])
def test_score_cap_sinks_and_wider_values(window: int | None, scoring: dict[str, Any]) -> None:
    batch = batch_of(*MIXED, window=window, **scoring)
    check(batch)
    if "value_size" not in scoring:
        assert not torch.allclose(run(batch), run(replace(batch, softcap=None, sink_logits=None)), atol=1e-3)


@pytest.mark.parametrize("poison", [float("inf"), 3.0])
def test_what_no_row_sees_does_not_matter(poison: float) -> None:
    assert torch.equal(run(batch_of(*MIXED, window=18, poison=poison)), run(batch_of(*MIXED, window=18)))


@pytest.mark.parametrize("block_tokens", [16, 32, 64, 128])
def test_block_sizes(block_tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel, "SPLIT_TOKENS", 128)
    check(batch_of([block_tokens + 1, block_tokens], [1, 3], block_tokens=block_tokens, window=None))


@pytest.mark.parametrize("dtype", DTYPES if COMPILED else DTYPES[:1])  # the interpreter has one order of sums
@pytest.mark.parametrize("window", [None, 18])
@pytest.mark.parametrize("size", [1, 3, 16])
def test_slices_equal_one_pass_bit_for_bit(size: int, window: int | None, dtype: torch.dtype, rows_apart: None) -> None:
    whole = batch_of([75], [75], poison=1.0, window=window, dtype=dtype)
    expected = run(whole)
    parts = []
    for start in range(0, 75, size):
        end = min(start + size, 75)
        starts, lengths = torch.tensor([0, end - start], dtype=torch.int32), torch.tensor([end], dtype=torch.int32)
        parts.append(run(replace(whole, query=whole.query[start:end], query_starts=starts, context_lengths=lengths)))
        if start > 40:
            break
    assert torch.equal(torch.cat(parts), expected[:end])


@pytest.mark.parametrize("dtype", DTYPES if COMPILED else DTYPES[:1])
@pytest.mark.parametrize("scoring", [{}, {"softcap": 1.5, "sink_logits": torch.tensor([0.5, -3.0, 4.0, 0.0])}])
@pytest.mark.parametrize("window", [None, 31, 32, 33, 70])
def test_a_tile_that_crosses_many_splits_has_the_bits_of_decoded_rows(
    window: int | None, scoring: dict[str, Any], dtype: torch.dtype, rows_apart: None
) -> None:
    """Seven splits, of which a window leaves two to four; tiles that begin in the midst of one, and rows on both sides of a border."""
    batch = batch_of([200], [60], poison=1.0, window=window, dtype=dtype, **scoring)
    check(batch)
    expected = run(batch)
    for row in (0, 7, 18, 19, 20, 51, 52, 59):
        one = {"query_starts": torch.tensor([0, 1], dtype=torch.int32), "context_lengths": torch.tensor([141 + row], dtype=torch.int32)}
        assert torch.equal(run(replace(batch, query=batch.query[row : row + 1], **one)), expected[row : row + 1])


@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_learned_sinks_of_sixteen_bits_count_as_what_they_are(dtype: torch.dtype) -> None:
    """Widened before they are multiplied: 4.7 times log2(e) in bfloat16 would be a hundredth off."""
    sinks = torch.tensor([4.7, -3.3, 6.1, 0.2]).to(dtype)
    narrow, wide = (batch_of(*MIXED, dtype=dtype, sink_logits=logits) for logits in (sinks, sinks.float()))
    assert torch.equal(run(narrow, sink_logits=sinks.to(DEVICE)), run(wide, sink_logits=sinks.float().to(DEVICE)))


@pytest.mark.skipif(not COMPILED, reason="interpreted, all kernels sum in one order")
@pytest.mark.parametrize(("size", "group"), [(64, 4), (128, 8)])
def test_the_order_of_sums_is_the_same_in_every_kernel(size: int, group: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rows of a tile and the same rows decoded, so many that another order of some sums would show in 16 bits."""
    monkeypatch.setattr(kernel, "SPLIT_TOKENS", 128)
    shape: dict[str, Any] = {"block_tokens": 64, "heads": group, "kv_heads": 1, "size": size, "dtype": torch.float16}
    batch = batch_of([400], [36], **shape)
    rows = torch.arange(37, dtype=torch.int32)
    one_by_one = {"block_tables": batch.block_tables.expand(36, -1).contiguous(), "query_starts": rows, "context_lengths": rows[1:] + 364}
    assert torch.equal(run(batch), run(replace(batch, **one_by_one)))


def test_alone_equals_in_a_batch_bit_for_bit() -> None:
    batch = batch_of(*MIXED, window=18)
    together = run(batch)
    for sequence in range(len(MIXED[0])):
        first, last = batch.query_starts[sequence : sequence + 2].tolist()
        alone = replace(
            batch,
            query=batch.query[first:last],
            block_tables=batch.block_tables[sequence : sequence + 1],
            query_starts=torch.tensor([0, last - first], dtype=torch.int32),
            context_lengths=batch.context_lengths[sequence : sequence + 1],
        )
        assert torch.equal(run(alone), together[first:last])


@pytest.mark.parametrize("window", [None, 18])
def test_a_plan_of_tiles_alone_decodes_in_them(window: int | None) -> None:
    batch = batch_of(*MIXED, window=window)
    lengths = batch.query_starts, batch.context_lengths
    plan = kernel.plan_tiles(batch.block_tables.to(DEVICE), *lengths, block_tokens=16, window=window)
    work = plan.dense(2, kernel.tile_of(batch.query.dtype, 16, kernel.capability(DEVICE)))
    assert work.splits == 0 and work.tiles >= sum(count > 0 for count in MIXED[1])

    def attend(*tensors: Tensor, **options: Any) -> Tensor:
        return kernel.paged_attention(*tensors, **options, plan=plan)

    found = moved(batch).run(attend).cpu()
    check_error(found, batch.reference(), found, batch.query.dtype)
    assert torch.equal(found, run(batch)) or COMPILED


def test_permuting_physical_blocks_changes_nothing() -> None:
    batch = batch_of(*MIXED)
    count = batch.key_blocks.shape[0]
    order = torch.cat((torch.zeros(1, dtype=torch.int64), torch.randperm(count - 1) + 1))
    places = torch.empty_like(order)
    places[order] = torch.arange(count)
    valid = (batch.block_tables > 0) & (batch.block_tables < count)
    tables = torch.where(valid, places[batch.block_tables.clamp(0, count - 1).long()].to(torch.int32), batch.block_tables)
    other = replace(batch, key_blocks=batch.key_blocks[order], value_blocks=batch.value_blocks[order], block_tables=tables)
    assert torch.equal(run(other), run(batch))


def test_constant_values_come_out_unchanged() -> None:
    batch = batch_of(*MIXED, window=18)
    out = run(replace(batch, value_blocks=torch.full_like(batch.value_blocks, 0.75)))
    seen = batch.reference().abs().sum(dim=(1, 2)) > 0
    torch.testing.assert_close(out[seen], torch.full_like(out[seen], 0.75), rtol=1e-6, atol=0)


def test_rows_that_see_nothing_are_zero_with_sinks_too() -> None:
    out = run(batch_of([0, 0, 5], [1, 3, 1], sink_logits=torch.ones(4)))
    assert not out[:4].any() and out[4].any()


def test_a_sequence_that_holds_nan_spoils_only_itself() -> None:
    batch = batch_of([17, 20, 9], [1, 3, 1])
    clean, keys = run(batch), batch.key_blocks.clone()
    keys[int(batch.block_tables[1, 0]), :, 3] = float("nan")
    spoilt = run(replace(batch, key_blocks=keys))
    assert spoilt[1:4].isnan().any() and torch.equal(spoilt[[0, 4]], clean[[0, 4]])


def test_blocks_far_past_int32_elements(far_apart: FarApart) -> None:
    batch = batch_of([20, 35], [1, 3], heads=2, kv_heads=1, dtype=torch.float16)
    keys, values = far_apart.place(batch.key_blocks), far_apart.place(batch.value_blocks)
    there = replace(batch, key_blocks=keys, value_blocks=values, block_tables=past_int32(batch.block_tables, len(batch.key_blocks)))
    assert torch.equal(run(there), run(batch))


def test_a_plan_made_ahead_gives_the_same_and_counts_the_work() -> None:
    batch = batch_of(*MIXED, window=18)
    tile = kernel.tile_of(torch.float32, 16, 90)
    tables = batch.block_tables.to(DEVICE)
    plan = kernel.plan_attention(tables, batch.query_starts, batch.context_lengths, block_tokens=16, window=18)
    tokens, work = tile.rows // 2, plan.dense(2, tile)
    assert plan.dense(2, tile) is work and work.tiles == sum(-(-count // tokens) for count in MIXED[1] if count > 1)
    # Contexts 33, 1, 16 and 0 decode; of 33 tokens positions 15 … 32 are seen, in two splits of 32.
    assert work.split_ends.tolist() == [2, 3, 4, 4, 5, 5, 5, 5]
    planned = moved(batch).run(lambda *tensors, **options: kernel.paged_attention(*tensors, **options, plan=plan)).cpu()
    assert torch.equal(planned, run(batch))


@pytest.mark.parametrize("fault", ["mask", "scale", "order"])
def test_planted_faults_are_seen(fault: str) -> None:
    batch = batch_of([47, 33], [7, 1], window=18)
    broken = {"mask": {"window": 17}, "scale": {"scale": batch.scale * 1.02}, "order": {"query": moved(batch).query.flip(1)}}[fault]
    with pytest.raises(AssertionError):
        check_error(run(batch, **broken), batch.reference(), batch.run(sixteen_bit_attention), torch.float32)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"key_blocks": torch.zeros(4, 2, 16, 16, dtype=torch.float64)}, "share one of"),
        ({"key_blocks": torch.zeros(4, 2, 8, 16)}, "must agree and hold"),
        ({"query": torch.zeros(1, 3, 16)}, "does not divide"),
        ({"query": torch.zeros(1, 4, 32)[..., ::2]}, "contiguous"),
        ({"scale": -1.0}, "must be positive"),
        ({"softcap": 0.0}, "must be positive"),
    ],
)
def test_what_cannot_be_computed_is_refused(change: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        replace(batch_of([5], [1]), **change).run(kernel.paged_attention)


def test_looping_programs_are_those_that_registers_hold() -> None:
    """Of a thread's 255 registers a processor's 65,536 hold 8 warps, handed out in units of 8 a thread."""
    assert kernel.WARPS_PER_PROCESSOR == 65536 // (32 * 8 * -(-kernel.REGISTERS // 8))
    cpu = torch.device("cpu")
    assert [kernel.programs(cpu, warps) for warps in (4, 8, 16)] == [2, 1, 1]


def test_more_heads_than_a_tile_has_rows_are_refused() -> None:
    starts, lengths = torch.tensor([0, 2]), torch.tensor([2])
    with pytest.raises(ValueError, match="use at most 16"):
        kernel.plan_attention(starts, starts, lengths, block_tokens=16, window=None).dense(17, kernel.Tile(16, 4, 1))


@settings(max_examples=15, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 70), st.integers(0, 20)), min_size=1, max_size=4),
    st.sampled_from([None, 1, 15, 33, 80]),  # few, since each is compiled on a device
    st.sampled_from([16, 32]),
    st.sampled_from([(1, 1), (3, 1), (4, 2)]),
)
def test_any_batch_equals_the_reference(
    sequences: list[tuple[int, int]], window: int | None, block_tokens: int, heads: tuple[int, int]
) -> None:
    contexts, counts = [context for context, _ in sequences], [min(context, count) for context, count in sequences]
    check(batch_of(contexts, counts, window=window, block_tokens=block_tokens, heads=heads[0], kv_heads=heads[1]))
