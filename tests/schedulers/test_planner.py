from __future__ import annotations

import pytest

from service.schedulers.blocks import BlockSpace
from service.schedulers.planner import Planner, Step
from service.schedulers.prefix_cache import PrefixCache
from service.schedulers.sequence import Sequence, State
from service.types.plan import Want
from tests.fakes import Far, layout
from tests.schedulers.test_blocks import make_sequence


def make_planner(blocks: int = 64, rows: int = 8, step_tokens: int = 16, cache: bool = False, windows=(None,)) -> Planner:
    space = BlockSpace(layout(4, windows), (blocks,) * len(windows))
    return Planner(space, PrefixCache(space, "digest", cache), rows, step_tokens)


def add(planner: Planner, prompt: str = "hello", max_tokens: int = 20, arrival: int = 0, **fields) -> Sequence:
    sequence = make_sequence(prompt, max_tokens, arrival, **fields)
    sequence.share = planner.waiting.enrol(sequence.request.tenant)
    planner.waiting.add(sequence)
    return sequence


def answer(planner: Planner, step: Step) -> None:
    """The step was executed: the tokens that it sampled are known."""
    for entry in step.entries:
        if entry.sequence.epoch == entry.epoch:
            entry.sequence.computed = entry.end
            if entry.slice.want & Want.TOKEN:
                entry.sequence.in_flight -= 1
                entry.sequence.tokens.append(97)
                entry.sequence.decoding = True
                planner.stop_leading(entry.sequence)


def run(planner: Planner) -> Step:
    step = planner.plan()
    assert step is not None
    answer(planner, step)
    return step


def lengths(step: Step) -> list[tuple[int, int]]:
    return [(entry.sequence.arrival, entry.slice.length) for entry in step.entries]


def test_nothing_to_do_is_no_plan():
    assert make_planner().plan() is None


def test_decode_rows_come_first_and_prefill_fills_the_budget():
    planner = make_planner()
    add(planner, "short", arrival=0)
    assert lengths(run(planner)) == [(0, 5)]
    add(planner, "l" * 40, arrival=1)
    add(planner, "m" * 6, arrival=2)
    assert lengths(run(planner)) == [(0, 1), (1, 15)]
    assert lengths(run(planner)) == [(0, 1), (1, 15)]
    assert lengths(run(planner)) == [(0, 1), (1, 10), (2, 5)]
    assert lengths(run(planner)) == [(0, 1), (1, 1), (2, 1)]


def test_a_token_is_wanted_of_the_last_chunk_only():
    planner = make_planner(step_tokens=4)
    add(planner, "l" * 10)
    assert [run(planner).plan.slices[0].want & Want.TOKEN for _ in range(4)] == [0, 0, 1, 1]


def test_plans_carry_changes_only():
    planner = make_planner()
    add(planner, "hello", 30)
    first, second = run(planner).plan, run(planner).plan
    assert len(first.open) == 1
    assert [len(change.blocks) for change in first.append] == [2]
    assert (second.open, second.append, second.release, second.close) == ((), (), (), ())
    run(planner)
    run(planner)
    assert [(change.first, len(change.blocks)) for change in run(planner).plan.append] == [(2, 1)]


def test_a_row_is_closed_before_it_is_opened_again():
    planner = make_planner(rows=1)
    first, _ = add(planner, arrival=0), add(planner, arrival=1)
    run(planner)
    planner.leave(first, State.FINISHED)
    plan = run(planner).plan
    assert plan.close == (0,)
    assert [opening.row for opening in plan.open] == [0]


def test_the_youngest_of_the_lowest_priority_is_preempted_and_comes_back():
    planner = make_planner(blocks=6, step_tokens=32)
    urgent = add(planner, "a" * 7, 12, arrival=2, priority=0)
    old = add(planner, "b" * 7, 12, arrival=0, priority=1)
    run(planner)
    preempted = False
    for _ in range(60):
        step = planner.plan()
        if step is None:
            break
        answer(planner, step)
        preempted |= old.state is State.WAITING
        assert urgent.preemptions == 0
        for sequence in (urgent, old):
            if sequence.generated >= 12 and sequence.state is State.RUNNING:
                planner.leave(sequence, State.FINISHED)
        planner.space.check(planner.running)
    assert preempted
    assert old.preemptions >= 1
    assert [sequence.state for sequence in (urgent, old)] == [State.FINISHED, State.FINISHED]


def test_preemption_takes_the_last_in_order():
    planner = make_planner(blocks=8, step_tokens=32)
    sequences = [add(planner, "a" * 5, 20, arrival=index) for index in range(2)]
    run(planner)
    while planner.preemptions == 0:
        run(planner)
    assert [sequence.state for sequence in sequences] == [State.RUNNING, State.WAITING]
    assert sequences[1].tokens[:5] == list(b"aaaaa")
    assert sequences[1].tables == []
    planner.space.check(planner.running)


def test_a_preempted_rows_changes_leave_the_plan_with_it():
    planner = make_planner(blocks=8, step_tokens=32)
    for index in range(2):
        add(planner, "a" * 5, 20, arrival=index)
    run(planner)
    while planner.preemptions == 0:
        step = run(planner)
    (closed,) = step.plan.close
    assert closed not in {piece.row for piece in step.plan.slices}
    assert closed not in {change.row for change in step.plan.append}


def test_a_sequence_behind_one_that_does_not_fit_waits_its_turn():
    planner = make_planner(blocks=10, step_tokens=64)
    add(planner, "a" * 16, 20, arrival=0)
    run(planner)
    big, small = add(planner, "b" * 30, 5, arrival=1), add(planner, "c", 5, arrival=2)
    step = run(planner)
    assert lengths(step) == [(0, 1)]
    assert (big.state, small.state) == (State.WAITING, State.WAITING)


@pytest.mark.parametrize(("max_tokens", "together"), [(2, 4), (3, 2)])
def test_what_stays_within_its_window_needs_no_room_in_the_far_group(max_tokens, together):
    """Blocks of 4 and a window of 8: the first far block is wanted at position 15, the sixteenth."""
    space = BlockSpace(layout(4, (Far(8),)), (64, 1))
    assert space.blocks_for(15) == (4, 0) and space.blocks_for(16) == (4, 1)
    planner = Planner(space, PrefixCache(space, "digest", False), 8, 64)
    for index in range(4):
        add(planner, prompt=f"{index} fourteen byt", max_tokens=max_tokens, arrival=index)
    assert len(run(planner).entries) == together


def test_the_same_prompt_waits_for_the_one_that_computes_it():
    planner = make_planner(cache=True)
    first, second, other = (add(planner, prompt * 9, arrival=index) for index, prompt in enumerate("aab"))
    assert lengths(run(planner)) == [(0, 9), (2, 7)]
    first.computed = 9
    planner.cache.prove(first)
    assert lengths(run(planner)) == [(0, 1), (2, 2), (1, 1)]
    assert second.cached_tokens == 8
    assert other.cached_tokens == 0


def test_a_suspect_runs_alone_until_it_is_cleared():
    planner = make_planner()
    sequences = [add(planner, arrival=index) for index in range(3)]
    planner.suspect(sequences[1], 6)
    assert lengths(run(planner)) == [(1, 5)]
    assert lengths(run(planner)) == [(1, 1)]
    planner.clear_suspect(sequences[1])
    assert lengths(run(planner)) == [(1, 1), (0, 5), (2, 5)]


def test_run_ahead_never_passes_max_tokens():
    planner = make_planner()
    sequence = add(planner, "hello", 3)
    steps = [planner.plan() for _ in range(4)]
    assert [step is not None for step in steps] == [True, True, True, False]
    assert (sequence.in_flight, sequence.scheduled) == (3, 7)


def test_a_windowed_sequence_with_little_memory_is_prefilled_in_small_chunks():
    planner = make_planner(blocks=3, step_tokens=64, windows=(6,))
    sequence = add(planner, "l" * 50, 5)
    for _ in range(20):
        run(planner)
        planner.space.check(planner.running)
        if sequence.generated:
            break
    assert sequence.generated == 1
    assert planner.preemptions == 0
