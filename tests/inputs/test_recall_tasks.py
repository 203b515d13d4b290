"""Questions about what stands far back: facts where they were asked to be, answers that cannot be guessed, the same for the same seed."""

from __future__ import annotations

import re

import pytest

from service.inputs.recall_tasks import HOPS, KEYS, TASKS, commonest_name, many_needles, single_needle, traced_variable

FILLER = [f"line {number}" for number in range(100)]


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.__name__)
def test_the_same_seed_gives_the_same_case_and_no_filler_is_lost(task) -> None:
    case = task(FILLER, 0.5, 3)
    assert case == task(FILLER, 0.5, 3) and case.prompt != task(FILLER, 0.5, 4).prompt
    lines = case.prompt.splitlines()
    assert [line for line in lines if line.startswith("line ")] == FILLER
    assert lines[-1].endswith("# prints") and case.answer not in lines[-1] and case.depth == 0.5


@pytest.mark.parametrize("depth", [0.0, 0.3, 0.9])
def test_a_needle_stands_at_its_depth(depth: float) -> None:
    case = single_needle(FILLER, depth, 1)
    lines = case.prompt.splitlines()
    name = re.search(r"print\((\w+)\)", lines[-1])[1]  # type: ignore[index]
    assert lines.index(f"{name} = {case.answer}") == int(depth * 101)
    assert case.prompt.count(case.answer) == 1


def test_many_needles_have_different_names_and_one_is_asked() -> None:
    case = many_needles(FILLER, 0.4, 2)
    facts = dict(re.findall(r"^(\w+) = (\d+)$", case.prompt, re.MULTILINE))
    assert len(facts) == KEYS
    assert facts[re.search(r"print\((\w+)\)", case.prompt)[1]] == case.answer  # type: ignore[index]


def test_a_chain_leads_to_its_value_in_order() -> None:
    case = traced_variable(FILLER, 0.2, 5)
    facts = re.findall(r"^(\w+) = (\w+)$", case.prompt, re.MULTILINE)
    assert len(facts) == HOPS + 1 and facts[0][1] == case.answer
    assert [source for _, source in facts[1:]] == [name for name, _ in facts[:-1]]
    assert f"print({facts[-1][0]})" in case.prompt


def test_the_commonest_name_is_called_most() -> None:
    case = commonest_name(FILLER, 0.0, 7)
    calls = re.findall(r"^count\((\w+)\)$", case.prompt, re.MULTILINE)
    numbers = sorted((calls.count(name) for name in set(calls)), reverse=True)
    assert calls.count(case.answer) == numbers[0] > numbers[1]
