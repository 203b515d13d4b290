"""Paged attention against the float64 reference: shapes, windows, poisoned memory, invariances, and proof that the comparison bites."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from service.kernels import paged_attention as kernel
from tests.kernels.conftest import check_close, make_batch

pytestmark = pytest.mark.usefixtures("nan_memory")
MIXED = ([17, 1, 8, 30, 0, 9, 25, 33, 16], [1, 1, 1, 7, 1, 0, 25, 1, 16])
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
WINDOWS = (None, 1, 5, 7, 8, 9, 16, 17, 100)


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), 3.0])
@pytest.mark.parametrize("window", WINDOWS)
def test_mixed_batch_equals_the_reference(window: int | None, poison: float) -> None:
    batch = make_batch(*MIXED, window=window, poison=poison)
    check_close(batch.run(), batch.reference(), torch.float32)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [None, 9])
def test_every_type_is_computed_in_float32(dtype: torch.dtype, window: int | None) -> None:
    batch = make_batch(*MIXED, window=window, dtype=dtype)
    check_close(batch.run(), batch.reference(), dtype)


@pytest.mark.parametrize("size", [8, 16, 24, 64, 80, 96, 128, 256])
@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (6, 2), (4, 1), (7, 1), (8, 1)])
def test_head_shapes(heads: int, kv_heads: int, size: int) -> None:
    batch = make_batch([19, 8, 12], [1, 1, 5], heads=heads, kv_heads=kv_heads, size=size, window=11)
    check_close(batch.run(), batch.reference(), torch.float32)


@pytest.mark.parametrize("window", [None, 9])
@pytest.mark.parametrize("scoring", [{"softcap": 1.5}, {"sink_logits": torch.tensor([0.5, -3.0, 4.0, 0.0])}, {"value_size": 24}])
def test_score_cap_sinks_and_wider_values(window: int | None, scoring: dict[str, object]) -> None:
    batch = make_batch(*MIXED, window=window, **scoring)
    check_close(batch.run(), batch.reference(), torch.float32)
    plain = make_batch(*MIXED, window=window, value_size=scoring.get("value_size"))
    if "value_size" not in scoring:
        assert not torch.allclose(batch.run(), plain.run(), atol=1e-3)


@pytest.mark.parametrize("context", [1, 7, 8, 9, 15, 16, 17, 24, 25])
@pytest.mark.parametrize("window", [7, 8, 9, 16])
def test_contexts_around_the_window_and_the_block(context: int, window: int) -> None:
    batch = make_batch([context, context], [1, min(context, 3)], window=window)
    check_close(batch.run(), batch.reference(), torch.float32)


def test_a_lone_decode_row_reads_only_the_window() -> None:
    batch = make_batch([640, 5], [1, 0], window=16)
    plan = kernel.plan_attention(batch.block_tables, batch.query_starts, batch.context_lengths, block_tokens=8, window=16)
    assert [len(tile.ids) for tile in plan.tiles] == [2] and not len(plan.ids)
    check_close(batch.run(), batch.reference(), torch.float32)


def test_blocks_that_are_a_view_of_a_larger_pool() -> None:
    batch = make_batch([30, 9], [5, 1], poison=0.5)
    pool = torch.stack((batch.key_blocks, batch.value_blocks), dim=1)
    torch.testing.assert_close(batch.run(key_blocks=pool[:, 0], value_blocks=pool[:, 1]), batch.run())


@pytest.mark.parametrize(("contexts", "counts"), [([5], [1]), ([64], [1]), ([40], [40]), ([0], [1]), ([3], [0]), ([9, 70], [1, 1])])
def test_lone_sequences_and_consecutive_blocks(contexts: list[int], counts: list[int]) -> None:
    for consecutive in (True, False):
        batch = make_batch(contexts, counts, consecutive=consecutive)
        check_close(batch.run(), batch.reference(), torch.float32)


def test_consecutive_blocks_are_read_in_place() -> None:
    batch = make_batch([64, 64], [1, 1], consecutive=True)
    plan = kernel.plan_attention(batch.block_tables, batch.query_starts, batch.context_lengths, block_tokens=8, window=None)
    assert plan.run == 1
    assert kernel._pick(batch.key_blocks, plan, 0, 8).data_ptr() == batch.key_blocks[1].data_ptr()


def test_rows_that_see_nothing_are_zero() -> None:
    batch = make_batch([0, 5], [1, 1])
    out = batch.run()
    assert torch.equal(out[0], torch.zeros_like(out[0])) and out[1].abs().sum() > 0


def test_a_batch_of_no_rows_is_empty() -> None:
    batch = make_batch([4, 0], [0, 0])
    assert batch.run().shape == (0, 4, 16)


@pytest.mark.parametrize("window", [None, 16])
def test_more_pairs_than_one_gather_holds(window: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel, "GATHER_BYTES", 3 * 2 * 8 * 16 * 4)
    batch = make_batch([61, 64, 65, 3], [1, 1, 1, 1], window=window)
    check_close(batch.run(), batch.reference(), torch.float32)


@pytest.mark.parametrize("tile_rows", [1, 3, 8])
@pytest.mark.parametrize("window", [None, 5, 12])
def test_prefill_in_tiles(tile_rows: int, window: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel, "TILE_ROWS", tile_rows)
    batch = make_batch([29, 20], [29, 13], window=window)
    check_close(batch.run(), batch.reference(), torch.float32)


def test_a_windowed_step_reads_only_the_window() -> None:
    batch = make_batch([640, 640, 640], [1, 1, 20], window=16)
    plan = kernel.plan_attention(batch.block_tables, batch.query_starts, batch.context_lengths, block_tokens=8, window=16)
    assert len(plan.ids) == 4
    # Rows 620 … 639 see 605 … 639: blocks 75 … 79.
    assert [len(tile.ids) for tile in plan.tiles] == [5]


def test_a_plan_made_ahead_gives_the_same() -> None:
    batch = make_batch(*MIXED, window=9)
    plan = kernel.plan_attention(batch.block_tables, batch.query_starts, batch.context_lengths, block_tokens=8, window=9)
    planned = batch.run(lambda *tensors, **options: kernel.paged_attention(*tensors, **options, plan=plan))
    assert torch.equal(planned, batch.run())


def test_arguments_stay_as_they_are() -> None:
    batch = make_batch(*MIXED, window=9, poison=2.0)
    before = [tensor.clone() for tensor in (batch.query, batch.key_blocks, batch.value_blocks, batch.block_tables)]
    batch.run()
    for old, new in zip(before, (batch.query, batch.key_blocks, batch.value_blocks, batch.block_tables), strict=True):
        assert torch.equal(old, new)


def test_permuting_physical_blocks_changes_nothing() -> None:
    batch = make_batch(*MIXED, window=9)
    count = batch.key_blocks.shape[0]
    order = torch.cat((torch.zeros(1, dtype=torch.int64), torch.randperm(count - 1) + 1))
    moved = torch.empty_like(order)
    moved[order] = torch.arange(count)
    valid = (batch.block_tables > 0) & (batch.block_tables < count)
    tables = torch.where(valid, moved[batch.block_tables.clamp(0, count - 1).long()].to(torch.int32), batch.block_tables)
    permuted = batch.run(key_blocks=batch.key_blocks[order], value_blocks=batch.value_blocks[order], block_tables=tables)
    assert torch.equal(permuted, batch.run())


def test_constant_values_come_out_unchanged() -> None:
    batch = make_batch(*MIXED, window=9)
    out = batch.run(value_blocks=torch.full_like(batch.value_blocks, 0.75))
    seen = batch.reference().abs().sum(dim=(1, 2)) > 0
    torch.testing.assert_close(out[seen], torch.full_like(out[seen], 0.75), rtol=1e-6, atol=0)


@pytest.mark.parametrize("window", [None, 10])
@pytest.mark.parametrize("chunk", [1, 3, 8, 13])
def test_chunks_equal_one_pass(chunk: int, window: int | None) -> None:
    whole = make_batch([40], [40], poison=1.0)
    expected = whole.run(window=window)
    parts = []
    for start in range(0, 40, chunk):
        end = min(start + chunk, 40)
        starts, lengths = torch.tensor([0, end - start], dtype=torch.int32), torch.tensor([end], dtype=torch.int32)
        parts.append(whole.run(query=whole.query[start:end], query_starts=starts, context_lengths=lengths, window=window))
    check_close(torch.cat(parts), expected, torch.float32)


def test_alone_equals_in_a_batch() -> None:
    batch = make_batch(*MIXED, window=9)
    together = batch.run()
    for sequence in range(len(MIXED[0])):
        first, last = batch.query_starts[sequence : sequence + 2].tolist()
        alone = batch.run(
            query=batch.query[first:last],
            block_tables=batch.block_tables[sequence : sequence + 1],
            query_starts=torch.tensor([0, last - first], dtype=torch.int32),
            context_lengths=batch.context_lengths[sequence : sequence + 1],
        )
        torch.testing.assert_close(alone, together[first:last], rtol=1e-5, atol=1e-5)


def test_a_sequence_that_holds_nan_spoils_only_itself() -> None:
    batch = make_batch([17, 20, 9], [1, 1, 1])
    clean = batch.run()
    keys = batch.key_blocks.clone()
    keys[int(batch.block_tables[1, 0]), :, 3] = float("nan")
    values = batch.value_blocks.clone()
    values[int(batch.block_tables[1, 1]), :, 3] = float("nan")
    spoilt = batch.run(key_blocks=keys, value_blocks=values)
    assert torch.isnan(spoilt[1]).any()
    torch.testing.assert_close(spoilt[[0, 2]], clean[[0, 2]])


def test_blocks_far_past_int32_elements() -> None:
    blocks = 32768 + 4
    # Blocks stand 65536 elements apart, so block 32768 begins at element 2^31; memory that is never touched costs nothing.
    batch = make_batch([20], [1], heads=2, kv_heads=1, poison=0.0)
    storage = torch.empty(blocks * 65536, dtype=torch.float16)
    far = torch.as_strided(storage, (blocks, 1, 8, 16), (65536, 128, 16, 1))
    table = batch.block_tables.clone()
    used = table[0, :3].long()
    target = torch.tensor([32768, 32770, 32769])
    far[target] = batch.key_blocks[used].half()
    table[0, :3] = target.to(torch.int32)
    near = batch.run(query=batch.query.half(), key_blocks=batch.key_blocks.half(), value_blocks=batch.key_blocks.half())
    assert torch.equal(batch.run(query=batch.query.half(), key_blocks=far, value_blocks=far, block_tables=table), near)


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 40), st.integers(0, 12)), min_size=1, max_size=6),
    st.one_of(st.none(), st.integers(1, 45)),
    st.sampled_from([1, 4, 8, 16]),
    st.sampled_from([(1, 1), (3, 1), (4, 2)]),
    st.booleans(),
)
def test_any_batch_equals_the_reference(
    sequences: list[tuple[int, int]], window: int | None, block_tokens: int, heads: tuple[int, int], consecutive: bool
) -> None:
    contexts, counts = [context for context, _ in sequences], [min(context, count) for context, count in sequences]
    batch = make_batch(
        contexts, counts, heads=heads[0], kv_heads=heads[1], size=8, block_tokens=block_tokens, window=window, consecutive=consecutive
    )
    check_close(batch.run(), batch.reference(), torch.float32)


class TestTeeth:
    """Planted faults: the comparison used above must notice each."""

    def test_scale_off_by_two_percent(self) -> None:
        batch = make_batch(*MIXED)
        with pytest.raises(AssertionError):
            check_close(batch.run(scale=batch.scale * 1.02), batch.reference(), torch.float32)

    @pytest.mark.parametrize("window", [8, 10])
    def test_window_off_by_one(self, window: int) -> None:
        batch = make_batch(*MIXED, window=9, poison=0.5)
        with pytest.raises(AssertionError):
            check_close(batch.run(window=window), batch.reference(), torch.float32)

    def test_one_slot_of_the_mask_flipped(self) -> None:
        batch = make_batch([17, 9], [1, 1], poison=0.5)
        plan = kernel.plan_attention(batch.block_tables, batch.query_starts, batch.context_lengths, block_tokens=8, window=None)
        hidden = plan.hidden.clone()
        hidden[0, 3] = True
        faulty = replace(plan, hidden=hidden, bias=plan.bias.masked_fill(hidden, float("-inf")))
        out = batch.run(lambda *tensors, **options: kernel.paged_attention(*tensors, **options, plan=faulty))
        with pytest.raises(AssertionError):
            check_close(out, batch.reference(), torch.float32)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_two_percent_shows_in_sixteen_bits_too(self, dtype: torch.dtype) -> None:
        batch = make_batch(*MIXED, dtype=dtype)
        with pytest.raises(AssertionError):
            check_close(batch.run(scale=batch.scale * 1.02), batch.reference(), dtype)

    def test_zeros_do_not_pass(self) -> None:
        expected = make_batch(*MIXED).reference()
        with pytest.raises(AssertionError):
            check_close(torch.zeros_like(expected, dtype=torch.float32), expected, torch.float32)
