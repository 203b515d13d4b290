"""What a body may be: each refusal in the one shape, the limits at and above, and nothing of the client's echoed at length."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.api.bodies import MOST_CONTAINERS, parse_object
from service.types.errors import InvalidRequest
from service.types.settings import HttpLimits
from tests.api.conftest import Options, Service, failure, head, post, running

SMALL = HttpLimits(
    body_bytes=2000,
    json_depth=4,
    choices=3,
    prompts=3,
    sequences=6,
    stop_strings=2,
    stop_characters=5,
    logit_bias_entries=2,
    top_logprobs=2,
)


async def refuse(service: Service, path: str, body: object) -> dict:
    response = await service.client.post(path, json=body)
    assert response.status_code == 400, response.text
    assert response.headers["content-type"] == "application/json"
    return response.json()["error"]


@pytest.mark.parametrize(
    "body",
    [
        b'{"prompt": "x", "temperature": NaN}',
        b'{"prompt": "x", "temperature": Infinity}',
        b'{"prompt": "x", "temperature": 1e999}',
        b'{"prompt": "\\ud800"}',
        b'{"prompt": "\xff"}',
        b'{"prompt": "x"} trailing',
        b'{"prompt": "x"',
        b"[1]",
        b'"text"',
        b"",
        b'{"prompt": ' + b"[" * 100_000,
    ],
)
async def test_what_is_not_a_json_object_is_refused(service: Service, body: bytes) -> None:
    status, error = failure(await service.raw(post("/v1/completions", body)))
    assert status == 400
    assert len(error["message"]) < 300
    await service.complete(prompt="x", max_tokens=1)


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"n": True}, "n"),
        ({"n": "3"}, "n"),
        ({"n": 1.0}, "n"),
        ({"n": 0}, "n"),
        ({"temperature": True}, "temperature"),
        ({"temperature": -0.1}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"stop": [""]}, "stop"),
        ({"stop": [1]}, "stop.0"),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"logit_bias": {"1": 101}}, "logit_bias"),
        ({"logit_bias": {"257": 1}}, "logit_bias"),
        ({"stop_token_ids": [257]}, "stop_token_ids"),
        ({"min_tokens": 17}, "min_tokens"),
        ({"best_of": 2}, "best_of"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": [True]}, "prompt"),
        ({"prompt": [257]}, "prompt"),
        ({"prompt": [-1]}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": [1, "x"]}, "prompt"),
        ({"stream_options": {"x": 1}}, "stream_options.x"),
        ({"nonsense": 1}, "nonsense"),
    ],
)
async def test_every_refusal_names_its_field(service: Service, body: dict, param: str) -> None:
    assert (await refuse(service, "/v1/completions", {"prompt": "x", **body}))["param"] == param


@pytest.mark.parametrize(
    ("messages", "param"),
    [
        ([], "messages"),
        ("hi", "messages"),
        ([{"role": "robot", "content": "x"}], "messages.0.role"),
        ([{"role": "tool", "content": "x"}], "messages.0.role"),
        ([{"role": "user", "content": 5}], "messages.0.content"),
        ([{"role": "user", "content": "x", "extra": 1}], "messages.0.extra"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:"}}]}], "messages.0.content.0.image_url"),
        ([{"role": "user", "content": [{"type": "input_audio", "input_audio": {}}]}], "messages.0.content.0.type"),
        ([{"role": "assistant", "content": "x", "tool_calls": [{}]}], "messages.0.tool_calls"),
    ],
)
async def test_messages_are_checked_by_name(service: Service, messages: object, param: str) -> None:
    assert (await refuse(service, "/v1/chat/completions", {"messages": messages}))["param"] == param


async def test_a_model_without_a_template_says_so() -> None:
    async with running(Options(template=None)) as service:
        error = await refuse(service, "/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}]})
    assert "/v1/completions" in error["message"]


async def test_long_input_is_not_echoed(service: Service) -> None:
    error = await refuse(service, "/v1/completions", {"prompt": "x", "A" * 40_000: 1})
    assert error["code"] == "unknown_parameter"
    assert len(json.dumps(error)) < 1000
    response = await service.client.post("/v1/completions", json={"prompt": "x", "model": "B" * 40_000})
    assert len(response.text) < 1000


@pytest.mark.parametrize(
    ("field", "ok", "bad"),
    [
        ("n", 3, 4),
        ("prompt", ["x"] * 3, ["x"] * 4),
        ("stop", ["q" * 5] * 2, ["q" * 5] * 3),
        ("stop", ["q" * 5], ["q" * 6]),
        ("logit_bias", {"1": 1, "2": 1}, {"1": 1, "2": 1, "3": 1}),
        ("logprobs", 2, 3),
        ("temperature", 2, 2.01),
        ("logit_bias", {"1": 100}, {"1": 100.5}),
    ],
)
async def test_counts_at_and_above_their_limit(field: str, ok: object, bad: object) -> None:
    async with running(Options(limits=SMALL)) as service:
        await service.complete(**{"prompt": "x", "max_tokens": 1, field: ok})
        error = await refuse(service, "/v1/completions", {"prompt": "x", "max_tokens": 1, field: bad})
    assert error["param"] == field


async def test_brackets_inside_of_texts_are_no_depth() -> None:
    async with running(Options(limits=SMALL)) as service:
        await service.complete(prompt='[[[[[[{{{{{{\\"', max_tokens=1)
        deep = {"prompt": "x", "metadata": {"a": {"b": {"c": {}}}}}
        assert "deeper than 4" in (await refuse(service, "/v1/completions", deep))["message"]


@pytest.mark.parametrize(
    ("body", "fine"),
    [
        (b'{"prompt": "x", "prompt": "y"}', False),
        (b'{"prompt": "x", "max_tokens": 1, "max_token\\u0073": 2}', False),
        (b'{"prompt": "x", "metadata": {"a": 1, "a": 1}}', False),
        (b'{"prompt": "x", "metadata": [[{"b:": "::", "b:": ":"}]]}', False),
        (b'{"prompt": "\\"a\\": \\\\", "metadata": [{"a": 1}, {"a": "b:"}], "stop": ":\\\\\\":"}', True),
    ],
)
async def test_a_key_given_twice_is_refused(service: Service, body: bytes, fine: bool) -> None:
    answer = await service.raw(post("/v1/completions", body))
    if fine:
        assert answer.startswith(b"HTTP/1.1 200")
    else:
        assert "twice" in failure(answer)[1]["message"]


@settings(max_examples=300, deadline=None)
@given(
    st.recursive(
        st.none() | st.text(alphabet='a:"\\{[]}', max_size=6),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(alphabet=':"\\', max_size=3), inner, max_size=3),
        max_leaves=12,
    )
)
def test_no_sound_body_is_taken_for_one_with_a_key_twice(value: object) -> None:
    body = {"a": value}
    assert parse_object(json.dumps(body).encode(), HttpLimits()) == body


def test_containers_are_counted_before_anything_is_built_of_them() -> None:
    limits = HttpLimits()
    most = MOST_CONTAINERS - 2
    assert len(parse_object(b'{"a":[' + b"[]," * (most - 1) + b"[]]}", limits)["a"]) == most
    with pytest.raises(InvalidRequest, match="objects and lists"):
        parse_object(b'{"a":[' + b"[]," * most + b"[]]}", limits)
    assert parse_object(json.dumps({"a": "[" * MOST_CONTAINERS * 2}).encode(), limits)


@pytest.mark.parametrize("chunked", [False, True])
async def test_body_size_below_at_and_above_its_limit(chunked: bool) -> None:
    async with running(Options(limits=SMALL)) as service:
        for size, expected in ((1999, 200), (2000, 200), (2001, 413)):
            body = b'{"max_tokens": 1, "prompt": "x"}'
            body += b" " * (size - len(body))
            if chunked:
                fields = (("content-type", "application/json"), ("transfer-encoding", "chunked"))
                data = head("POST", "/v1/completions", *fields) + b"".join(
                    b"%x\r\n%b\r\n" % (len(part), part) for part in (body[:700], body[700:1500], body[1500:])
                )
                data += b"0\r\n\r\n"
            else:
                data = post("/v1/completions", body)
            answer = await service.raw(data)
            assert answer.startswith(f"HTTP/1.1 {expected} ".encode()), answer[:300]
            if expected == 413:
                assert failure(answer)[1]["code"] == "payload_too_large"


async def test_a_huge_declared_body_is_refused_before_it_is_sent(service: Service) -> None:
    data = head(
        "POST", "/v1/completions", ("content-type", "application/json"), ("content-length", "200000000"), ("expect", "100-continue")
    )
    answer = await service.raw(data)
    assert failure(answer)[0] == 413
    assert b"100 Continue" not in answer


@pytest.mark.parametrize(
    "fields",
    [
        {"content-type": "text/plain"},
        {"content-type": "application/x-www-form-urlencoded"},
        {"content-type": "application/json; charset=latin-1"},
        {"content-type": "application/json", "content-encoding": "gzip"},
    ],
)
async def test_other_media_are_refused(service: Service, fields: dict) -> None:
    response = await service.client.post("/v1/completions", content=b'{"prompt": "x"}', headers=fields)
    assert response.status_code == 415
    assert response.json()["error"]["code"] == "unsupported_media_type"
