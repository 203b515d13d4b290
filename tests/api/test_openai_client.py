"""The official client, strict, sync and async, streaming and not."""

from __future__ import annotations

import asyncio
import json

import openai
import pytest
from openai.types import Completion

from tests.api.conftest import Options, Service, running
from tests.fakes import FakeBehaviour

MESSAGES = [{"role": "system", "content": "You are a test."}, {"role": "user", "content": "Hello"}]


def client(service: Service, strict: bool = True) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=f"{service.url}/v1", api_key="none", max_retries=0, _strict_response_validation=strict)


async def test_chat_whole_and_streamed_say_the_same(service: Service) -> None:
    async with client(service) as api:
        whole = await api.chat.completions.create(model="fake", messages=MESSAGES, max_tokens=6, seed=3)
        assert whole.choices[0].finish_reason == "length"
        assert whole.usage.completion_tokens == 6
        assert whole.choices[0].message.role == "assistant"
        stream = await api.chat.completions.create(
            model="fake", messages=MESSAGES, max_tokens=6, seed=3, stream=True, stream_options={"include_usage": True}
        )
        chunks = [chunk async for chunk in stream]
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == whole.choices[0].message.content
    assert chunks[-2].choices[0].finish_reason == "length"
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == 6
    assert chunks[-1].usage.prompt_tokens == whole.usage.prompt_tokens


async def test_completions_with_choices_and_logprobs(service: Service) -> None:
    async with client(service) as api:
        whole = await api.completions.create(model="fake", prompt=["one", "two"], n=2, max_tokens=4, seed=1, logprobs=2)
    # Not strict: OpenAI's own service sends `"finish_reason": null` in every chunk of a completion but the last (its reply is quoted in
    # openai/openai-openapi#100), and so does vLLM (vllm-project/vllm#2266); the client's type for both kinds of answer does not allow
    # null (gpustack/gpustack#2534). Clients tell the last chunk by its reason, so null stays; the test below is strict about the rest.
    async with client(service, strict=False) as api:
        stream = await api.completions.create(model="fake", prompt=["one", "two"], n=2, max_tokens=4, seed=1, logprobs=2, stream=True)
        texts = dict.fromkeys(range(4), "")
        tokens: dict[int, list[str]] = {at: [] for at in range(4)}
        async for chunk in stream:
            for choice in chunk.choices:
                texts[choice.index] += choice.text
                tokens[choice.index] += choice.logprobs.tokens if choice.logprobs else []
    assert [choice.index for choice in whole.choices] == [0, 1, 2, 3]
    assert texts == {choice.index: choice.text for choice in whole.choices}
    assert tokens == {choice.index: choice.logprobs.tokens for choice in whole.choices}
    assert whole.usage.prompt_tokens == 6
    assert whole.usage.completion_tokens == 16
    assert len(set(texts.values())) > 1
    assert all(len(entry) == 2 for entry in whole.choices[0].logprobs.top_logprobs)


async def test_chunks_of_a_completion_are_strict_but_for_the_reason_that_is_not_there_yet(service: Service) -> None:
    body = {"prompt": "one", "max_tokens": 3, "logprobs": 1, "stream": True, "stream_options": {"include_usage": True}}
    response = await service.client.post("/v1/completions", json=body)
    *chunks, done = [line.removeprefix("data: ") for line in response.text.strip().split("\n\n")]
    assert done == "[DONE]"
    reasons = [choice["finish_reason"] for chunk in chunks for choice in json.loads(chunk)["choices"]]
    assert reasons == [None, None, None, "length"]
    for chunk in chunks:
        Completion.model_validate_json(chunk.replace('"finish_reason":null', '"finish_reason":"stop"'), strict=True)


RUNNING = {"stream": True, "stream_options": {"include_usage": True, "continuous_usage_stats": True}}


@pytest.mark.parametrize("logprobs", [False, True])
@pytest.mark.parametrize("route", ["completions", "chat/completions"])
async def test_every_chunk_counts_its_choice_where_that_is_asked_for(service: Service, route: str, logprobs: bool) -> None:
    shape: dict[str, object] = {"prompt": "one", "logprobs": 1 if logprobs else None}
    if route != "completions":
        shape = {"messages": MESSAGES, "logprobs": logprobs, "max_completion_tokens": 4}
    response = await service.client.post(f"/v1/{route}", json={**shape, **RUNNING, "max_tokens": 4, "n": 2, "seed": 1, "ignore_eos": True})
    *lines, done = [line.removeprefix("data: ") for line in response.text.strip().split("\n\n")]
    *chunks, last = map(json.loads, lines)
    assert done == "[DONE]" and last["choices"] == [] and last["usage"]["completion_tokens"] == 8
    prompt = last["usage"]["prompt_tokens"]
    for index in (0, 1):
        counts = [chunk["usage"] for chunk in chunks if chunk["choices"][0]["index"] == index]
        made = [count["completion_tokens"] for count in counts]
        assert made == sorted(made) and made[-1] == 4 and set(made) >= {1, 2, 3}
        assert all(count["prompt_tokens"] == prompt and count["total_tokens"] == prompt + count["completion_tokens"] for count in counts)


async def test_a_running_count_without_a_last_one_is_refused(service: Service) -> None:
    body = {"prompt": "one", "stream": True, "stream_options": {"continuous_usage_stats": True}}
    refused = (await service.client.post("/v1/completions", json=body)).json()["error"]
    assert refused["param"] == "stream_options.continuous_usage_stats" and "include_usage" in refused["message"]


async def test_chat_logprobs_carry_bytes_and_alternatives(service: Service) -> None:
    async with client(service) as api:
        answer = await api.chat.completions.create(model="fake", messages=MESSAGES, max_tokens=3, logprobs=True, top_logprobs=3)
    entries = answer.choices[0].logprobs.content
    assert "".join(entry.token for entry in entries) == answer.choices[0].message.content
    assert bytes(entries[0].bytes).decode() == entries[0].token
    assert [len(entry.top_logprobs) for entry in entries] == [3, 3, 3]


async def test_models_lists_every_name_and_each_resolves(service: Service) -> None:
    async with client(service) as api:
        names = [model.id async for model in await api.models.list()]
        assert {"fake", "stable", "v2.3"} <= set(names)
        for name in names:
            assert (await api.models.retrieve(name)).root == "fake"
            answer = await api.completions.create(model=name, prompt="x", max_tokens=1)
            assert answer.model == "fake"
        with pytest.raises(openai.NotFoundError) as refused:
            await api.models.retrieve("nothing")
    assert refused.value.code == "model_not_found"


async def test_failures_are_the_exceptions_of_the_client(service: Service) -> None:
    async with client(service) as api:
        with pytest.raises(openai.BadRequestError) as refused:
            await api.chat.completions.create(model="fake", messages=MESSAGES, tools=[{"type": "function", "function": {"name": "f"}}])
        assert refused.value.param == "tools"
        with pytest.raises(openai.BadRequestError) as refused:
            await api.completions.create(model="fake", prompt="x", max_tokens=10**6, stream=True)
        assert refused.value.code == "context_length_exceeded"


async def test_the_sync_client(service: Service) -> None:
    def work() -> tuple[str, str]:
        with openai.OpenAI(base_url=f"{service.url}/v1", api_key="none", _strict_response_validation=True) as api:
            whole = api.chat.completions.create(model="fake", messages=MESSAGES, max_tokens=5, seed=9)
            stream = api.chat.completions.create(model="fake", messages=MESSAGES, max_tokens=5, seed=9, stream=True)
            return whole.choices[0].message.content, "".join(chunk.choices[0].delta.content or "" for chunk in stream)

    whole, streamed = await asyncio.to_thread(work)
    assert whole == streamed
    assert len(whole) == 5


async def test_an_error_in_a_stream_that_has_begun_is_one_event() -> None:
    behaviour = FakeBehaviour(step_s=0.001, start_s=0.0, nan=lambda opening, position: position >= opening.prompt_tokens + 3)
    async with running(Options(behaviour=behaviour)) as service:
        response = await service.client.post("/v1/completions", json={"prompt": "x", "max_tokens": 9, "stream": True})
        events = response.text.strip().split("\n\n")
        assert response.status_code == 200
        assert '"code":"numerical_failure"' in events[-1] and response.text.count('"error"') == 1
        texts = [json.loads(event.removeprefix("data: "))["choices"][0]["text"] for event in events[:-1]]
        assert len("".join(texts)) == 3, "the tokens before it, each alone or two in an event where both were ready"
        async with client(service, strict=False) as api:
            with pytest.raises(openai.APIError, match=r"finite|NaN|number"):
                async for _ in await api.completions.create(model="fake", prompt="x", max_tokens=9, stream=True):
                    pass


async def test_a_failure_before_the_first_token_is_a_plain_error() -> None:
    behaviour = FakeBehaviour(step_s=0.001, start_s=0.0, nan=lambda opening, position: True)
    async with running(Options(behaviour=behaviour)) as service:
        for stream in (True, False):
            response = await service.client.post("/v1/completions", json={"prompt": "x", "stream": stream})
            assert response.status_code == 500
            assert response.json()["error"]["code"] == "numerical_failure"
