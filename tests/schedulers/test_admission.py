from __future__ import annotations

import pytest

from service.schedulers.admission import Admission
from service.schedulers.blocks import BlockSpace
from service.schedulers.waiting import WaitingQueue
from service.types.errors import ContextLengthExceeded, InvalidRequest, QueueFull, UnsupportedField
from service.types.settings import SchedulerSettings
from tests.fakes import VOCABULARY, layout
from tests.schedulers.support import ask
from tests.schedulers.test_blocks import make_sequence


def door(blocks: int = 64, context: int = 100, **settings) -> tuple:
    admission = Admission(SchedulerSettings(**settings))
    admission.context_tokens, admission.vocab_size = context, VOCABULARY
    return admission, WaitingQueue(), BlockSpace(layout(4), (blocks,))


def check(requests, **options) -> None:
    admission, waiting, space = door(**options)
    admission.check(requests, waiting, space)


@pytest.mark.parametrize(("tokens", "accepted"), [(94, True), (95, True), (96, False)])
def test_prompt_and_max_tokens_fit_the_context(tokens, accepted):
    if accepted:
        check([ask("hello", tokens)])
    else:
        with pytest.raises(ContextLengthExceeded) as refusal:
            check([ask("hello", tokens)])
        assert refusal.value.param == "max_tokens"


@pytest.mark.parametrize(("tokens", "accepted"), [(14, True), (15, True), (16, False)])
def test_what_could_never_run_alone_is_refused(tokens, accepted):
    if accepted:
        check([ask("hello", tokens)], blocks=5)
    else:
        with pytest.raises(ContextLengthExceeded):
            check([ask("hello", tokens)], blocks=5)


@pytest.mark.parametrize(
    ("request_", "error", "param"),
    [
        (ask("hello", adapter="lora"), UnsupportedField, "adapter"),
        (ask(()), InvalidRequest, "prompt"),
        (ask("hello", 0), InvalidRequest, "max_tokens"),
        (ask((1, VOCABULARY)), InvalidRequest, "prompt"),  # a tokenizer may know more than its model
    ],
)
def test_what_cannot_be_served_is_refused_by_name(request_, error, param):
    with pytest.raises(error) as refusal:
        check([request_])
    assert refusal.value.param == param


def test_scoring_needs_no_token():
    check([ask("hello", 0, prompt_logprobs=0)])


@pytest.mark.parametrize(("waiting_sequences", "accepted"), [(6, True), (7, True), (8, False)])
def test_the_queue_is_bounded_in_sequences(waiting_sequences, accepted):
    admission, waiting, space = door(queue_requests=10)
    fill(waiting, waiting_sequences)
    if accepted:
        admission.check([ask()] * 3, waiting, space)
    else:
        with pytest.raises(QueueFull) as refusal:
            admission.check([ask()] * 3, waiting, space)
        assert refusal.value.retry_after_s >= 1


@pytest.mark.parametrize(("waiting_sequences", "accepted"), [(2, True), (3, False)])
def test_the_queue_is_bounded_in_prompt_tokens(waiting_sequences, accepted):
    admission, waiting, space = door(queue_tokens=20)
    fill(waiting, waiting_sequences)
    if accepted:
        admission.check([ask("1234567890")], waiting, space)
    else:
        with pytest.raises(QueueFull):
            admission.check([ask("1234567890")], waiting, space)


def fill(waiting: WaitingQueue, number: int) -> None:
    for index in range(number):
        sequence = make_sequence("hello", arrival=index)
        sequence.share = waiting.enrol("")
        waiting.add(sequence)


def test_a_group_that_the_queue_can_never_hold_is_invalid_and_not_told_to_return():
    with pytest.raises(InvalidRequest):
        check([ask()] * 11, queue_requests=10)
    with pytest.raises(InvalidRequest):
        check([])


def test_retry_after_follows_the_rate_at_which_sequences_end():
    slow, fast = Admission(SchedulerSettings()), Admission(SchedulerSettings())
    for number in range(200):
        slow.ended(number * 2.0, others_wait=True)
        fast.ended(number * 0.05, others_wait=True)
    assert slow.retry_after_s(20) == pytest.approx(20, rel=0.05)
    assert fast.retry_after_s(200) == pytest.approx(5, rel=0.05)
    assert (slow.retry_after_s(10_000), fast.retry_after_s(1)) == (60, 1)


def test_an_idle_stretch_is_no_slow_sequence():
    admission = Admission(SchedulerSettings())
    for number in range(200):
        admission.ended(number * 0.05, others_wait=True)
    admission.ended(10.0, others_wait=False)
    admission.ended(10_000.0, others_wait=True)
    assert admission.retry_after_s(200) == pytest.approx(5, rel=0.1)
