"""The loop on a fake worker and a virtual clock: results that do not depend on scheduling, endings, losses of the worker."""

from __future__ import annotations

import asyncio
import math
from dataclasses import replace

import pytest

from service.schedulers.blocks import BlockSpace
from service.schedulers.router import Router
from service.schedulers.sequence import InvariantBroken
from service.telemetry import Telemetry
from service.types.errors import (
    ContextLengthExceeded,
    DeadlineExceeded,
    InternalError,
    NumericalFailure,
    QueueFull,
    SlowReader,
    Unavailable,
    WorkerKilled,
)
from service.types.request import FinishReason, PromptEvent
from tests.fakes import END_ID, FakeBackend, FakeBehaviour
from tests.schedulers.support import ask, generate, log_lines, metric, read, read_all, small_backend, with_router

PROMPTS = ["a", "hello", "hello world, a longer prompt", "x" * 37, "hello world, a longer prompt indeed", "q" * 16]


def requests():
    return [ask(prompt, 12 + index, seed=index, request_id=str(index)) for index, prompt in enumerate(PROMPTS)]


def alone(windows=(None,), **behaviour):
    """The reference: each request in its own server, prefilled in one piece."""
    return [
        generate([request], small_backend(windows=windows, max_step_tokens=256, **behaviour), step_tokens=256)[0].content
        for request in requests()
    ]


@pytest.mark.parametrize("windows", [(None,), (None, 6), (5,), (1, 9, None)])
@pytest.mark.parametrize("run_ahead", ["never", "always"])
@pytest.mark.parametrize("step_tokens", [8, 11, 64])
def test_output_does_not_depend_on_batch_chunks_or_run_ahead(windows, run_ahead, step_tokens):
    backend = small_backend(windows=windows, end_every=30, max_step_tokens=64)
    together = generate(requests(), backend, step_tokens=step_tokens, run_ahead=run_ahead)
    assert [outcome.content for outcome in together] == alone(windows, end_every=30)


class NotedBackend(FakeBackend):
    """Notes of every plan its longest slice and how many others are outstanding when it comes."""

    def execute(self, plan):
        outstanding = sum(not future.done() for future, _ in self._outstanding)
        self.noted = [*getattr(self, "noted", ()), (max(piece.length for piece in plan.slices), outstanding)]
        return super().execute(plan)


def ahead(requests, run_ahead, step_s=0.001, **sizes):
    """For each step, whether it reads a prompt and whether it was sent beside another one."""
    backend = NotedBackend(behaviour=FakeBehaviour(step_s=step_s), max_step_tokens=8, **sizes)
    generate(requests, backend, step_tokens=8, run_ahead=run_ahead)
    return [(longest > 1, outstanding > 0) for longest, outstanding in backend.noted]


def test_run_ahead_auto_is_for_short_steps_while_nobody_waits():
    one = [ask("x" * 20, 12, ignore_eos=True)]
    reading, read = [(True, False)] * 3, [(False, False)] + [(False, True)] * 10
    assert ahead(one, "auto") == reading + read
    assert ahead(one, "never") == reading + [(False, False)] * 11
    assert ahead(one, "always") == [(True, False)] + [(True, True)] * 2 + [(False, True)] * 11
    long = ahead(one, "auto", step_s=0.1)
    assert long[:5] == [*reading, (False, False), (False, True)]
    assert long[5:] == [(False, False)] * 9
    queued = ahead([*one, ask("y", 4, ignore_eos=True)], "auto", max_rows=1)
    assert not any(beside for _, beside in queued[:14])
    assert [beside for _, beside in queued[14:]] == [False, False, True, True]


@pytest.mark.parametrize("run_ahead", ["never", "always"])
@pytest.mark.parametrize("windows", [(None,), (None, 6)])
def test_preemption_changes_nothing_but_time(run_ahead, windows):
    telemetry = Telemetry()
    backend = small_backend(blocks=15, windows=windows)
    outcomes = with_router(lambda router: read_all(router.submit(requests())), backend, telemetry, run_ahead=run_ahead)
    assert metric(telemetry, "preemptions_total") > 0
    assert [outcome.content for outcome in outcomes] == alone(windows)


@pytest.mark.parametrize("run_ahead", ["never", "always"])
@pytest.mark.parametrize("death", [1, 2, 5, 9, 14])
def test_a_dead_worker_costs_a_prefill_and_not_a_request(death, run_ahead):
    telemetry = Telemetry()
    backend = small_backend(die_at_steps=frozenset({death}))
    outcomes = with_router(lambda router: read_all(router.submit(requests())), backend, telemetry, run_ahead=run_ahead)
    assert backend.starts == 2
    assert [outcome.content for outcome in outcomes] == alone()
    assert metric(telemetry, "worker_restarts_total", reason="died") == 1


def test_a_stalled_worker_is_replaced_when_the_supervisor_says_so():
    backend = small_backend()

    async def body(router: Router):
        reading = asyncio.create_task(read_all(router.submit(requests())))
        await asyncio.sleep(0.05)
        backend.behaviour.stalled = True
        await asyncio.sleep(5)
        assert not reading.done()
        backend.behaviour.stalled = False
        backend.kill("stalled")
        return await reading

    assert [outcome.content for outcome in with_router(body, backend)] == alone()


def test_a_worker_that_died_idle_is_started_again():
    backend = small_backend()

    async def body(router: Router):
        await read_all(router.submit(requests()))
        backend.kill()
        await asyncio.sleep(3)
        assert router.ready()
        return await read_all(router.submit(requests()))

    assert [outcome.content for outcome in with_router(body, backend)] == alone()
    assert backend.starts == 2


def test_a_poisonous_request_is_found_and_the_others_live():
    backend = small_backend(kills=lambda opening: bytes(opening.tokens).startswith(b"poison"))
    asked = [*requests(), ask("poison", request_id="bad")]
    outcomes = generate(asked, backend)
    assert isinstance(outcomes[-1].ending.error, WorkerKilled)
    assert [outcome.content for outcome in outcomes[:-1]] == alone()
    assert backend.starts == 4, "two deaths in company, one alone"


def test_two_poisonous_requests_are_both_found():
    backend = small_backend(kills=lambda opening: bytes(opening.tokens).startswith(b"poison"))
    outcomes = generate([ask("poison a"), *requests(), ask("poison b")], backend)
    assert [isinstance(outcome.ending.error, WorkerKilled) for outcome in outcomes] == [True, *[False] * len(PROMPTS), True]
    assert [outcome.content for outcome in outcomes[1:-1]] == alone()


def test_a_suspect_that_is_innocent_is_run_alone_and_then_with_the_others():
    backend = small_backend(die_at_steps=frozenset({4, 8}))
    outcomes = generate(requests(), backend)
    assert [outcome.content for outcome in outcomes] == alone()
    assert backend.starts == 3


def test_a_worker_that_cannot_be_started_again_ends_everything_with_unavailable():
    backend = small_backend(die_at_steps=frozenset({3}))

    async def body(router: Router):
        streams = router.submit(requests())
        backend.behaviour.refuses_to_start = True
        outcomes = await read_all(streams)
        with pytest.raises(Unavailable) as refusal:
            router.submit([ask()])
        assert refusal.value.retry_after_s
        assert not router.ready()
        return outcomes

    assert all(isinstance(outcome.ending.error, Unavailable) for outcome in with_router(body, backend))


def test_starts_that_fail_are_tried_again_a_bounded_number_of_times():
    backend = small_backend(die_at_steps=frozenset({3}))

    async def body(router: Router):
        streams = router.submit(requests())
        backend.behaviour.failing_starts = 3
        return await read_all(streams)

    assert [outcome.content for outcome in with_router(body, backend)] == alone()
    assert backend.starts == 2

    backend = small_backend(die_at_steps=frozenset({3}))

    async def hopeless(router: Router):
        streams = router.submit(requests())
        backend.behaviour.failing_starts = 1000
        return await read_all(streams)

    assert all(isinstance(outcome.ending.error, Unavailable) for outcome in with_router(hopeless, backend))
    assert backend.behaviour.failing_starts > 900


def test_what_no_longer_fits_a_smaller_new_worker_ends_and_the_rest_goes_on():
    backend = small_backend(blocks=16, die_at_steps=frozenset({3}), start_s=3.0)

    async def body(router: Router):
        streams = router.submit([ask("a" * 40), ask("b" * 9), ask("c" * 60, 1)])
        await asyncio.sleep(1)
        backend.info = replace(backend.info, group_blocks=(6,))
        return await read_all(streams)

    long, short, longest = with_router(body, backend)
    assert isinstance(long.ending.error, Unavailable) and isinstance(longest.ending.error, Unavailable)
    assert short.content == generate([ask("b" * 9)])[0].content


def test_while_the_worker_is_started_again_new_requests_are_told_to_return():
    backend = small_backend(die_at_steps=frozenset({1}), start_s=3.0)

    async def body(router: Router):
        streams = router.submit([ask()])
        await asyncio.sleep(1)
        with pytest.raises(Unavailable) as refusal:
            router.submit([ask()])
        assert refusal.value.retry_after_s
        return await read_all(streams)

    assert with_router(body, backend)[0].reason is FinishReason.LENGTH


def test_tokens_already_streamed_are_never_repeated_after_a_death():
    backend = small_backend(die_at_steps=frozenset({6}))

    async def body(router: Router):
        (stream,) = router.submit([ask("hello", 20)])
        return [event async for event in stream]

    events = with_router(body, backend)
    assert sum(len(event.tokens) for event in events[:-1]) == 20
    assert backend.starts == 2


def test_nan_ends_one_sequence_and_its_kv_is_never_found():
    prompt = "a prompt of many full blocks"
    backend = small_backend(nan=lambda opening, position: position == len(prompt) + 3 and bytes(opening.tokens[:8]) == b"a prompt")

    async def body(router: Router):
        others = requests()
        outcomes = await read_all(router.submit([*others, ask(prompt)]))
        backend.behaviour.nan = None
        (again,) = await read_all(router.submit([ask(prompt)]))
        return outcomes, again

    outcomes, again = with_router(body, backend)
    assert isinstance(outcomes[-1].ending.error, NumericalFailure)
    assert outcomes[-1].ending.usage.generated_tokens == 3
    assert [outcome.content for outcome in outcomes[:-1]] == alone()
    assert again.ending.usage.cached_tokens == 0
    assert again.content == generate([ask(prompt)])[0].content


@pytest.mark.parametrize("run_ahead", ["never", "always"])
def test_cancelled_sequences_end_at_once_and_their_blocks_are_free(run_ahead):
    backend = small_backend(blocks=40)

    async def body(router: Router):
        streams = router.submit([ask("hello", 100, request_id=str(index), seed=index) for index in range(12)])
        await asyncio.sleep(0.1)
        for stream in streams[:11]:
            stream.cancel()
            stream.cancel()
        pools = router.versions()[0].loop._planner.space.pools
        held = pools[0].size - len(pools[0].free)
        outcomes = await read_all(streams)
        return held, outcomes

    held, outcomes = with_router(body, backend, run_ahead=run_ahead)
    assert held <= 26
    assert [outcome.reason for outcome in outcomes] == [FinishReason.CANCELLED] * 11 + [FinishReason.LENGTH]


def test_deadlines_end_waiting_and_running_sequences():
    telemetry = Telemetry()

    async def body(router: Router):
        now = asyncio.get_running_loop().time()
        deadlines = [now + 0.055, now + 0.02, math.inf, now + 0.15]
        streams = router.submit([ask("hi", 30, deadline_s=deadline, seed=index) for index, deadline in enumerate(deadlines)])
        outcomes = await read_all(streams[:2])
        assert asyncio.get_running_loop().time() == pytest.approx(now + 0.055, abs=0.011)
        return outcomes + await read_all(streams[2:])

    outcomes = with_router(body, small_backend(), telemetry, batch_size=1)
    assert [type(outcome.ending.error) for outcome in outcomes] == [DeadlineExceeded, DeadlineExceeded, type(None), DeadlineExceeded]
    assert outcomes[1].tokens == ()
    assert metric(telemetry, "requests_total", outcome="deadline") == 3


def test_the_servers_own_deadline_holds_during_a_long_step():
    async def body(router: Router):
        started = asyncio.get_running_loop().time()
        (outcome,) = await read_all(router.submit([ask("hi", 30)]))
        assert asyncio.get_running_loop().time() - started == pytest.approx(2.0)
        return outcome

    assert isinstance(with_router(body, small_backend(step_s=60.0), request_deadline_s=2.0).ending.error, DeadlineExceeded)


def test_a_reader_beyond_its_bound_is_cut_off_and_the_others_go_on():
    async def body(router: Router):
        slow, fast = router.submit([ask("hello", 100, seed=1), ask("hello", 100, seed=2)])
        quick = await read(fast)
        return await read(slow), quick

    slow, quick = with_router(body, stream_events=10)
    assert isinstance(slow.ending.error, SlowReader)
    assert len(slow.events) == 12
    assert slow.ending.usage.generated_tokens == 11
    assert quick.reason is FinishReason.LENGTH


def test_stop_strings_and_end_tokens_are_billed_to_the_token_that_completes_them():
    script = [*b"one two three four", END_ID, 120, 120]
    backend = small_backend(script=lambda opening: script)
    by_string, by_end, by_length, ignoring = generate(
        [ask("a", 50, strings=("two t",)), ask("b", 50), ask("c", 5), ask("d", 21, ignore_eos=True)], backend, run_ahead="always"
    )
    assert (by_string.text, by_string.reason, by_string.ending.matched_stop) == ("one ", FinishReason.STOP, "two t")
    assert bytes(by_string.tokens) == b"one two t"
    assert by_string.ending.usage.generated_tokens == 9
    assert (by_end.text, by_end.reason, by_end.ending.matched_stop) == ("one two three four", FinishReason.STOP, END_ID)
    assert by_end.ending.usage.generated_tokens == 19
    assert (by_length.text, by_length.reason) == ("one t", FinishReason.LENGTH)
    assert (ignoring.text, ignoring.reason) == ("one two three fourxx", FinishReason.LENGTH)


def test_stop_strings_do_not_count_before_min_tokens():
    backend = small_backend(script=lambda opening: list(b"ababababab"))
    early, late = generate([ask("a", 10, strings=("ab",)), ask("b", 10, strings=("ab",), min_tokens=5)], backend)
    assert early.text == ""
    assert late.text == "ababab"
    assert late.ending.usage.generated_tokens == 8


def test_logprobs_are_aligned_with_tokens_and_absent_unless_asked_for():
    with_scores, without = generate([ask("hello", 9, logprobs=2, strings=("qqq",)), ask("hello", 9, seed=4)])
    assert [entry.token for entry in with_scores.logprobs] == list(with_scores.tokens)
    assert all(len(entry.top) == 2 for entry in with_scores.logprobs)
    assert without.logprobs == ()


@pytest.mark.parametrize("death", [None, 2, 3])
def test_prompt_logprobs_come_once_before_the_text_and_take_no_prefix_hits(death):
    prompt = "a prompt that takes several chunks of a step"
    backend = small_backend(die_at_steps=frozenset({death + 3 if death else 0}))

    async def body(router: Router):
        await read_all(router.submit([ask(prompt, 1)]))
        return await read_all(
            router.submit([ask(prompt, 4, prompt_logprobs=1), ask(prompt, 0, prompt_logprobs=0), ask("x", 2, prompt_logprobs=0)])
        )

    both, only_scores, single = with_router(body, backend)
    for outcome in (both, only_scores):
        assert isinstance(outcome.events[0], PromptEvent)
        assert [entry.token for entry in outcome.events[0].logprobs] == list(prompt.encode())[1:]
        assert len(outcome.prompt_events) == 1
        assert outcome.ending.usage.cached_tokens == 0
    assert only_scores.reason is FinishReason.LENGTH
    assert only_scores.tokens == ()
    assert single.events[0] == PromptEvent(())


def test_sixteen_choices_of_one_prompt_prefill_once():
    prompt = "the prompt that all sixteen choices share, once!"
    backend = small_backend(max_rows=16, max_step_tokens=64)
    outcomes = generate([ask(prompt, 4, choice=index) for index in range(16)], backend, batch_size=16, step_tokens=64)
    assert len({outcome.tokens for outcome in outcomes}) > 10
    computed = sum(piece.length for plan in backend.plans for piece in plan.slices)
    last_block = len(prompt) - (len(prompt) - 1) // 4 * 4
    assert computed == len(prompt) + 15 * last_block + 16 * 3
    assert sorted(outcome.ending.usage.cached_tokens for outcome in outcomes) == [0] + [(len(prompt) - 1) // 4 * 4] * 15


def test_siblings_go_on_when_the_one_they_wait_for_is_cancelled():
    async def body(router: Router):
        first, *others = router.submit([ask("a shared prompt, longer than a step is", 4, choice=index) for index in range(4)])
        await asyncio.sleep(0.015)
        first.cancel()
        return await read_all([first, *others])

    outcomes = with_router(body)
    assert [outcome.reason for outcome in outcomes] == [FinishReason.CANCELLED] + [FinishReason.LENGTH] * 3


def test_refusals_change_nothing():
    async def body(router: Router):
        with pytest.raises(ContextLengthExceeded):
            router.submit([ask("hello"), ask("hello", 196)])
        with pytest.raises(QueueFull) as full:
            for _ in range(3):
                router.submit([ask("hello", 4, seed=index) for index in range(4)])
        assert full.value.retry_after_s
        planner = router.versions()[0].loop._planner
        assert len(planner.waiting) == 8
        for sequence in planner.sequences():
            sequence.stream.cancel()

    with_router(body, queue_requests=10)


def test_draining_refuses_new_requests_and_lets_running_ones_end():
    async def body(router: Router):
        streams = router.submit([ask("hello", 10)])
        draining = asyncio.create_task(router.drain(30))
        await asyncio.sleep(0)
        with pytest.raises(Unavailable) as refusal:
            router.submit([ask()])
        assert refusal.value.retry_after_s
        assert not router.ready()
        await draining
        return await read_all(streams)

    assert with_router(body)[0].reason is FinishReason.LENGTH


def test_draining_ends_what_outlasts_the_limit():
    async def body(router: Router):
        streams = router.submit([ask("hello", 150)])
        started = asyncio.get_running_loop().time()
        await router.drain(0.5)
        assert asyncio.get_running_loop().time() - started == pytest.approx(0.5)
        return await read_all(streams)

    outcome = with_router(body)[0]
    assert isinstance(outcome.ending.error, Unavailable)
    assert 0 < len(outcome.tokens) < 150


def test_closing_ends_every_stream():
    async def body(router: Router):
        streams = router.submit(requests())
        await asyncio.sleep(0.02)
        await router.close()
        return await read_all(streams)

    assert all(isinstance(outcome.ending.error, Unavailable) for outcome in with_router(body))


class Confused(FakeBackend):
    """Answers its fourth step with the rows in reverse order."""

    def _step(self, plan):
        result = super()._step(plan)
        return replace(result, tokens=result.tokens[::-1]) if len(self.plans) == 4 else result


def test_a_broken_invariant_stops_the_loop_loudly_and_tells_every_reader(capsys):
    async def body(router: Router):
        outcomes = await read_all(router.submit(requests()))
        assert router.health()[0].state == "down"
        assert not router.ready()
        with pytest.raises(Unavailable):
            router.submit([ask()])
        return outcomes

    outcomes = with_router(body, Confused())
    assert all(type(outcome.ending.error) is InternalError for outcome in outcomes)
    assert "loop_stopped" in [line["event"] for line in log_lines(capsys.readouterr().err)]


def test_every_reader_is_told_even_when_blocks_cannot_be_given_back(monkeypatch):
    def broken(space, sequence):
        raise InvariantBroken("planted")

    monkeypatch.setattr(BlockSpace, "free", broken)

    async def body(router: Router):
        outcomes = await read_all(router.submit(requests()))
        await router.close()
        return outcomes

    assert all(type(outcome.ending.error) is InternalError for outcome in with_router(body, Confused()))


def test_an_idle_loop_sends_nothing():
    backend = small_backend()

    async def body(router: Router):
        await read_all(router.submit([ask()]))
        sent = len(backend.plans)
        await asyncio.sleep(100)
        assert len(backend.plans) == sent

    with_router(body, backend)
