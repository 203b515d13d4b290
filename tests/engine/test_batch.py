"""Tables and flat batches against a plain recount, one token at a time."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.engine.batch import PlanError, Tables
from service.types.kv_layout import FarSpec, KvGroup, KvLayout
from service.types.plan import BatchPlan, BlockAppend, BlockDemote, BlockRelease, OpenSequence, Slice, Want
from service.types.request import Sampling, Stop

LAYOUT = KvLayout((KvGroup("full", (0,), 1, 4, 4), KvGroup("window5", (1,), 1, 4, 4, 5)), block_tokens=4)
CONTEXT, ROWS = 40, 6


def tables_with(lengths) -> Tables:
    """Rows 0, 1, … with tokens row · 100 + position, and blocks group · 200 + row · 10 + index + 1."""
    tables = Tables(LAYOUT, (400, 400), ROWS, CONTEXT, 1000)
    for row, length in enumerate(lengths):
        tokens = tuple(row * 100 + at for at in range(length))
        sequence = OpenSequence(row, tokens, max(1, length - 2), Sampling(), Stop(max_tokens=9))
        appends = tuple(BlockAppend(row, group, 0, tuple(group * 200 + row * 10 + at + 1 for at in range(10))) for group in (0, 1))
        tables.apply(BatchPlan(0, open=(sequence,), append=appends))
    return tables


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_a_batch_is_what_a_loop_over_tokens_gives(data) -> None:
    lengths = data.draw(st.lists(st.integers(1, CONTEXT), min_size=1, max_size=ROWS))
    tables = tables_with(lengths)
    slices = []
    for row in data.draw(st.permutations(range(len(lengths)))):
        start = data.draw(st.integers(0, lengths[row] - 1))
        slices.append(Slice(row, start, data.draw(st.integers(1, lengths[row] - start)), data.draw(st.integers(0, 3))))
    batch = tables.batch(slices)
    flat = [(piece.row, at) for piece in slices for at in range(piece.start, piece.start + piece.length)]
    assert batch.tokens.tolist() == [row * 100 + at for row, at in flat]
    assert batch.positions.tolist() == [at for _, at in flat]
    assert batch.offsets.tolist() == [at % 4 for _, at in flat]
    for group in (0, 1):
        assert batch.block_ids[group].tolist() == [group * 200 + row * 10 + at // 4 + 1 for row, at in flat]
        for index, piece in enumerate(slices):
            used = -(-(piece.start + piece.length) // 4)
            expected = [group * 200 + piece.row * 10 + at + 1 for at in range(used)]
            assert batch.block_tables[group][index, :used].tolist() == expected
    assert batch.query_starts.tolist() == np.cumsum([0, *(piece.length for piece in slices)]).tolist()
    assert batch.context_lengths.tolist() == [piece.start + piece.length for piece in slices]
    assert batch.sampled.tolist() == [index for index, piece in enumerate(slices) if piece.want & Want.TOKEN]
    assert batch.scored.tolist() == [index for index, piece in enumerate(slices) if piece.want & Want.PROMPT_LOGPROBS]
    assert {array.dtype for array in (*batch.block_tables, batch.query_starts, batch.context_lengths)} == {np.dtype(np.int32)}


def test_a_sampled_token_is_there_for_a_plan_sent_ahead() -> None:
    tables = tables_with([5])
    tables.record(np.array([0]), np.array([5]), np.array([777]))
    assert tables.batch([Slice(0, 5, 1, 1)]).tokens.tolist() == [777]
    tables.record(np.array([0]), np.array([6]), np.array([-1]))
    assert tables.batch([Slice(0, 6, 1, 1)]).tokens.tolist() == [0]


def test_release_makes_null_entries_of_one_group_and_close_forgets_the_row() -> None:
    tables = tables_with([20])
    tables.apply(BatchPlan(1, release=(BlockRelease(0, 1, 3),)))
    assert tables.blocks[1][0].tolist() == [0, 0, 0, *range(204, 211)]
    assert tables.blocks[0][0].tolist() == list(range(1, 11))
    again = OpenSequence(0, (1, 2), 2, Sampling(), Stop(max_tokens=9))
    tables.apply(BatchPlan(2, close=(0,), open=(again,), append=(BlockAppend(0, 0, 0, (9,)),)))
    assert tables.blocks[0][0].tolist() == [9] + [0] * 9
    assert not tables.blocks[1][0].any()
    assert tables.known[0] == 2


def test_sinks_stay_and_far_tables_hold_no_tokens() -> None:
    near = KvGroup("near", (0,), 1, 4, 4, 9, FarSpec(sub_block_tokens=2))
    tables = Tables(KvLayout((near, replace(near, name="far", source=0)), block_tokens=4), (40, 40), ROWS, CONTEXT, 1000)
    opening = OpenSequence(2, tuple(range(24)), 20, Sampling(), Stop(max_tokens=9))
    near_blocks, far_blocks = BlockAppend(2, 0, 0, (1, 2, 3, 4, 5, 6)), BlockAppend(2, 1, 1, (7, 8))
    plan = BatchPlan(0, open=(opening,), append=(near_blocks, far_blocks), release=(BlockRelease(2, 0, 3),))
    tables.apply(replace(plan, demote=(BlockDemote(2, 1, (2, 3), (7, 8)),)))
    assert tables.blocks[0][2, :6].tolist() == [1, 0, 0, 4, 5, 6]
    batch = tables.batch([Slice(2, 20, 3, 0)])
    assert batch.block_ids[0].tolist() == [6, 6, 6] and not len(batch.block_ids[1])
    assert batch.block_tables[1].tolist() == [[0, 7, 8, 0, 0, 0]] and batch.prompt_tokens.tolist() == [20]


SENSELESS = (
    BlockDemote(0, 0, (1,), (2,)),
    BlockDemote(0, 1, (1,), (2, 3)),
    BlockDemote(0, 1, (41,), (2,)),
    BlockDemote(0, 1, (1,), (0,)),
)


@pytest.mark.parametrize("demote", SENSELESS)
def test_demotions_that_make_no_sense_are_refused(demote: BlockDemote) -> None:
    near = KvGroup("near", (0,), 1, 4, 4, 9, FarSpec(sub_block_tokens=2))
    tables = Tables(KvLayout((near, replace(near, name="far", source=0)), block_tokens=4), (40, 40), ROWS, CONTEXT, 1000)
    with pytest.raises(PlanError):
        tables.apply(BatchPlan(0, demote=(demote,)))
