from __future__ import annotations

from dataclasses import dataclass, field

import pytest

from service.schedulers.accounting import Accounting
from service.schedulers.apply import Application
from service.schedulers.planner import Planner, Step
from service.schedulers.sequence import InvariantBroken, Sequence, State
from service.telemetry import Telemetry
from service.types.errors import NumericalFailure, ServiceError
from service.types.plan import PromptLogprobs, SampledToken, StepResult, Want
from service.types.request import FinishReason, PromptEvent, TokenEvent, TokenLogprob
from service.types.settings import SchedulerSettings
from tests.fakes import END_ID, fake_spec
from tests.schedulers.test_planner import add, make_planner


@dataclass
class Bench:
    """An application over a planner; endings are kept, and take the sequence out as the loop does."""

    planner: Planner = field(default_factory=make_planner)
    endings: list[tuple[Sequence, FinishReason, ServiceError | None, str | int | None]] = field(default_factory=list)

    def __post_init__(self) -> None:
        metrics = Telemetry().version("v", "cpu", "none")
        self.application = Application(self.planner, Accounting(metrics, fake_spec(), "float32", SchedulerSettings()), self.end)

    def end(self, sequence, reason, error=None, matched=None) -> None:
        self.planner.leave(sequence, State.FINISHED)
        self.endings.append((sequence, reason, error, matched))

    def plan(self) -> Step:
        step = self.planner.plan()
        assert step is not None
        return step

    def apply(self, step: Step, *tokens: int, scores: tuple[PromptLogprobs, ...] = (), failure: str | None = None) -> None:
        rows = [entry.slice.row for entry in step.entries if entry.slice.want & Want.TOKEN]
        sampled = tuple(SampledToken(row, token, None, failure) for row, token in zip(rows, tokens, strict=True))
        self.application.apply(step, StepResult(step.plan.step, sampled, scores), 5.0)


def scored(count: int) -> tuple[TokenLogprob, ...]:
    return tuple(TokenLogprob(at, -0.5, ()) for at in range(count))


def test_a_prompt_in_two_pieces_then_a_decode():
    bench = Bench()
    sequence = add(bench.planner, "p" * 20)
    bench.apply(bench.plan())
    assert (sequence.computed, sequence.generated, sequence.decoding) == (16, 0, False)
    bench.apply(bench.plan(), 97)
    bench.apply(bench.plan(), 98)
    assert (sequence.computed, sequence.generated, sequence.decoding, sequence.in_flight) == (21, 2, True, 0)
    assert [event.tokens for event in sequence.stream.drain_ready() if isinstance(event, TokenEvent)] == [(97,), (98,)]
    assert bench.endings == []


def test_the_end_token_is_matched_and_never_text():
    bench = Bench()
    sequence = add(bench.planner)
    bench.apply(bench.plan(), END_ID)
    assert bench.endings == [(sequence, FinishReason.STOP, None, END_ID)]
    assert all(event.text == "" for event in sequence.stream.drain_ready())


def test_the_last_token_allowed_ends_the_sequence():
    bench = Bench()
    sequence = add(bench.planner, max_tokens=1)
    bench.apply(bench.plan(), 97)
    assert bench.endings == [(sequence, FinishReason.LENGTH, None, None)]


def test_a_result_of_an_earlier_epoch_is_dropped():
    bench = Bench()
    sequence = add(bench.planner)
    step = bench.plan()
    bench.planner.leave(sequence, State.WAITING)
    bench.apply(step, 97)
    assert (sequence.generated, sequence.computed, sequence.stream.drain_ready()) == (0, 0, [])


@pytest.mark.parametrize("decoding", [False, True])
def test_a_token_that_failed_ends_its_sequence(decoding):
    bench = Bench()
    sequence = add(bench.planner)
    if decoding:
        bench.apply(bench.plan(), 97)
    bench.apply(bench.plan(), -1, failure="numerical_failure")
    [(ended, reason, error, _)] = bench.endings
    assert (ended, reason, sequence.generated) == (sequence, FinishReason.ERROR, int(decoding))
    assert isinstance(error, NumericalFailure)


@pytest.mark.parametrize("max_tokens", [0, 4])
def test_prompt_log_probs_that_failed_end_their_sequence_and_no_other(max_tokens):
    bench = Bench()
    poor = add(bench.planner, "hello", max_tokens, 0, prompt_logprobs=1)
    good = add(bench.planner, "other", 4, 1, prompt_logprobs=1)
    step = bench.plan()
    scores = (PromptLogprobs(poor.row, 1, (), "numerical_failure"), PromptLogprobs(good.row, 1, scored(4)))
    bench.apply(step, *((97, 98) if max_tokens else (98,)), scores=scores)
    [(ended, reason, error, _)] = bench.endings
    assert (ended, reason) == (poor, FinishReason.ERROR) and isinstance(error, NumericalFailure)
    assert poor.stream.drain_ready() == [] and poor.generated == 0
    assert isinstance(good.stream.drain_ready()[0], PromptEvent) and good.generated == 1


def test_scoring_without_generating_ends_by_length():
    bench = Bench()
    sequence = add(bench.planner, "hello", 0, prompt_logprobs=0)
    step = bench.plan()
    bench.apply(step, scores=(PromptLogprobs(sequence.row, 1, scored(4)),))
    assert bench.endings == [(sequence, FinishReason.LENGTH, None, None)]
    assert [event.logprobs for event in sequence.stream.drain_ready() if isinstance(event, PromptEvent)] == [scored(4)]


def test_too_few_log_probs_are_a_fault():
    bench = Bench()
    sequence = add(bench.planner, "hello", 0, prompt_logprobs=0)
    step = bench.plan()
    with pytest.raises(InvariantBroken, match="3 log-probs for a prompt of 5 tokens"):
        bench.apply(step, scores=(PromptLogprobs(sequence.row, 1, scored(3)),))


@pytest.mark.parametrize(
    ("step_number", "rows", "says"), [(7, (0,), "answered by step 7"), (None, (), "0 tokens for 1 rows"), (None, (3,), "answered for row")]
)
@pytest.mark.parametrize("decoding", [False, True])
def test_an_answer_to_something_else_is_a_fault(decoding, step_number, rows, says):
    bench = Bench()
    add(bench.planner)
    if decoding:
        bench.apply(bench.plan(), 97)
    step = bench.plan()
    number = step.plan.step if step_number is None else step_number
    with pytest.raises(InvariantBroken, match=says):
        bench.application.apply(step, StepResult(number, tuple(SampledToken(row, 97) for row in rows)), 5.0)
