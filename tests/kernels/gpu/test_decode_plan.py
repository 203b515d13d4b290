"""Plans found on the device: the bits of plans from the host, and launches that stay right when they are replayed for other lengths."""

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

from service.engine.cuda_graph import CudaRecorder
from service.kernels import splits
from service.kernels.gpu import choose_far, decode_plan, kv_store, window_sparse
from service.kernels.gpu import paged_attention as kernel
from service.kernels.reference_sparse import ChosenFar, FarBlocks
from tests.kernels.conftest import PagedBatch, make_batch
from tests.kernels.gpu.conftest import COMPILED, DEVICE, moved
from tests.kernels.sparse_batches import SparseBatch, make_sparse

CONTEXTS = [150, 1, 70, 33, 17]
PLANS = {"splits": decode_plan.plan_decode, "tiles": decode_plan.plan_decode_tiles}
HOST = {"splits": (kernel.plan_attention, window_sparse.plan_sparse), "tiles": (kernel.plan_tiles, window_sparse.plan_sparse_tiles)}


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Splits of two blocks, and products that compute each row by itself."""
    for module in (kernel, decode_plan, splits):
        monkeypatch.setattr(module, "SPLIT_TOKENS", 32)
    if not COMPILED:
        monkeypatch.setattr(np, "matmul", lambda a, b, dtype: np.einsum("ij,jk->ik", a, b, dtype=dtype))
        monkeypatch.setattr(kernel, "tile_of", lambda dtype, size, capability: kernel.Tile(16, 4, 1))


def run(batch: PagedBatch, plan: Any) -> Tensor:
    return batch.run(lambda *tensors, **scoring: kernel.paged_attention(*tensors, **scoring, plan=plan))


@pytest.mark.parametrize("name", PLANS)
@pytest.mark.parametrize("window", [None, 1, 33, 40])
@pytest.mark.parametrize("most", [150, 400])
def test_attention_has_the_bits_of_a_plan_from_the_host(window: int | None, most: int, name: str) -> None:
    batch = moved(make_batch(CONTEXTS, [1] * 5, block_tokens=16, window=window))
    arguments = batch.block_tables, batch.query_starts.cpu(), batch.context_lengths.cpu()
    expected = run(batch, HOST[name][0](*arguments, block_tokens=16, window=window))
    found = run(batch, PLANS[name](batch.context_lengths, most_tokens=most, window=window))
    assert torch.equal(found, expected) and expected.isfinite().all()


@pytest.mark.parametrize("name", PLANS)
@pytest.mark.parametrize("store", ["int8", "evict"])
def test_attention_over_two_stores_too(store: str, name: str) -> None:
    batch = moved(make_sparse(CONTEXTS, [1] * 5, block_tokens=16, window=40, store=store))
    lengths = batch.context_lengths

    def attend(*tensors: Any, **rule: Any) -> Tensor:
        return window_sparse.window_sparse_attention(*tensors, **rule, plan=plan)

    rule = {"far": None, "block_tokens": 16, "window": 40, "refresh": 1, "sink_blocks": 1}
    plan = HOST[name][1](batch.near_tables, batch.query_starts.cpu(), lengths.cpu(), **rule)
    expected = batch.run(attend)
    plan = PLANS[name](lengths, most_tokens=150, window=40)
    assert torch.equal(batch.run(attend), expected)


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 5000), st.one_of(st.none(), st.integers(1, 3000)), st.data())
def test_no_context_has_more_splits_than_there_is_room_for(most: int, window: int | None, data: st.DataObject) -> None:
    contexts = torch.tensor([*data.draw(st.lists(st.integers(1, most), min_size=1, max_size=4)), most], dtype=torch.int32)
    tile = kernel.Tile(16, 4, 1)
    found = decode_plan.DecodePlan(contexts, most, window, tiled=False).dense(2, tile)
    starts = torch.arange(len(contexts) + 1, dtype=torch.int32)
    expected = kernel.AttentionPlan(starts, contexts, contexts.device, window).dense(2, tile)
    assert found.split_ends.tolist() == expected.split_ends.tolist()
    assert int(found.split_ends[-1]) <= found.splits == len(contexts) * splits.most_splits(most, window)


@pytest.mark.parametrize("name", PLANS)
def test_a_replay_is_right_for_other_lengths(name: str) -> None:
    """A step's write and its attention, recorded for one set of lengths and replayed for two others."""
    steps = [moved(make_batch(contexts, [1] * 3, block_tokens=16, poison=0.0, seed=seed)) for seed, contexts in enumerate(
        ([5, 33, 16], [150, 1, 64], [97, 96, 95])
    )]  # fmt: skip
    blocks, width = max(len(step.key_blocks) for step in steps), max(step.block_tables.shape[1] for step in steps)
    fixed = replace(
        steps[0],
        key_blocks=torch.zeros(blocks, *steps[0].key_blocks.shape[1:], device=DEVICE),
        value_blocks=torch.zeros(blocks, *steps[0].value_blocks.shape[1:], device=DEVICE),
        block_tables=torch.zeros(3, width, dtype=torch.int32, device=DEVICE),
    )
    key, value = (torch.zeros(3, 2, 16, device=DEVICE) for _ in range(2))
    ids, offsets = (torch.zeros(3, dtype=torch.int32, device=DEVICE) for _ in range(2))

    def work() -> Tensor:
        kv_store.write_kv(key, value, fixed.key_blocks, fixed.value_blocks, ids, offsets)
        return run(fixed, PLANS[name](fixed.context_lengths, most_tokens=160, window=None))

    replay = None
    for step in steps:
        last = step.context_lengths - 1
        ids.copy_(step.block_tables[torch.arange(3, device=DEVICE), last // 16])
        offsets.copy_(last % 16)
        expected = step.run(kernel.paged_attention)
        for name_of, stored in (("key_blocks", key), ("value_blocks", value)):
            there, where = getattr(step, name_of), (ids.long(), slice(None), offsets.long())
            stored.copy_(there[where])
            target = getattr(fixed, name_of)
            target.zero_()[: len(there)] = there
            target[where] = 7.0  # only the recorded write puts the step's own keys and values in
        for tensor in ("query", "context_lengths"):
            getattr(fixed, tensor).copy_(getattr(step, tensor).clone())
        fixed.block_tables.zero_()[:, : step.block_tables.shape[1]] = step.block_tables
        if replay is None:
            work()
            replay = CudaRecorder().record(work)
        assert torch.equal(replay(), expected), "what is replayed depends on the lengths of the recording"


def arrays(step: SparseBatch) -> list[Tensor]:
    """What a recorded step of rows that choose far blocks finds at fixed places."""
    far, choosing = step.far, step.choosing
    assert far is not None and choosing is not None
    store = [tensor for tensor in far.blocks if tensor is not None]
    near = (step.query, step.key_blocks, step.value_blocks, step.near_tables, step.context_lengths)
    return [*near, far.counts, choosing.candidate_ends.to(DEVICE), far.tables, *store]


def test_a_replay_keeps_nothing_of_the_sequences_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """Choices and attention, recorded and replayed for other sequences: a row has more or fewer far blocks than its place had before.

    Workspaces are as the sequences before left them, which poison, written anew by each replay, would hide.
    """
    rule: dict[str, Any] = {"block_tokens": 16, "heads": 2, "kv_heads": 1, "window": 24, "refresh": 1}
    before, after = (moved(make_sparse(contexts, [1] * 3, **rule, seed=contexts[0])) for contexts in ([150, 70, 38], [38, 150, 70]))
    assert (before.far.counts.tolist(), after.far.counts.tolist()) == ([2, 1, 0], [0, 2, 1])
    fixed, order = [tensor.clone() for tensor in arrays(before)], torch.arange(3, device=DEVICE)
    budgets, starts = torch.full((3,), 2, dtype=torch.int32, device=DEVICE), before.query_starts

    def work() -> Tensor:
        query, keys, values, near_tables, lengths, counts, ends, tables, *store = fixed
        blocks = FarBlocks(*store)
        choices, _ = choose_far.choose_far(query, blocks, tables, order, ends, budgets, sink_blocks=1, most=2)
        plan, far = decode_plan.plan_decode(lengths, most_tokens=160, window=24), ChosenFar(blocks, tables, choices, counts, order, 2)
        here: dict[str, Any] = {"far": far, "scale": before.scale, "window": 24, "refresh": 1, "sink_blocks": 1, "plan": plan}
        return window_sparse.window_sparse_attention(query, keys, values, near_tables, starts, lengths, **here)

    work()
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    replay = CudaRecorder().record(work)
    for here, there in zip(fixed, arrays(after), strict=True):
        here.copy_(there)
    expected = after.run(window_sparse.window_sparse_attention)
    assert torch.equal(replay(), expected), "what is replayed depends on the sequences before"
    stale = after.far._replace(choices=before.far.choices.clamp(min=1))
    assert not torch.equal(after.run(window_sparse.window_sparse_attention, far=stale), expected)
