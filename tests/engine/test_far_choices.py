"""Anchors by a plain recount, and choices that are kept from step to step only when a step succeeds."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from service.engine.batch import Tables
from service.engine.far_choices import Anchors, FarChoices, StepChoices, find_anchors
from service.kernels.reference_sparse import FarBlocks
from service.types.kv_layout import FarSpec, KvGroup, KvLayout
from service.types.plan import BatchPlan, BlockAppend, OpenSequence, Slice
from service.types.request import Sampling, Stop

CONTEXT = 120


def layout_of(spec: FarSpec, window: int = 20) -> KvLayout:
    near = KvGroup("near", (0, 1), 2, 4, 4, window, spec)
    return KvLayout((near, replace(near, name="far", source=0)), block_tokens=8)


def anchors_of(layout: KvLayout, slices: list[Slice], prompt: int = CONTEXT) -> tuple[Anchors, Tables]:
    tables = Tables(layout, (400, 400), 6, CONTEXT, 10)
    for piece in slices:
        opening = OpenSequence(piece.row, (1,) * CONTEXT, prompt, Sampling(), Stop(max_tokens=9))
        tables.apply(BatchPlan(0, open=(opening,), append=(BlockAppend(piece.row, 0, 0, tuple(range(1, 16))),)))
    group = layout.groups[1]
    assert group.far is not None
    return find_anchors(tables.batch(slices), group, group.far, layout.block_tokens), tables


@settings(max_examples=80, deadline=None)
@given(st.data(), st.sampled_from([1, 2, 4, 8]), st.integers(0, 4), st.booleans())
def test_anchors_are_what_a_loop_over_tokens_gives(data: st.DataObject, refresh: int, blocks: int, dense: bool) -> None:
    spec = FarSpec(blocks=blocks, refresh=refresh, dense_prompts=dense)
    layout, prompt = layout_of(spec), data.draw(st.integers(1, CONTEXT))
    slices = []
    for row in range(data.draw(st.integers(1, 4))):
        start = data.draw(st.integers(0, CONTEXT - 1))
        slices.append(Slice(row, start, data.draw(st.integers(1, CONTEXT - start)), 0))
    found, _ = anchors_of(layout, slices, prompt)
    token, read = 0, 0
    for index, piece in enumerate(slices):
        for position in range(piece.start, piece.start + piece.length):
            anchor, at = position - position % refresh, int(found.of_tokens[token])
            candidates = max(layout.first_read(layout.groups[0], anchor) - 1, 0)
            budget = candidates if dense and anchor < prompt else spec.budget(anchor)
            assert found.ends[at] - 1 == candidates or candidates == 0
            assert found.counts[at] == min(candidates, budget) and found.sequences[at] == index
            assert found.fresh[at] == (anchor >= piece.start or candidates <= budget)
            first = int(found.tokens[at])
            assert token - first == position - max(anchor, piece.start)
            read += int(found.counts[at])
            token += 1
        assert found.last[index] == found.of_tokens[token - 1]
    assert found.read == read


def test_a_choice_lasts_until_the_next_anchor_and_only_if_the_step_succeeded() -> None:
    """Choices are numbered by the call that made them: an aborted step leaves none."""
    spec = FarSpec(blocks=2, refresh=8)
    layout, calls = layout_of(spec), 0
    kept = FarChoices(layout, 6, torch.device("cpu"))

    def choose(query: Tensor, *arguments: object, **_: int) -> tuple[Tensor, Tensor]:
        nonlocal calls
        calls += 1
        return torch.full((len(query), 2, 2), calls, dtype=torch.int32), torch.zeros(len(query), dtype=torch.int32)

    def step(start: int, length: int, succeed: bool = True) -> list[int]:
        slices = [Slice(3, start, length, 0)]
        anchors, tables = anchors_of(layout, slices)
        chosen = StepChoices(anchors, 1, kept, tables.batch(slices), torch.zeros(1, 15, dtype=torch.int32), choose)
        blocks = FarBlocks(*[torch.zeros(0)] * 7)
        far = chosen.of(1, torch.zeros(length, 4, 4), blocks, 1)
        if succeed:
            chosen.keep()
        return far.choices[far.anchors, 0, 0].tolist()

    assert step(100, 6) == [-1] * 4 + [1, 1], "nothing was kept for the anchor at 96"
    assert step(106, 1) == [1]
    assert step(107, 8, succeed=False) == [1] * 5 + [2] * 3
    assert step(107, 8) == [1] * 5 + [3] * 3
    assert step(115, 1) == [3] and calls == 3


@pytest.mark.parametrize("dense", [False, True])
def test_whose_budget_covers_all_candidates_asks_nothing(dense: bool) -> None:
    """The first tokens of a prompt; with dense prompts all of it, so that only generated tokens ask, with their own budget."""
    layout = layout_of(FarSpec(blocks=2, dense_prompts=dense))
    slices = [Slice(0, 30, 80, 0)]
    anchors, tables = anchors_of(layout, slices, 100)
    asked = []

    def choose(query: Tensor, *arguments: object, most: int, **_: int) -> tuple[Tensor, Tensor]:
        asked.append((len(query), most))
        return torch.full((len(query), 2, most), 99, dtype=torch.int32), torch.zeros(len(query), dtype=torch.int32)

    kept = FarChoices(layout, 6, torch.device("cpu"))
    chosen = StepChoices(anchors, 1, kept, tables.batch(slices), torch.zeros(1, 15, dtype=torch.int32), choose)
    far = chosen.of(0, torch.zeros(80, 4, 4), FarBlocks(*[torch.zeros(0)] * 7), 1)
    assert far.choices.shape[2] == anchors.counts.max()
    whole = anchors.counts == np.maximum(anchors.ends - 1, 0)
    assert asked == [(int((~whole).sum()), 2)] and 0 < whole.sum() < 80 and (not dense or whole[:70].all())
    for anchor, (count, all_of_them) in enumerate(zip(anchors.counts.tolist(), whole.tolist(), strict=True)):
        found = far.choices[anchor, 1].tolist()
        assert found[:count] == (list(range(1, 1 + count)) if all_of_them else [99] * count) and set(found[count:]) <= {-1}


def test_kept_choices_are_those_of_the_row_and_the_layer() -> None:
    kept = FarChoices(layout_of(FarSpec(blocks=3)), 4, torch.device("cpu"))
    choices = torch.arange(12, dtype=torch.int32).view(2, 1, 2, 3)
    kept.keep(1, torch.tensor([2]), choices)
    assert torch.equal(kept.of(1, torch.tensor([2, 0])), torch.cat((choices, torch.full_like(choices, -1)), dim=1))


def test_a_call_that_chooses_itself_is_given_what_earlier_steps_chose() -> None:
    layout = layout_of(FarSpec(blocks=2, refresh=8))
    kept = FarChoices(layout, 6, torch.device("cpu"))
    kept.keep(1, torch.tensor([3]), torch.arange(8, dtype=torch.int32).view(2, 1, 2, 2))
    slices = [Slice(3, 100, 6, 0)]
    anchors, tables = anchors_of(layout, slices)
    chosen = StepChoices(anchors, 1, kept, tables.batch(slices), torch.zeros(1, 15, dtype=torch.int32), choose_nothing)
    step = chosen.step
    assert step.choices[:, 0].flatten().tolist() == list(range(8)) and (step.choices[:, 1] == -1).all()
    assert step.places.tolist() == [1] and step.query_rows.tolist() == [4] and step.sequences.tolist() == [0]
    step.choices[:, 1] = 5
    chosen.keep()
    assert (kept.of(1, torch.tensor([3])) == 5).all()


def choose_nothing(query: Tensor, *arguments: object, **_: int) -> tuple[Tensor, Tensor]:
    raise AssertionError("the call chooses")


def test_budgets_grow_with_the_position() -> None:
    positions = np.array([32767, 32768])
    layout = replace(layout_of(FarSpec(), 2048), block_tokens=64)
    tables = Tables(layout, (4000, 4000), 2, 40000, 10)
    for row, position in enumerate(positions.tolist()):
        opening = OpenSequence(row, (1,) * (position + 1), 1, Sampling(), Stop(max_tokens=9))
        tables.apply(BatchPlan(0, open=(opening,), append=(BlockAppend(row, 0, 0, tuple(range(1, 600))),)))
    found = find_anchors(tables.batch([Slice(0, 32767, 1, 0), Slice(1, 32768, 1, 0)]), layout.groups[1], FarSpec(), 64)
    assert found.counts.tolist() == [16, 32] and found.ends.tolist() == [480, 480]
