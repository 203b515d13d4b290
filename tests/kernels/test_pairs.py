"""Attention over a cache of bfloat16 by dot products of pairs: within the rounding of weights, poison, the same bits, teeth."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from service.kernels.native import attention, binding, window_sparse
from tests.kernels.conftest import PagedBatch, check_rounded, make_batch, multiplies_pairs, needs_native
from tests.kernels.sparse_batches import SparseBatch, make_sparse

MIXED = ([17, 1, 8, 30, 0, 9, 25, 33, 16], [1, 1, 1, 7, 1, 0, 25, 1, 16])
FAR = ([77, 1, 96, 0, 21, 64, 130, 300], [1, 1, 30, 0, 21, 1, 3, 1])
STORES = ("int8", "int4", "native", "evict")

pytestmark = [
    pytest.mark.usefixtures("nan_memory"),
    needs_native,
    pytest.mark.skipif(
        isinstance(binding.compiled(), str) or not multiplies_pairs("avx512", torch.bfloat16), reason="no dot products of bfloat16 here"
    ),
]


def dense(batch: PagedBatch, **changes: Any) -> Tensor:
    """Queries that bfloat16 holds, in float32, so that the output is not rounded once more."""
    return batch.run(attention.paged_attention, **{"query": batch.query.float(), **changes})


def sparse(batch: SparseBatch, **changes: Any) -> Tensor:
    return batch.run(window_sparse.window_sparse_attention, **{"query": batch.query.float(), **changes})


def paged(*arguments: Any, **options: Any) -> PagedBatch:
    return make_batch(*arguments, dtype=torch.bfloat16, **options)


def stored(*arguments: Any, **options: Any) -> SparseBatch:
    return make_sparse(*arguments, dtype=torch.bfloat16, **options)


@pytest.mark.parametrize("window", [None, 1, 5, 8, 9, 17, 100])
def test_mixed_batch_and_poison(window: int | None) -> None:
    batch = paged(*MIXED, window=window)
    found = dense(batch)
    check_rounded(found, batch.reference(), batch.value_blocks)
    for poison in (0.0, float("inf"), 3.0):
        assert torch.equal(dense(paged(*MIXED, window=window, poison=poison)), found)


@pytest.mark.parametrize(
    "shape",
    [
        (4, 2, 16, None, 8),
        (5, 1, 64, None, 64),
        (6, 2, 20, 12, 16),
        (8, 8, 80, None, 64),
        (6, 3, 7, 5, 8),
        (4, 2, 128, 96, 128),
        (7, 1, 256, 48, 1),
    ],
)
def test_shapes(shape: tuple[int, int, int, int | None, int]) -> None:
    heads, kv_heads, size, value_size, block_tokens = shape
    options = {"heads": heads, "kv_heads": kv_heads, "size": size, "value_size": value_size, "block_tokens": block_tokens}
    batch = paged([1, 30, 90, 150], [1, 1, 3, 60], window=40, **options)
    check_rounded(dense(batch), batch.reference(), batch.value_blocks)


@pytest.mark.parametrize("scoring", [{"softcap": 1.5}, {"softcap": 50.0}, {"sink_logits": torch.tensor([0.5, -3.0, 4.0, 0.0])}])
def test_score_cap_and_sinks(scoring: dict[str, object]) -> None:
    batch = paged(*MIXED, window=9, **scoring)
    check_rounded(dense(batch), batch.reference(), batch.value_blocks)
    far = stored(*FAR, **scoring)
    check_rounded(sparse(far), far.reference(), torch.cat([value.flatten() for value in far.values]))


@pytest.mark.parametrize("store", STORES)
@pytest.mark.parametrize("size", [8, 64, 80])
def test_both_stores(store: str, size: int) -> None:
    batch = stored(*FAR, store=store, size=size)
    found = sparse(batch)
    check_rounded(found, batch.reference(), torch.cat([value.flatten() for value in batch.values]))
    for poison in (0.0, float("inf"), 3.0):
        assert torch.equal(sparse(stored(*FAR, store=store, size=size, poison=poison)), found)


def test_queries_of_16_bits_and_a_constant_value() -> None:
    batch = paged(*MIXED, window=9)
    assert torch.equal(dense(batch, query=batch.query), dense(batch).bfloat16())
    out = dense(batch, value_blocks=torch.full_like(batch.value_blocks, 0.75))
    seen = batch.reference().abs().sum(dim=(1, 2)) > 0
    torch.testing.assert_close(out[seen], torch.full_like(out[seen], 0.75), rtol=1e-6, atol=0)


def test_float32_queries_are_rounded_first() -> None:
    batch = paged(*MIXED, window=9)
    fine = batch.query.float() * 1.0017
    assert torch.equal(dense(batch, query=fine), dense(batch, query=fine.bfloat16().float()))


@pytest.mark.parametrize("window", [None, 10, 900])
def test_the_same_bits_in_pieces_and_with_any_number_of_threads(window: int | None) -> None:
    batch = paged([1500], [40], heads=10, kv_heads=2, window=window, block_tokens=64)
    whole = dense(batch)
    for size in (1, 3, 8, 39):
        for at in range(0, 40, size):
            end = min(at + size, 40)
            lengths = {
                "query_starts": torch.tensor([0, end - at], dtype=torch.int32),
                "context_lengths": torch.tensor([1460 + end], dtype=torch.int32),
            }
            assert torch.equal(dense(batch, query=batch.query[at:end].float(), **lengths), whole[at:end])
    threads = torch.get_num_threads()
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            assert torch.equal(dense(batch), whole)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("store", ["int8", "int4", "native"])
def test_the_same_bits_over_both_stores(store: str) -> None:
    whole = stored([700], [700], budget=3, refresh=16, window=130, block_tokens=64, heads=5, kv_heads=1, size=64, store=store)
    expected = sparse(whole)
    assert whole.far is not None
    for start, end in ((0, 700), (100, 101), (333, 349), (128, 420)):
        far = whole.far._replace(anchors=whole.far.anchors[start:end])
        lengths = {
            "query_starts": torch.tensor([0, end - start], dtype=torch.int32),
            "context_lengths": torch.tensor([end], dtype=torch.int32),
        }
        assert torch.equal(sparse(whole, query=whole.query[start:end].float(), far=far, **lengths), expected[start:end])


def test_what_lies_in_the_window_has_the_bits_of_dense_attention() -> None:
    batch = stored([20, 13, 8], [20, 13, 8])
    arguments = (batch.query.float(), batch.key_blocks, batch.value_blocks, batch.near_tables, batch.query_starts, batch.context_lengths)
    plain = attention.paged_attention(*arguments, scale=batch.scale, window=None)
    assert torch.equal(sparse(batch), plain) and torch.equal(sparse(batch, far=None), plain)


@pytest.mark.parametrize("where", ["keys", "values", "query"])
def test_what_is_not_finite_spoils_its_own_sequence_and_shows(where: str) -> None:
    batch = paged([17, 20, 9], [1, 1, 1])
    clean = dense(batch)
    keys, values, query = batch.key_blocks.clone(), batch.value_blocks.clone(), batch.query.float()
    block = int(batch.block_tables[1, 1])
    {"keys": keys[block, :, 3], "values": values[block, :, 3], "query": query[1]}[where].fill_(float("nan"))
    spoilt = dense(batch, key_blocks=keys, value_blocks=values, query=query)
    assert torch.isnan(spoilt[1]).all() and torch.equal(spoilt[[0, 2]], clean[[0, 2]])


@pytest.mark.parametrize("wrong", ["scale", "values", "window", "keys"])
def test_teeth(wrong: str) -> None:
    """One planted fault at a time is seen by the same comparison."""
    far, batch = stored(*FAR), paged(*MIXED, window=9)
    assert far.far is not None
    blocks = far.far.blocks
    every = torch.cat([value.flatten() for value in far.values])
    with pytest.raises(AssertionError):
        if wrong == "scale":
            scaled = far.far._replace(blocks=blocks._replace(key_scales=blocks.key_scales * 1.1))  # type: ignore[operator]
            check_rounded(sparse(far, far=scaled), far.reference(), every)
        if wrong == "values":
            scaled = far.far._replace(blocks=blocks._replace(value_scales=blocks.value_scales * 1.1))  # type: ignore[operator]
            check_rounded(sparse(far, far=scaled), far.reference(), every)
        if wrong == "window":
            check_rounded(dense(batch, window=8), batch.reference(), batch.value_blocks)
        if wrong == "keys":
            check_rounded(dense(batch, key_blocks=batch.key_blocks.roll(1, dims=3)), batch.reference(), batch.value_blocks)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 90), st.integers(0, 20)), min_size=1, max_size=5),
    st.integers(1, 40),
    st.sampled_from([1, 2, 4, 8]),
    st.integers(0, 2),
    st.sampled_from(["int8", "int4", "native"]),
)
def test_any_batch(sequences: list[tuple[int, int]], window: int, refresh: int, sinks: int, store: str) -> None:
    contexts, counts = [context for context, _ in sequences], [min(context, count) for context, count in sequences]
    if not sum(counts):
        counts[0] = min(1, contexts[0])
    batch = stored(contexts, counts, window=window, refresh=refresh, sink_blocks=sinks, store=store)
    values = torch.cat([torch.ones(1, dtype=torch.bfloat16), *(value.flatten() for value in batch.values)])
    if sum(counts):
        check_rounded(sparse(batch), batch.reference(), values)
