"""Every limit of HttpLimits just below it, at it and just above it, through the server; and a walk that fails when one has no such test.

At their defaults where that is cheap, else with a lower setting. Times have no exact edge: a pause well below passes, one beyond is cut.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from service.api.prompts import PromptReader
from service.inputs.templates import TemplateRenderer
from service.types.errors import ContextLengthExceeded
from service.types.settings import MIB, HttpLimits
from tests.api import test_images
from tests.api.conftest import BYTE_CODEC, Options, Service, byte_tokenizer, failure, head, parse, post, running, until
from tests.fakes import FakeManifest, fake_router, fake_spec

Probe = Callable[[Service, int], Awaitable[bytes]]
DEFAULTS = HttpLimits()
BODY = {"prompt": "x", "max_tokens": 1}
CHAT = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 1}


@dataclasses.dataclass(frozen=True)
class Edge:
    """A limit that counts: how to send a request of that size, and how too much is refused. `lowered` None: at its default."""

    probe: Probe
    status: int
    code: str
    param: str | None
    lowered: int | None = None


def completion(**fields: Callable[[int], Any]) -> Probe:
    """A completion whose fields depend on the size."""

    async def send(service: Service, size: int) -> bytes:
        body = {**BODY, **{name: make(size) for name, make in fields.items()}}
        return await service.raw(post("/v1/completions", json.dumps(body).encode()))

    return send


def nested(depth: int) -> Any:
    return {} if depth == 1 else {"a": nested(depth - 1)}


def product(size: int) -> tuple[int, int]:
    """Prompts and choices, each within its own limit, whose product is `size` or the nearest below it that is one (127 is prime)."""
    found = [(size // n, n) for n in range(16, 0, -1) if size % n == 0 and size // n <= DEFAULTS.prompts]
    return found[0] if found else product(size - 1)


async def send_product(service: Service, size: int) -> bytes:
    prompts, n = product(size)
    return await completion(prompt=lambda _: ["x"] * prompts, n=lambda _: n)(service, size)


async def send_head(service: Service, size: int) -> bytes:
    base = len(head("GET", "/live", ("x-pad", "")))
    return await service.raw(head("GET", "/live", ("x-pad", "p" * (size - base))))


async def send_target(service: Service, size: int) -> bytes:
    """The request line counts: a long path with a long query."""
    base = len(head("GET", "/live?q="))
    return await service.raw(head("GET", "/live?q=" + "q" * (size - base)))


async def send_fields(service: Service, size: int) -> bytes:
    return await service.raw(head("GET", "/live", *((f"x-{at}", "1") for at in range(size - 2))))


async def send_body(service: Service, size: int) -> bytes:
    body = json.dumps(BODY).encode()
    return await service.raw(post("/v1/completions", body + b" " * (size - len(body))))


async def send_top_logprobs(service: Service, size: int) -> bytes:
    body = {**CHAT, "logprobs": True, "top_logprobs": size}
    return await service.raw(post("/v1/chat/completions", json.dumps(body).encode()))


COUNTED: dict[str, list[Edge]] = {
    "header_bytes": [Edge(send_head, 431, "headers_too_large", None), Edge(send_target, 431, "headers_too_large", None)],
    "header_fields": [Edge(send_fields, 431, "headers_too_large", None)],
    "body_bytes": [Edge(send_body, 413, "payload_too_large", None, MIB)],
    "json_depth": [Edge(completion(metadata=lambda size: nested(size - 1)), 400, "invalid_value", None)],
    "choices": [Edge(completion(n=lambda size: size), 400, "invalid_value", "n")],
    "prompts": [Edge(completion(prompt=lambda size: ["x"] * size), 400, "invalid_value", "prompt")],
    "sequences": [Edge(send_product, 400, "invalid_value", "n")],
    "stop_strings": [Edge(completion(stop=lambda size: [f"stop {at}" for at in range(size)]), 400, "invalid_value", "stop")],
    "stop_characters": [Edge(completion(stop=lambda size: "é" * size), 400, "invalid_value", "stop")],
    "logit_bias_entries": [
        Edge(completion(logit_bias=lambda size: {str(at): 1 for at in range(size)}), 400, "invalid_value", "logit_bias", 200)
    ],
    "top_logprobs": [
        Edge(completion(logprobs=lambda size: size), 400, "invalid_value", "logprobs"),
        Edge(send_top_logprobs, 400, "invalid_value", "top_logprobs"),
    ],
}
# Tested one by one below.
APART = {
    "header_read_s": "test_a_head_has_its_time",
    "body_idle_s": "test_a_body_may_pause_for_less_than_its_time",
    "stream_write_s": "test_a_reader_may_pause_for_less_than_its_time",
    "prompt_characters_per_token": "test_prompt_characters_are_counted_before_tokenizing",
    "template_s": "test_a_template_has_its_time_and_memory",
    "template_bytes": "test_a_template_has_its_time_and_memory",
}
# Tested beside the images.
OF_IMAGES = {
    "images": "test_the_number_of_images_is_bounded",
    "image_bytes": "test_the_bytes_of_an_image_are_bounded",
    "image_pixels": "test_the_pixels_of_all_images_are_bounded_together",
    "image_s": "test_decoding_has_its_time_memory_and_processes",
    "image_memory_bytes": "test_decoding_has_its_time_memory_and_processes",
    "image_processes": "test_decoding_has_its_time_memory_and_processes",
    "prepared_bytes": "test_prepared_images_are_kept_within_their_bound",
    "fetch_s": "test_fetching_has_its_time",
}


def test_every_limit_is_tested_at_its_edge() -> None:
    assert {field.name for field in dataclasses.fields(HttpLimits)} == set(COUNTED) | set(APART) | set(OF_IMAGES)
    assert [name for name in APART.values() if not callable(globals().get(name))] == []
    assert [name for name in OF_IMAGES.values() if not callable(getattr(test_images, name, None))] == []


def test_the_defaults_are_the_documented_ones() -> None:
    counts = {name: getattr(DEFAULTS, name) for name in COUNTED}
    assert counts == {
        "header_bytes": 32 * 1024,
        "header_fields": 100,
        "body_bytes": 32 * MIB,
        "json_depth": 64,
        "choices": 16,
        "prompts": 64,
        "sequences": 128,
        "stop_strings": 16,
        "stop_characters": 256,
        "logit_bias_entries": 1024,
        "top_logprobs": 20,
    }
    assert [getattr(DEFAULTS, name) for name in APART] == [10, 30, 60, 8, 2, 128 * MIB]
    assert [getattr(DEFAULTS, name) for name in OF_IMAGES] == [16, 20 * MIB, 40_000_000, 5, 1024 * MIB, 2, 64 * MIB, 10]


@pytest.mark.parametrize(("name", "edge"), [(name, edge) for name, edges in COUNTED.items() for edge in edges])
async def test_a_count_below_at_and_above_its_limit(name: str, edge: Edge) -> None:
    limit = edge.lowered or getattr(DEFAULTS, name)
    async with running(Options(limits=dataclasses.replace(DEFAULTS, **{name: limit}))) as service:
        for size in (limit - 1, limit):
            assert parse(await edge.probe(service, size))[0] == 200, size
        status, error = failure(await edge.probe(service, limit + 1))
        assert (status, error["code"], error["param"]) == (edge.status, edge.code, edge.param)
        if edge.param is not None:
            assert str(limit) in error["message"]
        assert parse(await edge.probe(service, limit))[0] == 200
        await service.quiet()


async def test_the_default_size_of_a_body_as_it_is_declared(service: Service) -> None:
    """At the limit the body is asked for, above it is refused unread."""
    for size, first in ((32 * MIB - 1, b"HTTP/1.1 100 "), (32 * MIB, b"HTTP/1.1 100 "), (32 * MIB + 1, b"HTTP/1.1 413 ")):
        fields = (("content-type", "application/json"), ("content-length", str(size)), ("expect", "100-continue"))
        reader, writer = await asyncio.open_connection("127.0.0.1", service.port)
        writer.write(head("POST", "/v1/completions", *fields))
        assert (await reader.readline()).startswith(first)
        writer.close()


@pytest.mark.parametrize(("value", "status"), [(-100.1, 400), (-100, 200), (-99.9, 200), (99.9, 200), (100, 200), (100.1, 400)])
async def test_values_of_logit_bias(service: Service, value: float, status: int) -> None:
    response = await service.client.post("/v1/completions", json={**BODY, "logit_bias": {"5": value}})
    assert response.status_code == status


@pytest.mark.parametrize("stream", [False, True])
async def test_the_context_below_at_and_above_before_any_stream_starts(stream: bool) -> None:
    async with running(Options(context_tokens=32)) as service:
        for route, prompt in (("/v1/completions", {"prompt": "x" * 12}), ("/v1/chat/completions", CHAT)):
            used = 12 if "prompt" in prompt else len("user: x\nassistant:") + 1
            for room, status in ((31 - used, 200), (32 - used, 200), (33 - used, 400)):
                response = await service.client.post(route, json={**prompt, "max_tokens": room, "stream": stream})
                assert response.status_code == status
            assert response.headers["content-type"] == "application/json"
            assert response.json()["error"]["code"] == "context_length_exceeded"
        for characters, status in ((31, 200), (32, 400)):
            response = await service.client.post("/v1/completions", json={"prompt": "x" * characters, "stream": stream})
            assert response.status_code == status


class CountingCodec(type(BYTE_CODEC)):  # type: ignore[misc]
    """The byte codec; keeps the longest text that it was asked to encode."""

    longest = 0

    def encode(self, text: str, **options: Any) -> list[int]:
        self.longest = max(self.longest, len(text))
        return list(super().encode(text, **options))


async def test_prompt_characters_are_counted_before_tokenizing() -> None:
    codec = CountingCodec(byte_tokenizer().to_str().encode(), {"eos_token": "<end>"})
    served = fake_router(codec=codec, manifest=FakeManifest(fake_spec(32), chat_template="{{ messages[0].content }}")).resolve(None)
    renderer = TemplateRenderer(2.0, 128 * MIB)
    reader = PromptReader(served, renderer, DEFAULTS)
    assert reader.characters == 8 * 32
    for size in (255, 256):
        assert len(await reader.text("x" * size)) == size
    for refused in (reader.text("x" * 257), reader.prompts(["x", "é" * 257]), reader.prompts("x" * 10**6)):
        with pytest.raises(ContextLengthExceeded, match="characters"):
            await refused
    assert codec.longest == 256
    await renderer.close()


async def test_a_head_has_its_time() -> None:
    async with running(Options(limits=HttpLimits(header_read_s=0.5))) as service:
        for pause_s, status in ((0.1, 200), (5.0, 408)):
            reader, writer = await asyncio.open_connection("127.0.0.1", service.port)
            answer = asyncio.ensure_future(reader.read())
            data = head("GET", "/live")
            writer.write(data[:20])
            await asyncio.wait({answer}, timeout=pause_s)
            writer.write(data[20:])
            assert parse(await answer)[0] == status
            writer.close()


async def test_a_body_may_pause_for_less_than_its_time() -> None:
    async with running(Options(limits=HttpLimits(body_idle_s=0.5))) as service:
        for pause_s, status in ((0.1, 200), (5.0, 408)):
            reader, writer = await asyncio.open_connection("127.0.0.1", service.port)
            answer = asyncio.ensure_future(reader.read())
            data = post("/v1/completions", json.dumps(BODY).encode())
            for at in (-20, -10):
                writer.write(data[at - 10 : at] if at == -10 else data[:at])
                await asyncio.wait({answer}, timeout=pause_s)
            writer.write(data[-10:])
            assert parse(await answer)[0] == status
            writer.close()


async def test_a_reader_may_pause_for_less_than_its_time() -> None:
    """The other side, a reader that pauses for longer, is in test_overload.py."""
    async with running(Options(limits=HttpLimits(stream_write_s=5.0), send_bytes=4096)) as service:
        body = {"prompt": "x", "max_tokens": 500, "n": 4, "stream": True}
        reader, writer = await asyncio.open_connection("127.0.0.1", service.port, limit=1024)
        writer.write(post("/v1/completions", json.dumps(body).encode()))
        await until(lambda: service.rows() == 4)
        [connection] = [one for one in service.server.server_state.connections if one.exchange is not None]
        await until(lambda: bool(connection.flow.write_paused))
        received = await reader.read()
        assert received.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")
        writer.close()


TEMPLATE = (
    "{% if messages[0].content == 'slow' %}{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}{% endif %}"
    "{% if messages[0].content == 'big' %}{% set x = 'x' * 200000000 %}{{ x | length }}{% endif %}"
    "{% if messages[0].content == 'within' %}{% set x = 'x' * 10000000 %}{{ x | length }}{% endif %}{{ messages[0].content }}"
)


async def test_a_template_has_its_time_and_memory() -> None:
    async with running(Options(limits=HttpLimits(template_s=1.0), template=TEMPLATE)) as service:
        for content, status, said in (("within", 200, ""), ("slow", 400, "1 seconds"), ("big", 400, "128 MiB"), ("within", 200, "")):
            response = await service.client.post("/v1/chat/completions", json={**CHAT, "messages": [{"role": "user", "content": content}]})
            assert response.status_code == status, response.text
            assert said in response.text
