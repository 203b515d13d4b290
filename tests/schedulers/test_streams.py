from __future__ import annotations

import asyncio

import pytest

from service.schedulers.streams import Stream
from service.types.request import FinishEvent, FinishReason, PromptEvent, TokenEvent, TokenLogprob, Usage
from tests.fakes import ByteDecoder, run_virtual

DONE = FinishEvent(FinishReason.LENGTH, Usage(1, 0, 1))


def make(strings: tuple[str, ...] = (), bound: int = 100) -> Stream:
    return Stream("id", ByteDecoder(), strings, bound)


def test_a_reader_gets_events_in_order_and_then_the_end():
    async def main():
        stream = make()
        reader = asyncio.create_task(collect(stream))
        await asyncio.sleep(0)
        stream.push(97)
        await asyncio.sleep(0)
        stream.push(98)
        stream.finish(DONE)
        return await reader

    assert run_virtual(main()) == [TokenEvent("a", (97,)), TokenEvent("b", (98,)), DONE]


async def collect(stream: Stream) -> list:
    return [event async for event in stream]


def test_drain_ready_gives_what_is_there_without_waiting():
    stream = make()
    assert stream.drain_ready() == []
    stream.push(97)
    stream.push(98)
    assert [event.text for event in stream.drain_ready()] == ["a", "b"]
    assert stream.drain_ready() == []


def test_after_the_end_was_drained_iteration_ends():
    async def main():
        stream = make()
        stream.finish(DONE)
        assert stream.drain_ready() == [DONE]
        return await collect(stream)

    assert run_virtual(main()) == []


def test_a_second_ending_is_refused():
    stream = make()
    stream.finish(DONE)
    with pytest.raises(RuntimeError):
        stream.finish(DONE)


def test_incomplete_characters_are_kept_and_flushed_as_a_replacement():
    stream = make()
    for token in "é".encode():
        stream.push(token)
    stream.push(0xC3)
    stream.finish(DONE)
    assert [event.text for event in stream.drain_ready()[:-1]] == ["", "é", "", "�"]


def test_tokens_whose_text_is_held_back_wait_with_it():
    stream = make(("xyz",))
    stream.push(ord("x"), TokenLogprob(ord("x"), -1.0))
    assert stream.drain_ready() == []
    stream.push(ord("a"), TokenLogprob(ord("a"), -2.0))
    (event,) = stream.drain_ready()
    assert event == TokenEvent("xa", (120, 97), (TokenLogprob(120, -1.0), TokenLogprob(97, -2.0)))


def test_held_text_is_released_at_the_end_unless_a_stop_string_took_it():
    stream = make(("xyz",))
    for token in b"axy":
        stream.push(token)
    stream.finish(DONE)
    assert "".join(event.text for event in stream.drain_ready()[:-1]) == "axy"

    stream = make(("xyz",))
    assert [stream.push(token) for token in b"axyz"] == [None, None, None, "xyz"]
    stream.finish(FinishEvent(FinishReason.STOP, Usage(1, 0, 4), None, "xyz"))
    events = stream.drain_ready()[:-1]
    assert "".join(event.text for event in events) == "a"
    assert [token for event in events for token in event.tokens] == list(b"axyz")


def test_the_ending_token_is_delivered_without_text():
    stream = make()
    stream.push(97)
    stream.push_silent(98, TokenLogprob(98, -1.0))
    stream.finish(FinishEvent(FinishReason.STOP, Usage(1, 0, 2), None, 98))
    assert stream.drain_ready()[1] == TokenEvent("", (98,), (TokenLogprob(98, -1.0),))


@pytest.mark.parametrize(("number", "slow"), [(9, False), (10, False), (11, True)])
def test_more_undelivered_events_than_the_bound_make_it_slow(number, slow):
    stream = make(bound=10)
    for _ in range(number):
        stream.push(97)
    assert stream.slow is slow


def test_prompt_log_probs_are_an_event_of_their_own():
    stream = make()
    stream.push_prompt((TokenLogprob(1, -1.0),))
    assert stream.drain_ready() == [PromptEvent((TokenLogprob(1, -1.0),))]


def test_cancel_calls_back_until_the_end_and_a_cancelled_reader_loses_nothing():
    async def main():
        stream, calls = make(), []
        stream.on_cancel(lambda: calls.append(1))
        reader = asyncio.create_task(collect(stream))
        await asyncio.sleep(0)
        reader.cancel()
        await asyncio.gather(reader, return_exceptions=True)
        stream.cancel()
        stream.push(97)
        stream.finish(DONE)
        stream.cancel()
        return calls, await collect(stream)

    calls, events = run_virtual(main())
    assert calls == [1]
    assert events == [TokenEvent("a", (97,)), DONE]
