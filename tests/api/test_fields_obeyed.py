"""Every field of every body matters: a table of fields and the effect that shows it, and a walk that fails when a field is not in it."""

from __future__ import annotations

import re
from typing import Any

import pytest
from pydantic import BaseModel
from tokenizers.processors import TemplateProcessing

from service.api.calls import Call
from service.api.chat import parse as parse_chat
from service.api.completions import parse as parse_completion
from service.api.fields import HARMLESS, UNSUPPORTED
from service.api.placement import ChatPrompt
from service.api.schemas import (
    ChatBody,
    ChatMessage,
    CompletionBody,
    DetokenizeBody,
    ImagePart,
    ImageUrl,
    SamplingBody,
    StreamOptions,
    StrictModel,
    TextPart,
    TokenizeBody,
)
from service.api.translate import Translator
from service.inputs.tokens import TokenCodec
from service.types.errors import UnsupportedField
from service.types.request import GenerationRequest
from service.types.settings import HttpLimits
from tests.api.conftest import BYTE_CODEC, Options, Service, byte_tokenizer, running
from tests.api.test_images import data_url, png
from tests.fakes import FakeManifest, fake_router, fake_spec

# Field -> (value, what of the requests must differ from the body without it).
REQUEST_FIELDS: dict[str, tuple[Any, str]] = {
    "n": (2, "count"),
    "temperature": (0.5, "sampling.temperature"),
    "top_p": (0.5, "sampling.top_p"),
    "top_k": (5, "sampling.top_k"),
    "min_p": (0.1, "sampling.min_p"),
    "repetition_penalty": (1.5, "sampling.repetition_penalty"),
    "presence_penalty": (1.0, "sampling.presence_penalty"),
    "frequency_penalty": (1.0, "sampling.frequency_penalty"),
    "logit_bias": ({"5": 1.5}, "sampling.logit_bias"),
    "seed": (42, "sampling.seed"),
    "stop": (["x"], "stop.strings"),
    "stop_token_ids": ([7], "stop.token_ids"),
    "max_tokens": (5, "stop.max_tokens"),
    "min_tokens": (2, "stop.min_tokens"),
    "ignore_eos": (True, "stop.ignore_eos"),
    "cache_salt": ("salt", "cache_salt"),
    "priority": (3, "priority"),
}
COMPLETION_FIELDS = {"logprobs": (2, "sampling.logprobs")}
CHAT_FIELDS = {"logprobs": (True, "sampling.logprobs"), "max_completion_tokens": (7, "stop.max_tokens")}
COMPLETION, CHAT, TOKENIZE, DETOKENIZE = "/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize"
SEEN = "chat of a version that reads images"
URL, OTHER_URL = data_url(png(40, 40)), data_url(png(40, 20))
PICTURE = {"type": "image_url", "image_url": {"url": URL}}
USER = {"role": "user", "content": "q"}
PARTS = [{"type": "text", "text": "q"}]
PLAIN: dict[str, dict[str, Any]] = {
    COMPLETION: {"prompt": "hi", "max_tokens": 3, "seed": 1},
    CHAT: {"messages": [USER], "max_tokens": 3, "seed": 1},
    TOKENIZE: {"prompt": "a<end>"},
    DETOKENIZE: {"tokens": [97, 98]},
    SEEN: {"messages": [{"role": "user", "content": [PICTURE]}], "max_tokens": 3, "seed": 1},
}
STREAM = {"stream": True}
USAGE = {"stream_options": {"include_usage": True}}
RUNNING_USAGE = {"stream_options": {"include_usage": True, "continuous_usage_stats": True}}
SCORED = {"logprobs": True}
# Field of a schema -> route, what is added to the plain body, what is added besides with the field: the answers (or the prompt that
# reaches the worker) must differ. The template shows names and a variable `mood`.
SHOWN: dict[tuple[type[BaseModel], str], tuple[str, dict[str, Any], dict[str, Any]]] = {
    (CompletionBody, "model"): (COMPLETION, {"model": "stable"}, {"model": "other"}),
    (CompletionBody, "cost"): (COMPLETION, {}, {"cost": "low"}),
    (CompletionBody, "stream"): (COMPLETION, {}, STREAM),
    (CompletionBody, "stream_options"): (COMPLETION, STREAM, USAGE),
    (CompletionBody, "prompt"): (COMPLETION, {}, {"prompt": "ho"}),
    (CompletionBody, "echo"): (COMPLETION, {}, {"echo": True}),
    (CompletionBody, "best_of"): (COMPLETION, {"best_of": 1}, {"best_of": 2}),
    (ChatBody, "model"): (CHAT, {"model": "v2.3"}, {"model": "other"}),
    (ChatBody, "cost"): (CHAT, {}, {"cost": "low"}),
    (ChatBody, "stream"): (CHAT, {}, STREAM),
    (ChatBody, "stream_options"): (CHAT, STREAM, USAGE),
    (ChatBody, "messages"): (CHAT, {}, {"messages": [USER, USER]}),
    (ChatBody, "top_logprobs"): (CHAT, SCORED, {"top_logprobs": 2}),
    (ChatBody, "chat_template_kwargs"): (CHAT, {}, {"chat_template_kwargs": {"mood": "gay"}}),
    (StreamOptions, "include_usage"): (CHAT, {**STREAM, "stream_options": {"include_usage": False}}, USAGE),
    (StreamOptions, "continuous_usage_stats"): (CHAT, {**STREAM, **USAGE}, RUNNING_USAGE),
    (ChatMessage, "role"): (CHAT, {}, {"messages": [{**USER, "role": "assistant"}]}),
    (ChatMessage, "content"): (CHAT, {}, {"messages": [{**USER, "content": "r"}]}),
    (ChatMessage, "name"): (CHAT, {}, {"messages": [{**USER, "name": "Ann"}]}),
    (TextPart, "type"): (
        CHAT,
        {"messages": [{**USER, "content": PARTS}]},
        {"messages": [{**USER, "content": [{"type": "t", "text": "q"}]}]},
    ),
    (TextPart, "text"): (
        CHAT,
        {"messages": [{**USER, "content": PARTS}]},
        {"messages": [{**USER, "content": [{"type": "text", "text": "r"}]}]},
    ),
    (ImagePart, "type"): (SEEN, {}, {"messages": [{**USER, "content": [{**PICTURE, "type": "image"}]}]}),
    (ImagePart, "image_url"): (SEEN, {}, {"messages": [{**USER, "content": [{**PICTURE, "image_url": {"url": OTHER_URL}}]}]}),
    (ImageUrl, "url"): (SEEN, {}, {"messages": [{**USER, "content": [{**PICTURE, "image_url": {"url": "data:,"}}]}]}),
    (ImageUrl, "detail"): (SEEN, {}, {"messages": [{**USER, "content": [{**PICTURE, "image_url": {"url": URL, "detail": "low"}}]}]}),
    (TokenizeBody, "model"): (TOKENIZE, {"model": "fake"}, {"model": "other"}),
    (TokenizeBody, "prompt"): (TOKENIZE, {}, {"prompt": "b"}),
    (TokenizeBody, "messages"): (TOKENIZE, {"prompt": None, "messages": [USER]}, {"messages": [USER, USER]}),
    (TokenizeBody, "add_special_tokens"): (TOKENIZE, {}, {"add_special_tokens": False}),
    (TokenizeBody, "return_token_strs"): (TOKENIZE, {}, {"return_token_strs": True}),
    (DetokenizeBody, "model"): (DETOKENIZE, {"model": "fake"}, {"model": "other"}),
    (DetokenizeBody, "tokens"): (DETOKENIZE, {}, {"tokens": [97, 256]}),
}
TEMPLATE = "{% for m in messages %}{{ m.role }}{{ m.name }}: {{ m.content }}<end>\n{% endfor %}{{ mood }}assistant:"


def seen(request: GenerationRequest, path: str) -> Any:
    value: Any = request
    for name in path.split("."):
        value = getattr(value, name)
    return value


def translate(route: str, fields: dict[str, Any]) -> list[GenerationRequest]:
    router = fake_router(codec=BYTE_CODEC, manifest=FakeManifest(fake_spec()))
    translator = Translator(router.resolve(None), Call(route), HttpLimits())
    if route == "chat":
        return translator.chat(parse_chat({"messages": [{"role": "user", "content": "x"}], **fields}), ChatPrompt([1, 2]))
    return translator.completion(parse_completion({"prompt": [1, 2], **fields}), [[1, 2]])


def schemas_of(kind: type[BaseModel]) -> list[type[BaseModel]]:
    return [found for one in kind.__subclasses__() for found in (one, *schemas_of(one))]


def test_the_tables_are_complete() -> None:
    asked = {(CompletionBody, name) for name in REQUEST_FIELDS | COMPLETION_FIELDS} | {
        (ChatBody, name) for name in REQUEST_FIELDS | CHAT_FIELDS
    }
    fields = {(schema, name) for schema in schemas_of(StrictModel) for name in schema.model_fields if schema is not SamplingBody}
    assert fields == asked | set(SHOWN)
    assert not asked & set(SHOWN)
    served = set(CompletionBody.model_fields) | set(ChatBody.model_fields)
    assert not served & (set(UNSUPPORTED) | HARMLESS)


@pytest.fixture(scope="module")
def encoding_with_start() -> TokenCodec:
    """The byte vocabulary; a text begins with <end> unless told otherwise."""
    tokenizer = byte_tokenizer()
    tokenizer.post_processor = TemplateProcessing(single="<end> $A", special_tokens=[("<end>", 256)])
    return TokenCodec(tokenizer.to_str().encode(), {"eos_token": "<end>"})


async def effect(service: Service, route: str, body: dict[str, Any]) -> tuple[int, str, str, str]:
    """Status, content type, text without ids and times, and the prompt that the worker got."""
    service.backend.plans.clear()
    response = await service.client.post(route, json={name: value for name, value in body.items() if value is not None})
    prompts = [opening.tokens[: opening.prompt_tokens] for plan in service.backend.plans for opening in plan.open]
    text = re.sub(r'"id":"[^"]*"|"created":\d+|"cached_tokens":\d+', "", response.text)
    return (
        response.status_code,
        response.headers["content-type"],
        text,
        str([BYTE_CODEC.decode(ids, skip_special=False) for ids in prompts]),
    )


@pytest.mark.parametrize(("schema", "field"), SHOWN, ids=lambda value: value if isinstance(value, str) else value.__name__)
async def test_a_field_changes_the_answer(schema: type[BaseModel], field: str, encoding_with_start: TokenCodec) -> None:
    route, base, added = SHOWN[schema, field]
    plain = {**PLAIN[route], **base}
    sees, route = route == SEEN, CHAT if route == SEEN else route
    async with running(Options(template=TEMPLATE, codec=encoding_with_start, sees=sees)) as service:
        without = await effect(service, route, plain)
        assert without[0] == 200
        assert await effect(service, route, plain) == without
        assert await effect(service, route, {**plain, **added}) != without


async def test_template_variables_are_in_the_prompt() -> None:
    async with running(Options(template=TEMPLATE)) as service:
        body = {**PLAIN[CHAT], "messages": [{**USER, "name": "Ann"}]}
        _, _, _, without = await effect(service, CHAT, body)
        _, _, _, having = await effect(service, CHAT, {**body, "chat_template_kwargs": {"mood": "glad "}})
    assert without == str(["userAnn: q<end>\nassistant:"])
    assert having == str(["userAnn: q<end>\nglad assistant:"])


@pytest.mark.parametrize(
    ("route", "field"),
    [("completion", name) for name in REQUEST_FIELDS | COMPLETION_FIELDS] + [("chat", name) for name in REQUEST_FIELDS | CHAT_FIELDS],
)
def test_a_field_changes_what_is_asked_of_the_scheduler(route: str, field: str) -> None:
    table = REQUEST_FIELDS | (CHAT_FIELDS if route == "chat" else COMPLETION_FIELDS)
    value, path = table[field]
    without, having = translate(route, {}), translate(route, {field: value})
    if path == "count":
        assert (len(without), len(having)) == (1, 2)
        assert [request.sampling.choice for request in having] == [0, 1]
    else:
        assert seen(without[0], path) != seen(having[0], path)


@pytest.mark.parametrize("field", sorted(UNSUPPORTED))
def test_unsupported_fields_are_refused_by_name_and_neutral_ones_are_not(field: str) -> None:
    with pytest.raises(UnsupportedField) as refused:
        parse_completion({"prompt": "x", field: {"some": "thing"}})
    assert refused.value.param == field
    for neutral in UNSUPPORTED[field]:
        parse_completion({"prompt": "x", field: neutral})


@pytest.mark.parametrize("field", sorted(HARMLESS))
def test_harmless_fields_are_accepted(field: str) -> None:
    parse_completion({"prompt": "x", field: {"a": "b"}})


async def test_echo_and_best_of_and_prompts_of_every_shape(service: Service) -> None:
    plain = await service.complete(prompt="hi", max_tokens=3, seed=1)
    echoed = await service.complete(prompt="hi", max_tokens=3, seed=1, echo=True, best_of=1)
    assert echoed["choices"][0]["text"] == "hi" + plain["choices"][0]["text"]
    for prompt in ([104, 105], ["hi"], [[104, 105]]):
        assert (await service.complete(prompt=prompt, max_tokens=3, seed=1))["choices"][0]["text"] == plain["choices"][0]["text"]
    scored = await service.complete(prompt="hey", max_tokens=0, echo=True, logprobs=1)
    assert scored["choices"][0]["text"] == "hey"
    assert scored["choices"][0]["logprobs"]["token_logprobs"] == [None, -0.5, -0.5]
    assert scored["choices"][0]["logprobs"]["text_offset"] == [0, 1, 2]


async def test_stop_strings_end_the_text(service: Service) -> None:
    whole = (await service.complete(prompt="hi", max_tokens=8, seed=1))["choices"][0]["text"]
    cut = (await service.complete(prompt="hi", max_tokens=8, seed=1, stop=whole[4:6]))["choices"][0]
    assert (cut["text"], cut["finish_reason"], cut["stop_reason"]) == (whole[:4], "stop", whole[4:6])


async def test_tokenize_and_detokenize(service: Service) -> None:
    async def ask(path: str, **body: Any) -> dict[str, Any]:
        return (await service.client.post(path, json=body)).json()

    answer = await ask("/tokenize", prompt="a<end>", return_token_strs=True, model="stable", add_special_tokens=False)
    assert answer["tokens"] == list(b"a<end>")
    assert answer["token_strs"] == list("a<end>")
    chat = await ask("/tokenize", messages=[{"role": "user", "content": "q"}])
    assert 256 in chat["tokens"]
    assert (await ask("/detokenize", tokens=chat["tokens"], model="fake"))["prompt"] == "user: q<end>\nassistant:"
    assert (await ask("/detokenize", tokens=[257]))["error"]["param"] == "tokens"
    assert (await ask("/tokenize", prompt="x", messages=[{"role": "user"}]))["error"]["code"] == "invalid_value"
    assert (await ask("/tokenize", prompt="x", model="nope"))["error"]["code"] == "model_not_found"


async def test_template_variables_may_not_replace_ours(service: Service) -> None:
    body = {"messages": [{"role": "user", "content": "q"}], "max_tokens": 1}
    response = await service.client.post("/v1/chat/completions", json={**body, "chat_template_kwargs": {"messages": "x"}})
    assert response.json()["error"]["param"] == "chat_template_kwargs"
