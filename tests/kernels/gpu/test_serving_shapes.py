"""Attention over two stores, choice and demotion as they are served: head sizes of models in 16 bits, blocks of 64, splits of 512, a window
of 2048 and contexts of thousands. These run on a device; interpreted, two of a smaller window do, with the same blocks and splits.

What small blocks and head sizes do not have: rows of one anchor in tiles of 64, tables of a hundred blocks, splits that a list fills.
"""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch

pytest.importorskip("triton")

from service.kernels import reference_sparse
from service.kernels.gpu import choose_far, far_store, paged_attention, window_sparse
from service.kernels.splits import SPLIT_TOKENS
from tests.kernels.gpu.conftest import COMPILED, DEVICE, check_error, moved, placed
from tests.kernels.sparse_batches import Choosing, SparseBatch, make_sparse, make_store

STORES = ("int8", "int4", "native")
# bfloat16 is interpreted wrongly.
SIXTEEN = (torch.bfloat16, torch.float16) if COMPILED else (torch.float16,)
on_device = pytest.mark.skipif(not COMPILED, reason="takes minutes in the interpreter")


class Served(NamedTuple):
    """One layer's attention as it is served."""

    size: int
    group: int
    refresh: int
    store: str


SERVED = (
    *(Served(64, *rest) for rest in ((4, 1, "int8"), (4, 64, "int4"), (5, 16, "native"), (5, 64, "int8"))),
    *(Served(80, *rest) for rest in ((4, 16, "int4"), (5, 1, "int8"), (4, 64, "native"))),
    *(Served(96, *rest) for rest in ((4, 64, "native"), (5, 16, "int8"), (4, 1, "int4"))),
    *(Served(128, *rest) for rest in ((4, 1, "int8"), (4, 64, "int4"), (5, 16, "native"), (5, 64, "int8"), (4, 1, "native"))),
    *(Served(256, *rest) for rest in ((4, 64, "int8"), (5, 1, "int4"), (4, 16, "native"))),
)


def batch_of(served: Served, dtype: torch.dtype, contexts: list[int], counts: list[int], window: int, budget: int) -> SparseBatch:
    """Rows of two K/V heads, one where they are interpreted."""
    kv_heads = 2 if COMPILED else 1
    heads = {"heads": kv_heads * served.group, "kv_heads": kv_heads, "size": served.size}
    rule = {"block_tokens": 64, "sub_blocks": 4, "window": window, "refresh": served.refresh, "budget": budget}
    return make_sparse(contexts, counts, store=served.store, dtype=dtype, **heads, **rule)


def full_batch(served: Served, dtype: torch.dtype) -> SparseBatch:
    """Decoding rows in and around the window and far behind it, and slices that cross blocks and anchors."""
    contexts = [6000, 2048, 2049, 2112, 2113, 2177, 3073, 700, 5121]
    return batch_of(served, dtype, contexts, [1, 1, 1, 1, 1, 1, 1, 40, 70], 2048, 16)


def run(batch: SparseBatch) -> torch.Tensor:
    return moved(batch).run(window_sparse.window_sparse_attention).cpu()


def test_splits_are_those_that_are_served() -> None:
    """No other test of attention over two stores has them."""
    assert SPLIT_TOKENS == paged_attention.SPLIT_TOKENS == 512


@on_device
@pytest.mark.parametrize("dtype", SIXTEEN)
@pytest.mark.parametrize("served", SERVED)
def test_attention_equals_the_reference(served: Served, dtype: torch.dtype) -> None:
    batch = full_batch(served, dtype)
    assert batch.far is not None and batch.far.counts.max() == 16
    check_error(run(batch), batch.reference(), batch.run(), dtype)


@pytest.mark.parametrize(("served", "count"), [(Served(128, 4, 1, "int8"), 1), (Served(64, 5, 64, "int4"), 12)])
def test_attention_with_a_smaller_window(served: Served, count: int) -> None:
    """A list of two splits: a sink, far blocks across their border, and near ones."""
    batch = batch_of(served, torch.float16, [1100], [count], 300, 6)
    assert batch.far is not None and (batch.far.counts == 6).all()
    check_error(run(batch), batch.reference(), batch.run(), torch.float16)


@on_device
@pytest.mark.parametrize("dtype", SIXTEEN)
def test_a_fault_at_this_size_is_seen(dtype: torch.dtype) -> None:
    batch = full_batch(Served(128, 4, 1, "int8"), dtype)
    far = batch.far
    assert far is not None
    expected, plain = batch.reference(), batch.run()
    faults = {
        "scale": {"scale": batch.scale * 1.1},
        "window": {"window": batch.window - 64},
        "choice": {"far": placed(far._replace(choices=(far.choices - 1).clamp(min=1)))},
    }
    for fault in faults.values():
        wrong = moved(batch).run(window_sparse.window_sparse_attention, **fault).cpu()
        with pytest.raises(AssertionError):
            check_error(wrong, expected, plain, dtype)


def check_choices(call: Choosing) -> None:
    """The reference's counts and choices; another block only where its best product with a key is that of the one it stands for, but for
    the order of its sum, or where rounding the query to 15 bits moved a block over the border of an earlier stage."""
    positional = (call.tables, call.sequences, call.candidate_ends, call.budgets)
    store = call.blocks._replace(**{name: t.to(DEVICE) for name, t in call.blocks._asdict().items() if t is not None})
    found, counts = choose_far.choose_far(
        call.query.to(DEVICE), store, *(t.to(DEVICE) for t in positional), sink_blocks=call.sink_blocks, most=call.most
    )
    expected, expected_counts = call.run()
    assert torch.equal(counts.cpu(), expected_counts)
    grouped = call.query.unflatten(1, (expected.shape[1], -1))
    differing = (found.cpu() != expected).any(dim=2).nonzero().tolist()
    for anchor, head in differing:
        table = call.tables[int(call.sequences[anchor])]
        ours, theirs = set(found[anchor, head].tolist()), set(expected[anchor, head].tolist())
        scores = [
            sorted(reference_sparse.key_score(grouped[anchor, head], call.blocks, int(table[index]), head) for index in one - other)
            for one, other in ((ours, theirs), (theirs, ours))
        ]
        assert found[anchor, head].tolist() == sorted(ours) and min(ours) >= call.sink_blocks
        if not (theirs - ours) & at_a_border(call, anchor, head):
            torch.testing.assert_close(*(torch.tensor(side) for side in scores), rtol=1e-5, atol=1e-5)
    assert len(differing) <= 0.02 * expected.shape[0] * expected.shape[1]


def at_a_border(call: Choosing, anchor: int, head: int) -> set[int]:
    """The candidates whose bound is within 1 : 10,000 of the last that the first or the second stage keeps."""
    table, budget = call.tables[int(call.sequences[anchor])], int(call.budgets[anchor])
    query = call.query.unflatten(1, (call.blocks.bounds.shape[1], -1))[anchor, head]
    left, near = list(range(call.sink_blocks, int(call.candidate_ends[anchor]))), set()
    bounds = {index: reference_sparse.bound_scores(query, call.blocks, int(table[index]), head) for index in left}
    for stage, kept in enumerate((reference_sparse.FIRST_STAGE * budget, reference_sparse.SECOND_STAGE * budget)):
        by = {index: float(bounds[index][0] if stage == 0 else bounds[index][1:].max()) for index in left}
        left = sorted(left, key=lambda index: -by[index])
        if len(left) > kept:
            border = by[left[kept - 1]]
            near |= {index for index in left if abs(by[index] - border) <= 1e-4 * abs(border)}
        left = left[:kept]
    return near


@on_device
@pytest.mark.parametrize("dtype", (*SIXTEEN, torch.float32))
@pytest.mark.parametrize("served", SERVED)
def test_choices_are_those_of_the_reference(served: Served, dtype: torch.dtype) -> None:
    """16 of up to 93 candidates, after the best 64 and 48 of them."""
    call = batch_of(served, dtype, [6000, 8100, 2200], [24, 1, 1], 2048, 16).choosing
    assert call is not None and call.candidate_ends.max() == 94
    check_choices(call)


@pytest.mark.parametrize(("size", "store"), [(128, "int8"), (80, "int4"), (64, "native")])
def test_choices_in_sixteen_bits(size: int, store: str) -> None:
    call = batch_of(Served(size, 5, 1, store), SIXTEEN[0], [1500], [1], 128, 2).choosing
    assert call is not None and call.candidate_ends.max() == 21
    check_choices(call)


@on_device
@pytest.mark.parametrize("store", STORES)
@pytest.mark.parametrize("size", [64, 80, 96, 128, 256])
def test_blocks_in_bfloat16_are_demoted_to_the_bytes_of_the_reference(size: int, store: str) -> None:
    check_demotion(size, store, torch.bfloat16)


@pytest.mark.parametrize(("size", "store"), [(64, "int4"), (128, "int8")])
def test_blocks_of_another_type_are_demoted(size: int, store: str) -> None:
    check_demotion(size, store, torch.float16)


def check_demotion(size: int, store: str, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(size)
    keys, values = (torch.randn(5, 2, 64, size, generator=generator).to(dtype) for _ in range(2))
    near, target = torch.tensor([4, 1, 2]), torch.tensor([2, 5, 1])
    expected = make_store(6, 2, 64, (size, size), store, 4, dtype)
    found = expected._replace(**{name: t.clone().to(DEVICE) for name, t in expected._asdict().items() if t is not None})
    far_store.demote(keys.to(DEVICE), values.to(DEVICE), found, near.to(DEVICE), target.to(DEVICE))
    reference_sparse.demote(keys, values, expected, near, target)
    for name, tensor in expected._asdict().items():
        actual = getattr(found, name)
        assert (actual is None) == (tensor is None)
        assert tensor is None or torch.equal(actual.cpu().nan_to_num(nan=9.0), tensor.nan_to_num(nan=9.0)), name
