"""Batches that belong to nobody reach what kernels do differently: far blocks to choose from, more than one piece of a row, one row."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from service.engine.far_choices import find_anchors
from service.engine.idle_batches import SLICE_TOKENS, idle_batch, idle_batches
from service.kernels.splits import SPLIT_TOKENS
from service.types.catalog import V2_3, V5_2
from service.types.kv_layout import FarSpec


def test_a_slice_and_a_row_choose_among_more_blocks_than_they_may_read() -> None:
    layout = V5_2.spec(dict(V5_2.shapes)["reference"]).kv_layout()
    within, behind, row, again = idle_batches(layout, 16_384)
    assert [len(batch.tokens) for batch in (within, behind, row, again)] == [SLICE_TOKENS, SLICE_TOKENS, 1, 1]
    far = [group for group in layout.groups if group.source is not None and group.far is not None]
    assert far and isinstance(far[0].far, FarSpec)
    for batch in (behind, row):
        anchors = find_anchors(batch, far[0], far[0].far, layout.block_tokens)
        assert (anchors.counts == anchors.budgets).all() and (anchors.ends - far[0].far.sink_blocks > anchors.budgets).all()
    assert (find_anchors(within, far[0], far[0].far, layout.block_tokens).counts == 0).all()


def test_a_generated_token_chooses_where_prompts_read_everything() -> None:
    group = V5_2.spec(dict(V5_2.shapes)["reference"]).kv_layout().groups[-1]
    assert group.far is not None and group.source is not None
    dense = replace(group.far, dense_prompts=True)
    layout = V5_2.spec(dict(V5_2.shapes)["reference"]).kv_layout()
    _, behind, row, _ = idle_batches(layout, 16_384)
    candidates = [find_anchors(batch, group, dense, layout.block_tokens) for batch in (behind, row)]
    asks = [(found.ends - dense.sink_blocks > found.counts) for found in candidates]
    assert not asks[0].any() and asks[1].all()


def test_a_row_is_read_in_pieces_where_nothing_is_far() -> None:
    layout = V2_3.spec(dict(V2_3.shapes)["nano"]).kv_layout()
    assert idle_batches(layout, 4096)[-1].context_lengths[0] > 2 * SPLIT_TOKENS


@pytest.mark.parametrize("most", [1, 20, 48, 49, 700])
def test_short_contexts_are_not_left(most: int) -> None:
    layout = V5_2.spec(dict(V5_2.shapes)["nano"]).kv_layout()
    for batch in idle_batches(layout, most):
        assert batch.positions.min() >= 0 and batch.positions.max() < most
        assert batch.context_lengths[0] == batch.positions[-1] + 1 and batch.query_starts[1] == len(batch.tokens) > 0


def test_all_tokens_lie_in_block_one() -> None:
    layout = replace(V5_2.spec(dict(V5_2.shapes)["nano"]).kv_layout(), block_tokens=16)
    batch = idle_batch(layout, 30, 40)
    assert len(batch.block_tables) == len(batch.block_ids) == len(layout.groups)
    assert all((table == 1).all() and table.shape == (1, 5) for table in batch.block_tables)
    assert all((ids == 1).all() for ids in batch.block_ids) and np.array_equal(batch.offsets, np.arange(30, 70) % 16)
