"""Compiled paged attention against the float64 reference: shapes, types, windows, poisoned memory, the same bits however work is cut."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from service.kernels.native import attention
from tests.kernels.conftest import PagedBatch, check_close, make_batch, multiplies_pairs, needs_native, untouched

pytestmark = [needs_native, pytest.mark.usefixtures("nan_memory")]
MIXED = ([17, 1, 8, 30, 0, 9, 25, 33, 16], [1, 1, 1, 7, 1, 0, 25, 1, 16])
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def run(batch: PagedBatch, **changes: object) -> Tensor:
    return batch.run(attention.paged_attention, **changes)


def rows_alone(batch: PagedBatch, sequence: int, first: int, last: int) -> Tensor:
    """Query rows first … last − 1 of one sequence, computed as a batch of their own."""
    start, end, context = int(batch.query_starts[sequence]), int(batch.query_starts[sequence + 1]), int(batch.context_lengths[sequence])
    return run(
        batch,
        query=batch.query[start + first : start + last],
        block_tables=batch.block_tables[sequence : sequence + 1],
        query_starts=torch.tensor([0, last - first], dtype=torch.int32),
        context_lengths=torch.tensor([context - (end - start - last)], dtype=torch.int32),
    )


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), 3.0])
@pytest.mark.parametrize("window", [None, 1, 5, 8, 9, 17, 100])
def test_mixed_batch_equals_the_reference(window: int | None, poison: float) -> None:
    batch = make_batch(*MIXED, window=window, poison=poison)
    check_close(run(batch), batch.reference(), torch.float32)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(4, 2, 16, None, 8), (5, 1, 64, None, 64), (6, 2, 20, 12, 16), (8, 8, 80, None, 64), (6, 3, 7, 5, 8)])
def test_types_and_shapes_in_every_instruction_set(
    shape: tuple[int, int, int, int | None, int], dtype: torch.dtype, instructions: str
) -> None:
    heads, kv_heads, size, value_size, block_tokens = shape
    batch = make_batch(
        [1, 30, 90, 150],
        [1, 1, 3, 60],
        heads=heads,
        kv_heads=kv_heads,
        size=size,
        value_size=value_size,
        block_tokens=block_tokens,
        window=40,
        dtype=dtype,
    )
    if multiplies_pairs(instructions, dtype):
        pytest.skip("rounds weights: see test_pairs.py")
    check_close(run(batch), batch.reference(), dtype)


@pytest.mark.parametrize("size", [8, 16, 24, 64, 80, 96, 128, 256])
@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (6, 2), (4, 1), (7, 1), (8, 1), (100, 1)])
def test_head_shapes(heads: int, kv_heads: int, size: int) -> None:
    batch = make_batch([19, 8, 12], [1, 1, 5], heads=heads, kv_heads=kv_heads, size=size, window=11)
    check_close(run(batch), batch.reference(), torch.float32)


@pytest.mark.parametrize("window", [None, 9])
@pytest.mark.parametrize("scoring", [{"softcap": 1.5}, {"softcap": 50.0}, {"sink_logits": torch.tensor([0.5, -3.0, 4.0, 0.0])}])
def test_score_cap_and_sinks(window: int | None, scoring: dict[str, object], instructions: str) -> None:
    batch = make_batch(*MIXED, window=window, **scoring)
    check_close(run(batch), batch.reference(), torch.float32)


def test_queries_and_blocks_of_different_types() -> None:
    batch = make_batch(*MIXED, window=9)
    mixed = run(batch, key_blocks=batch.key_blocks.bfloat16(), value_blocks=batch.value_blocks.bfloat16())
    rounded = make_batch(*MIXED, window=9, dtype=torch.bfloat16)
    expected = run(rounded, query=batch.query)
    assert mixed.dtype == torch.float32 and torch.equal(mixed, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [None, 10, 900])
def test_the_same_bits_in_one_pass_in_pieces_and_one_by_one(window: int | None, dtype: torch.dtype) -> None:
    """1500 tokens of context cross splits of 512, 40 rows cross tiles, and rows come together in every way."""
    batch = make_batch([1500, 40], [40, 40], heads=10, kv_heads=2, window=window, block_tokens=64, dtype=dtype)
    whole = run(batch)
    for sequence in (0, 1):
        for size in (1, 3, 8, 13, 39):
            pieces = [rows_alone(batch, sequence, at, min(at + size, 40)) for at in range(0, 40, size)]
            assert torch.equal(torch.cat(pieces), whole[40 * sequence : 40 * sequence + 40])


def test_the_same_bits_alone_and_in_a_batch() -> None:
    batch = make_batch(*MIXED, window=9)
    together = run(batch)
    for sequence, count in enumerate(MIXED[1]):
        first = int(batch.query_starts[sequence])
        assert torch.equal(rows_alone(batch, sequence, 0, count), together[first : first + count])


def test_the_same_bits_with_any_number_of_threads() -> None:
    batch = make_batch([5000, 700, 90], [1, 200, 1], block_tokens=64)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            results += [run(batch) for _ in range(3)]
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(results[0], other) for other in results[1:])


def test_long_contexts_are_read_split_by_split() -> None:
    batch = make_batch([6000, 511, 512, 513], [1, 1, 1, 1], kv_heads=1, block_tokens=64)
    check_close(run(batch), batch.reference(), torch.float32)


@pytest.mark.parametrize("context", [1, 7, 8, 9, 15, 16, 17, 24, 25])
@pytest.mark.parametrize("window", [7, 8, 9, 16])
def test_contexts_around_the_window_and_the_block(context: int, window: int) -> None:
    batch = make_batch([context, context], [1, min(context, 3)], window=window)
    check_close(run(batch), batch.reference(), torch.float32)


def test_views_of_a_larger_pool_and_of_a_joint_projection() -> None:
    batch = make_batch([30, 9], [5, 1], poison=0.5)
    pool = torch.stack((batch.key_blocks, batch.value_blocks), dim=1)
    joint = torch.cat((batch.query, batch.query), dim=1)
    viewed = run(batch, query=joint[:, :4], key_blocks=pool[:, 0], value_blocks=pool[:, 1])
    assert torch.equal(viewed, run(batch))
    turned = batch.key_blocks.transpose(2, 3).contiguous().transpose(2, 3)
    assert torch.equal(run(batch, key_blocks=turned), run(batch))


def test_rows_that_see_nothing_are_zero_and_no_rows_are_empty() -> None:
    batch = make_batch([0, 5], [1, 1])
    out = run(batch)
    assert torch.equal(out[0], torch.zeros_like(out[0])) and out[1].abs().sum() > 0
    assert run(make_batch([4, 0], [0, 0])).shape == (0, 4, 16)


def test_permuting_physical_blocks_changes_nothing() -> None:
    batch = make_batch(*MIXED, window=9)
    count = batch.key_blocks.shape[0]
    order = torch.cat((torch.zeros(1, dtype=torch.int64), torch.randperm(count - 1) + 1))
    moved = torch.empty_like(order)
    moved[order] = torch.arange(count)
    valid = (batch.block_tables > 0) & (batch.block_tables < count)
    tables = torch.where(valid, moved[batch.block_tables.clamp(0, count - 1).long()].to(torch.int32), batch.block_tables)
    permuted = run(batch, key_blocks=batch.key_blocks[order], value_blocks=batch.value_blocks[order], block_tables=tables)
    assert torch.equal(permuted, run(batch))


def test_constant_values_come_out_unchanged() -> None:
    batch = make_batch(*MIXED, window=9)
    out = run(batch, value_blocks=torch.full_like(batch.value_blocks, 0.75))
    seen = batch.reference().abs().sum(dim=(1, 2)) > 0
    torch.testing.assert_close(out[seen], torch.full_like(out[seen], 0.75), rtol=1e-6, atol=0)


@pytest.mark.parametrize("where", ["keys", "values", "query"])
def test_what_is_not_finite_spoils_its_own_sequence_and_shows(where: str) -> None:
    batch = make_batch([17, 20, 9], [1, 1, 1])
    clean = run(batch)
    keys, values, query = batch.key_blocks.clone(), batch.value_blocks.clone(), batch.query.clone()
    block = int(batch.block_tables[1, 1])
    {"keys": keys[block, :, 3], "values": values[block, :, 3], "query": query[1]}[where].fill_(float("nan"))
    spoilt = run(batch, key_blocks=keys, value_blocks=values, query=query)
    assert torch.isnan(spoilt[1]).all()
    assert torch.equal(spoilt[[0, 2]], clean[[0, 2]])


def test_blocks_far_past_int32_elements() -> None:
    # Blocks stand 65536 elements apart, so block 32768 begins at element 2^31.
    batch = make_batch([20], [1], heads=2, kv_heads=1, poison=0.0)
    storage = untouched((32768 + 4) * 65536, dtype=torch.float16)
    far = torch.as_strided(storage, (32768 + 4, 1, 8, 16), (65536, 128, 16, 1))
    table = batch.block_tables.clone()
    target = torch.tensor([32768, 32770, 32769])
    far[target] = batch.key_blocks[table[0, :3].long()].half()
    near = run(batch, query=batch.query.half(), key_blocks=batch.key_blocks.half(), value_blocks=batch.key_blocks.half())
    table[0, :3] = target.to(torch.int32)
    assert torch.equal(run(batch, query=batch.query.half(), key_blocks=far, value_blocks=far, block_tables=table), near)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 40), st.integers(0, 12)), min_size=1, max_size=6),
    st.one_of(st.none(), st.integers(1, 45)),
    st.sampled_from([1, 4, 8, 16, 24]),
    st.sampled_from([(1, 1), (3, 1), (4, 2), (7, 1)]),
)
def test_any_batch_equals_the_reference(
    sequences: list[tuple[int, int]], window: int | None, block_tokens: int, heads: tuple[int, int]
) -> None:
    contexts, counts = [context for context, _ in sequences], [min(context, count) for context, count in sequences]
    batch = make_batch(contexts, counts, heads=heads[0], kv_heads=heads[1], size=8, block_tokens=block_tokens, window=window)
    check_close(run(batch), batch.reference(), torch.float32)


def test_what_does_not_fit_is_refused() -> None:
    batch = make_batch([5], [1])
    with pytest.raises(ValueError, match="do not fit each other"):
        run(batch, query=batch.query[..., :8])
    with pytest.raises(ValueError, match="do not fit each other"):
        run(batch, query=batch.query[:, :3])
    with pytest.raises(ValueError, match="int32"):
        run(batch, block_tables=batch.block_tables.long())
    with pytest.raises(ValueError, match="one type"):
        run(batch, value_blocks=batch.value_blocks.half())
    with pytest.raises(ValueError, match="do not fit 1 lengths"):
        run(batch, query_starts=batch.query_starts[:1])


@pytest.mark.parametrize("dtype", DTYPES)
def test_scale_off_by_two_percent_is_noticed(dtype: torch.dtype) -> None:
    batch = make_batch(*MIXED, dtype=dtype)
    with pytest.raises(AssertionError):
        check_close(run(batch, scale=batch.scale * 1.02), batch.reference(), dtype)


@pytest.mark.parametrize("window", [8, 10])
def test_window_off_by_one_is_noticed(window: int) -> None:
    batch = make_batch(*MIXED, window=9, poison=0.5)
    with pytest.raises(AssertionError):
        check_close(run(batch, window=window), batch.reference(), torch.float32)
