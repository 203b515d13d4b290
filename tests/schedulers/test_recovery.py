from __future__ import annotations

import pytest

from service.schedulers.recovery import backoff_s, blame, start_again
from service.schedulers.sequence import State
from tests.fakes import run_virtual
from tests.schedulers.support import small_backend
from tests.schedulers.test_planner import add, make_planner


def test_a_second_death_in_company_makes_a_suspect_and_a_third_alone_a_killer():
    planner = make_planner()
    first, second = add(planner, "one", arrival=0), add(planner, "two", arrival=1)
    step = planner.plan()
    assert step is not None and blame([step], planner) == []
    assert (first.deaths, second.deaths, first.suspect_until) == (1, 1, 0)
    assert blame([step], planner) == []
    assert first.suspect_until == second.suspect_until == 3
    assert blame([step], planner) == [first, second]
    assert (first.deaths, second.deaths) == (2, 2)


def test_one_death_counts_once_however_many_steps_were_outstanding():
    planner = make_planner()
    sequence = add(planner, "p" * 40)
    steps = [planner.plan(), planner.plan()]
    assert blame([step for step in steps if step is not None], planner) == []
    assert (sequence.deaths, sequence.died_at) == (1, 32)


def test_who_left_before_the_death_is_not_blamed():
    planner = make_planner()
    sequence = add(planner)
    step = planner.plan()
    planner.leave(sequence, State.WAITING)
    assert step is not None and blame([step], planner) == [] and sequence.deaths == 0


def test_waiting_doubles_and_is_bounded():
    assert [backoff_s(deaths) for deaths in (0, 1, 2, 3, 4, 5, 6, 7, 50)] == [0.0, 0.0, 0.5, 1.0, 2.0, 4.0, 8.0, 8.0, 8.0]


@pytest.mark.parametrize(("failing", "starts"), [(0, 1), (5, 1), (6, 0)])
def test_starting_again_is_tried_six_times(failing, starts, capsys):
    backend = small_backend(failing_starts=failing)
    info = run_virtual(start_again(backend, "v@1", 1))
    assert (info is backend.info, backend.starts) == (bool(starts), starts)


def test_a_refusal_is_final():
    backend = small_backend(refuses_to_start=True)
    assert run_virtual(start_again(backend, "v@1", 1)) is None
    assert backend.starts == 0
