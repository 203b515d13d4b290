from __future__ import annotations

import itertools

import pytest

from service.schedulers.sequence import MOVES, InvariantBroken, State
from tests.schedulers.test_blocks import make_sequence


@pytest.mark.parametrize(("origin", "to"), list(itertools.product(State, State)))
def test_only_the_moves_of_the_table_are_legal(origin, to):
    sequence = make_sequence()
    sequence.state = origin
    if to in MOVES[origin]:
        sequence.move(to)
        assert sequence.state is to
    else:
        with pytest.raises(InvariantBroken):
            sequence.move(to)


def test_nothing_leaves_finished():
    assert MOVES[State.FINISHED] == frozenset()
    assert all(State.FINISHED in MOVES[state] for state in State if state is not State.FINISHED)


def test_the_gap_closes_by_chunks_and_opens_by_tokens():
    sequence = make_sequence("hello", 3)
    assert sequence.gap == 5
    sequence.dispatch(3, samples=False)
    assert sequence.gap == 2
    sequence.dispatch(2, samples=True)
    assert (sequence.gap, sequence.length, sequence.generated) == (1, 6, 0)
    sequence.dispatch(1, samples=True)
    sequence.dispatch(1, samples=True)
    assert (sequence.gap, sequence.length) == (0, 8), "the last token allowed is never computed"


def test_withdrawing_keeps_tokens_and_loses_the_place():
    sequence = make_sequence("hello", 3)
    sequence.move(State.RUNNING)
    sequence.dispatch(5, samples=True)
    sequence.tokens.append(97)
    sequence.withdraw(State.WAITING)
    assert (sequence.gap, sequence.epoch, sequence.in_flight, sequence.generated) == (6, 1, 0, 1)
    assert sequence.state is State.WAITING


def test_a_score_only_sequence_computes_its_prompt():
    assert make_sequence("hello", 0, prompt_logprobs=0).gap == 5
