"""Keys and values in 8 bits on a CPU: rows and their scales, attention over them in every form, the same bits however work is cut."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from service.kernels import kv_store, reference
from service.kernels import paged_attention as portable
from service.kernels.native import attention
from tests.kernels.conftest import PagedBatch, make_batch, needs_native

pytestmark = pytest.mark.usefixtures("nan_memory")
MIXED = ([17, 1, 8, 30, 0, 9, 25, 33, 16], [1, 1, 1, 7, 1, 0, 25, 1, 16])


def narrow(batch: PagedBatch, garbage: int | None = None) -> PagedBatch:
    """The same batch in 8 bits. Poison is a scale of NaN over steps of 0, or bytes of `garbage`."""
    blocks = []
    for wide in (batch.key_blocks, batch.value_blocks):
        rows = kv_store.quantise_rows(wide)
        if garbage is not None:
            rows[wide.isnan().any(dim=-1)] = garbage
        blocks.append(rows)
    return replace(batch, key_blocks=blocks[0], value_blocks=blocks[1])


def widened(batch: PagedBatch) -> PagedBatch:
    """What the rows of a batch in 8 bits stand for."""
    return replace(batch, key_blocks=kv_store.widen_rows(batch.key_blocks), value_blocks=kv_store.widen_rows(batch.value_blocks))


def run(batch: PagedBatch, **changes: object) -> Tensor:
    return batch.run(attention.paged_attention, **changes)


def check(found: Tensor, batch: PagedBatch, exact: bool) -> None:
    """Widening is exact to float32; where queries and weights become steps too, errors are 2 % of the largest value, 0.4 % on average."""
    expected, largest = widened(batch).reference(), 3.0
    error = (found.double() - expected).abs()
    assert torch.isfinite(found).all()
    if exact:
        assert error.max() <= 1e-5 * largest, f"off by {error.max():.3g}"
    else:
        assert error.max() <= 0.02 * largest and error.mean() <= 0.004 * largest, f"off by {error.max():.3g}, {error.mean():.3g} on average"


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 99), st.sampled_from([1, 7, 64, 80]), st.floats(1e-30, 1e30))
def test_a_row_is_within_half_a_step_and_alone_the_same(seed: int, size: int, factor: float) -> None:
    x = torch.randn(5, 3, size, generator=torch.Generator().manual_seed(seed)) * factor
    rows = kv_store.quantise_rows(x)
    assert rows.shape == (5, 3, size + 4) and rows.dtype == torch.int8 and kv_store.row_size(rows) == size
    step = x.abs().amax(dim=-1, keepdim=True) / 127
    assert ((kv_store.widen_rows(rows) - x).abs() <= 0.5001 * step + 1e-38).all()
    assert torch.equal(kv_store.quantise_rows(x[2, 1]), rows[2, 1])


def test_rows_of_zeros_and_rows_that_are_not_finite() -> None:
    x = torch.stack((torch.zeros(4), torch.tensor([1.0, float("nan"), 2.0, 0.0]), torch.tensor([1.0, -float("inf"), 2.0, 0.0])))
    rows = kv_store.quantise_rows(x)
    assert not rows[0].any() and not rows[1:, :4].any()
    assert kv_store.widen_rows(rows)[1:].isnan().all()


@pytest.mark.parametrize("tokens", [0, 1, 9])
def test_only_the_named_slots_change(tokens: int) -> None:
    torch.manual_seed(0)
    key, value = torch.randn(tokens, 3, 16), torch.randn(tokens, 3, 24)
    slots = torch.randperm(5 * 4)[:tokens]
    keys, values = torch.full((5, 3, 4, 20), 111, dtype=torch.int8), torch.full((5, 3, 4, 28), 111, dtype=torch.int8)
    expected = keys.clone(), values.clone()
    kv_store.write_kv(key, value, keys, values, slots // 4, slots % 4)
    reference.write_kv(key, value, *expected, slots // 4, slots % 4)
    assert torch.equal(keys, expected[0]) and torch.equal(values, expected[1])
    assert int((keys[..., :4] != 111).any(dim=-1).sum()) == tokens * 3


@pytest.mark.parametrize("window", [None, 1, 9, 17])
@pytest.mark.parametrize("consecutive", [False, True])
def test_without_compiled_kernels_it_is_attention_over_what_rows_stand_for(window: int | None, consecutive: bool) -> None:
    batch = narrow(make_batch(*MIXED, window=window, consecutive=consecutive))
    check(batch.run(portable.paged_attention), batch, exact=True)
    check(batch.run(reference.paged_attention), batch, exact=True)


@needs_native
@pytest.mark.parametrize("garbage", [None, 0, -1, 127])
@pytest.mark.parametrize("window", [None, 1, 5, 9, 17, 100])
def test_poison_never_reaches_a_row(window: int | None, garbage: int | None, instructions: str) -> None:
    batch = make_batch(*MIXED, window=window)
    found = run(narrow(batch, garbage))
    check(found, narrow(batch), exact=instructions not in ("avx512", "amx"))
    assert torch.equal(found, run(narrow(batch, 0)))


@needs_native
@pytest.mark.parametrize("shape", [(4, 2, 16, None, 8), (5, 1, 64, None, 64), (6, 2, 20, 12, 16), (8, 8, 80, None, 64), (6, 3, 7, 5, 32)])
def test_shapes_in_every_instruction_set(shape: tuple[int, int, int, int | None, int], instructions: str) -> None:
    heads, kv_heads, size, value_size, block_tokens = shape
    contexts, counts = [1, 30, 90, 150], [1, 1, 3, 60]
    made = make_batch(
        contexts, counts, heads=heads, kv_heads=kv_heads, size=size, value_size=value_size, block_tokens=block_tokens, window=40
    )
    batch = narrow(made)
    check(run(batch), batch, exact=instructions not in ("avx512", "amx"))


@needs_native
@pytest.mark.parametrize("block_tokens", [1, 48, 128])
def test_blocks_of_other_sizes(block_tokens: int, instructions: str) -> None:
    batch = narrow(make_batch([300, 130], [1, 40], block_tokens=block_tokens, size=24))
    check(run(batch), batch, exact=instructions not in ("avx512", "amx"))


@needs_native
@pytest.mark.parametrize("scoring", [{"softcap": 1.5}, {"softcap": 50.0}, {"sink_logits": torch.tensor([0.5, -3.0, 4.0, 0.0])}])
def test_score_cap_and_sinks(scoring: dict[str, object], instructions: str) -> None:
    batch = narrow(make_batch(*MIXED, window=9, **scoring))
    check(run(batch), batch, exact=instructions not in ("avx512", "amx"))


@needs_native
@pytest.mark.parametrize("window", [None, 10, 900])
def test_the_same_bits_in_one_pass_in_pieces_alone_and_with_any_number_of_threads(window: int | None) -> None:
    batch = narrow(make_batch([1500, 40], [40, 40], heads=10, kv_heads=2, window=window, block_tokens=64))
    whole = run(batch)
    for sequence, context in enumerate((1500, 40)):
        for size in (1, 3, 8, 39):
            for at in range(0, 40, size):
                end = min(at + size, 40)
                alone = run(
                    batch,
                    query=batch.query[40 * sequence + at : 40 * sequence + end],
                    block_tables=batch.block_tables[sequence : sequence + 1],
                    query_starts=torch.tensor([0, end - at], dtype=torch.int32),
                    context_lengths=torch.tensor([context - 40 + end], dtype=torch.int32),
                )
                assert torch.equal(alone, whole[40 * sequence + at : 40 * sequence + end])
    threads = torch.get_num_threads()
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            assert torch.equal(run(batch), whole)
    finally:
        torch.set_num_threads(threads)


@needs_native
@pytest.mark.parametrize("where", ["keys", "values", "query"])
def test_what_is_not_finite_spoils_its_own_sequence_and_shows(where: str, instructions: str) -> None:
    wide = make_batch([17, 20, 9], [1, 1, 1])
    clean = run(narrow(wide))
    keys, values, query = wide.key_blocks.clone(), wide.value_blocks.clone(), wide.query.clone()
    block = int(wide.block_tables[1, 1])
    {"keys": keys[block, :, 3], "values": values[block, :, 3], "query": query[1]}[where].fill_(float("nan"))
    spoilt = run(narrow(replace(wide, key_blocks=keys, value_blocks=values)), query=query)
    assert torch.isnan(spoilt[1]).all() and torch.equal(spoilt[[0, 2]], clean[[0, 2]])


@needs_native
def test_a_few_large_weights_among_many_small_ones_are_both_seen(instructions: str) -> None:
    """One token has most of the weight, 4000 others a thousandth of it each: steps are of each block's largest weight, so none is lost."""
    contexts, size = 4001, 16
    batch = make_batch([contexts], [1], heads=1, kv_heads=1, size=size, block_tokens=64)
    query = torch.zeros(1, 1, size)
    query[0, 0, 0] = 1.0
    keys, values = torch.zeros_like(batch.key_blocks), torch.ones_like(batch.value_blocks)
    first = int(batch.block_tables[0, 0])
    keys[first, 0, 0, 0] = 6.9
    values[first, 0, 0] = -1.0
    made = narrow(replace(batch, query=query, key_blocks=keys, value_blocks=values, scale=1.0))
    expected = widened(made).reference()
    torch.testing.assert_close(run(made).double(), expected, rtol=0.02, atol=0.005)


@needs_native
def test_other_shapes_are_refused_and_a_wrong_scale_is_noticed() -> None:
    batch = narrow(make_batch(*MIXED, window=9))
    with pytest.raises(ValueError, match="do not fit"):
        run(batch, key_blocks=batch.key_blocks[..., :-4])
    keys = batch.key_blocks.clone()
    keys[..., -4:] = (keys[..., -4:].contiguous().view(torch.float32) * 1.5).view(torch.int8)
    with pytest.raises(AssertionError, match="off by"):
        check(run(batch, key_blocks=keys), batch, exact=False)
