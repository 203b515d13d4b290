"""Requests that are odd, broken or meant to harm: each gets the one error shape or a plain answer; the server goes on, nothing is left."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from service.types.settings import HttpLimits
from tests.api.conftest import Options, Service, failure, head, parse, post, running

BODY = b'{"prompt":"x","max_tokens":1}'
JSON = ("content-type", "application/json")
CHUNKED = ("transfer-encoding", "chunked")
WEBSOCKET = (("upgrade", "websocket"), ("connection", "upgrade"), ("sec-websocket-key", "AAAA"), ("sec-websocket-version", "13"))
QUICK = HttpLimits(header_read_s=0.5, body_idle_s=0.5)


def in_chunks(body: bytes) -> bytes:
    return b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body)


def lines(*given: bytes) -> bytes:
    return b"\r\n".join(given) + b"\r\n\r\n"


GET, HOST, CLOSE = b"GET /live HTTP/1.1", b"host: a", b"connection: close"
COMPLETIONS = "/v1/completions"
ANSWERED: dict[str, tuple[bytes, int]] = {
    "options": (head("OPTIONS", "/v1/models"), 405),
    "options *": (head("OPTIONS", "*"), 404),
    "trace": (head("TRACE", "/live"), 405),
    "put": (head("PUT", "/live"), 405),
    "delete": (head("DELETE", "/v1/models/fake"), 405),
    "an absolute target": (head("GET", "http://evil.example/live"), 200),
    "an absolute target to nowhere": (head("GET", "http://evil.example/nope"), 404),
    "two slashes": (head("GET", "//live"), 404),
    "an escaped slash": (head("GET", "/v1%2Fmodels"), 200),
    "a fragment": (head("GET", "/live#x"), 200),
    "an escaped null": (head("GET", "/%00"), 404),
    "escapes that are no UTF-8": (head("GET", "/%ff%fe"), 404),
    "an escaped surrogate": (head("GET", "/v1/models/%ed%a0%80"), 404),
    "broken escapes": (head("GET", "/%zz%"), 404),
    "dots": (head("GET", "/../../etc/passwd"), 404),
    "escaped dots": (head("GET", "/v1/models/%2e%2e/%2e%2e/live"), 404),
    "a query that is no UTF-8": (head("GET", "/live?a=%ff&b=%"), 200),
    "a host that is no address": (lines(b"GET /nope HTTP/1.1", b"host: [", CLOSE), 404),
    "header values that are no UTF-8": (lines(GET, HOST, CLOSE, b"x: \xff\xfe", b"accept: \xff", b"authorization: Bearer \xff"), 200),
    "an origin that is no UTF-8": (lines(GET, HOST, CLOSE, b"origin: \xff\xfe"), 403),
    "an origin that is no URL": (lines(GET, HOST, CLOSE, b"origin: http://[::1"), 403),
    "a header value of UTF-8": (lines(GET, HOST, CLOSE, "x: é日".encode()), 200),
    "empty lines before the head": (b"\r\n\r\n" + head("GET", "/live"), 200),
    "HTTP/1.0": (lines(b"GET /live HTTP/1.0"), 200),
    "HTTP/1.0 that wants to stay": (lines(b"GET /live HTTP/1.0", b"connection: keep-alive"), 200),
    "a body behind GET": (head("GET", "/live", ("content-length", "5")) + b"hello", 200),
    "a body that nobody promised": (head("POST", COMPLETIONS, JSON) + BODY, 400),
    "no body": (head("POST", COMPLETIONS, JSON), 400),
    "an expectation that nobody knows": (post(COMPLETIONS, BODY, ("expect", "x-magic")), 200),
    "a chunked body": (head("POST", COMPLETIONS, JSON, CHUNKED) + in_chunks(BODY), 200),
    "a length beyond 64 bits": (head("POST", COMPLETIONS, JSON, ("content-length", "9" * 40)), 400),
    "a length of 64 bits": (head("POST", COMPLETIONS, JSON, ("content-length", str(2**64 - 1))), 413),
    "websocket": (head("GET", "/live", *WEBSOCKET, close=False)[:-2] + b"connection: close\r\n\r\n", 200),
    "a body with an offer of h2c": (post(COMPLETIONS, BODY, ("upgrade", "h2c"), ("connection", "upgrade, close")), 200),
    "two Host fields": (lines(GET, HOST, b"host: b"), 400),
    "two Authorization fields": (lines(GET, HOST, b"authorization: Bearer a", b"authorization: Bearer b"), 400),
    "no Host field": (lines(GET), 400),
    "HTTP/0.9": (lines(b"GET /live"), 400),
    "HTTP/2": (lines(b"PRI * HTTP/2.0") + lines(b"SM"), 400),
    "CONNECT": (lines(b"CONNECT a:443 HTTP/1.1", b"host: a:443"), 400),
    "TLS": (lines(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03"), 400),
    "a method that nobody knows": (lines(b"BREW /live HTTP/1.1", HOST), 400),
    "a long method": (lines(b"A" * 3000 + b" / HTTP/1.1", HOST), 400),
    "a target without a slash": (head("GET", "live"), 400),
    "tabs in the request line": (lines(b"GET\t/live\tHTTP/1.1", HOST), 400),
    "a null in a value": (lines(GET, b"host: a\x00b"), 400),
    "a null in a name": (lines(GET, b"ho\x00st: a"), 400),
    "a null in the target": (lines(b"GET /li\x00ve HTTP/1.1", HOST), 400),
    "a space before the colon": (lines(GET, b"host : a"), 400),
    "an empty name": (lines(GET, HOST, b": x"), 400),
    "no colon": (lines(GET, HOST, b"x"), 400),
    "a folded field": (lines(GET, HOST, b"x: y", b"  z"), 400),
    "a folded field behind upgrade": (lines(GET, HOST, b"upgrade: y", b" z", CLOSE), 400),
    "bare line feeds between fields": (lines(GET, HOST, b"x: y\nz: w", CLOSE), 400),
    "a bare carriage return": (lines(GET, HOST, b"x: y\rz: w", CLOSE), 400),
    "bare line feeds only": (b"GET /live HTTP/1.1\nhost: a\n\n", 408),
    "length and chunks": (head("POST", COMPLETIONS, JSON, ("content-length", "5"), CHUNKED) + in_chunks(BODY), 400),
    "chunks and length": (head("POST", COMPLETIONS, JSON, CHUNKED, ("content-length", "5")) + in_chunks(BODY), 400),
    "chunks twice": (head("POST", COMPLETIONS, JSON, CHUNKED, CHUNKED) + in_chunks(BODY), 400),
    "another transfer encoding": (head("POST", COMPLETIONS, JSON, ("transfer-encoding", "gzip")) + BODY, 400),
    "chunks that are not last": (head("POST", COMPLETIONS, JSON, ("transfer-encoding", "chunked, x")) + in_chunks(BODY), 400),
    "a negative length": (head("POST", COMPLETIONS, JSON, ("content-length", "-5")) + BODY, 400),
    "a length with a sign": (head("POST", COMPLETIONS, JSON, ("content-length", f"+{len(BODY)}")) + BODY, 400),
    "a length with an underscore": (head("POST", COMPLETIONS, JSON, ("content-length", "2_9")) + BODY, 400),
    "a list of lengths": (head("POST", COMPLETIONS, JSON, ("content-length", "29, 29")) + BODY, 400),
    "an empty length": (head("POST", COMPLETIONS, JSON, ("content-length", "")) + BODY, 400),
    "chunks that end in line feeds": (head("POST", COMPLETIONS, JSON, CHUNKED) + in_chunks(BODY).replace(b"\r\n", b"\n"), 400),
    "a negative chunk": (head("POST", COMPLETIONS, JSON, CHUNKED) + b"-1\r\n", 400),
    "a chunk beyond 64 bits": (head("POST", COMPLETIONS, JSON, CHUNKED) + b"f" * 20 + b"\r\n", 400),
}


@contextlib.asynccontextmanager
async def watched(capsys: pytest.CaptureFixture[str]) -> AsyncIterator[Service]:
    """A server that afterwards has no connection, task or block left over, logged no fault, and still answers."""
    async with running(Options(limits=QUICK)) as service:
        before = len(asyncio.all_tasks())
        yield service
        await service.complete(prompt="x", max_tokens=1)
        await service.client.aclose()
        await service.quiet()
        assert len(asyncio.all_tasks()) <= before
        said = capsys.readouterr()
        assert "Traceback" not in said.out + said.err
        assert "request_failed" not in said.out + said.err


async def test_odd_requests_get_an_answer_of_their_own(capsys: pytest.CaptureFixture[str]) -> None:
    async with watched(capsys) as service:
        got: dict[str, Any] = {}
        for name, (data, expected) in ANSWERED.items():
            async with asyncio.timeout(10):
                answer = await service.raw(data)
            status = parse(answer)[0]
            if status >= 400:
                failure(answer)
            if status != expected or answer.count(b"HTTP/1.1 ") != 1:
                got[name] = answer
        assert got == {}


async def test_head_requests_are_answered_without_a_body(capsys: pytest.CaptureFixture[str]) -> None:
    async with watched(capsys) as service:
        for path, expected in (("/live", 405), ("/nope", 404)):
            status, _, body = parse(await service.raw(head("HEAD", path)))
            assert (status, body) == (expected, b"")


async def test_two_requests_in_one_packet_are_answered_in_order(capsys: pytest.CaptureFixture[str]) -> None:
    async with watched(capsys) as service:
        bad = b"GET /live HTTP/1.1\r\nhost: a\r\nhost: b\r\n\r\n"
        both = await service.raw(post(COMPLETIONS, BODY, close=False) + post(COMPLETIONS, BODY))
        assert both.count(b"HTTP/1.1 200") == 2
        second_bad = await service.raw(head("GET", "/live", close=False) + bad + head("GET", "/live"))
        assert [part[:3] for part in second_bad.split(b"HTTP/1.1 ")[1:]] == [b"200", b"400"]
        hidden = await service.raw(post(COMPLETIONS, BODY + head("GET", "/live")))
        assert hidden.count(b"HTTP/1.1 ") == 1


async def test_upgrades_are_not_taken_and_the_connection_goes_on(capsys: pytest.CaptureFixture[str]) -> None:
    async with watched(capsys) as service:
        offer = head("GET", "/live", *WEBSOCKET, close=False)
        answer = await service.raw(offer + offer + head("GET", "/nope"))
        assert [part[:3] for part in answer.split(b"HTTP/1.1 ")[1:]] == [b"200", b"200", b"404"]


async def test_connections_that_say_nothing_sensible_leave_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    async with watched(capsys) as service:
        pairs = [await asyncio.open_connection("127.0.0.1", service.port) for _ in range(100)]
        for at, (_, writer) in enumerate(pairs):
            writer.write([b"", b"GET", head("POST", COMPLETIONS, JSON, ("content-length", "50")), b"\x00\xff\r\n\r\n"][at % 4])
        for _, writer in pairs[::2]:
            writer.transport.abort()
        for reader, _ in pairs[1::2]:
            with contextlib.suppress(ConnectionError):
                await reader.read()
        for _, writer in pairs:
            writer.close()


NAMES = [
    "prompt",
    "max_tokens",
    "n",
    "stop",
    "stream",
    "temperature",
    "logprobs",
    "logit_bias",
    "seed",
    "echo",
    "messages",
    "stream_options",
]
NAMES += [
    "min_tokens",
    "top_k",
    "best_of",
    "tools",
    "metadata",
    "model",
    "stop_token_ids",
    "tokens",
    "chat_template_kwargs",
    "role",
    "content",
]
LEAVES = (
    st.none()
    | st.booleans()
    | st.sampled_from(
        [0, 1, -1, 2, 16, 2**31, 2**63, 2**64, 10**30, 0.5, -0.0, 1e308, "", "x", "<end>", "\x00", "日", "\ud7ff", "user", "text"]
    )
    | st.integers(-3, 300)
    | st.text(max_size=8)
)
VALUES = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(NAMES) | st.text(max_size=4), inner, max_size=4),
    max_leaves=8,
)
MESSAGES = st.lists(st.fixed_dictionaries({"role": st.just("user") | VALUES, "content": st.just("x") | VALUES}), max_size=3)
BODIES = st.tuples(
    st.sampled_from([COMPLETIONS, "/v1/chat/completions", "/tokenize", "/detokenize"]),
    st.fixed_dictionaries({"max_tokens": st.integers(1, 3)}, optional={"prompt": st.just("x") | VALUES, "messages": MESSAGES | VALUES}),
    st.dictionaries(st.sampled_from(NAMES), VALUES, max_size=3),
)
FUZZ = settings(deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)


async def test_no_body_makes_the_server_fail(capsys: pytest.CaptureFixture[str]) -> None:
    """Structured JSON around sound bodies: every answer is 200 or a 4xx in the one shape."""
    async with watched(capsys) as service:
        statuses: set[int] = set()
        drawn: list[tuple[str, dict[str, Any]]] = []

        @settings(FUZZ, max_examples=200)
        @given(BODIES)
        def draw(case: tuple[str, dict[str, Any], dict[str, Any]]) -> None:
            path, base, more = case
            drawn.append((path, {**base, **more}))

        draw()

        async def send(path: str, body: dict[str, Any]) -> None:
            async with asyncio.timeout(20):
                response = await service.client.post(path, json=body)
            statuses.add(response.status_code)
            assert response.status_code == 200 or 400 <= response.status_code < 500, (path, body, response.text)
            if response.status_code != 200:
                assert set(response.json()["error"]) == {"message", "type", "param", "code"}

        await asyncio.gather(*(send(path, body) for path, body in drawn))
        assert statuses >= {200, 400}


WORDS = b"GET|POST| |/live|/v1/completions|HTTP/1.1|\r\n|\n|\r|\r\n\r\n|host: a|:|content-length: |29|-1|transfer-encoding: chunked"
PIECES = st.sampled_from([*WORDS.split(b"|"), b"1d", b"0", b"\x00", b"\xff", b"connection: close", b"content-type: application/json", BODY])
SOUND = [
    head("GET", "/live", close=False),
    post(COMPLETIONS, BODY, close=False),
    head("POST", COMPLETIONS, JSON, CHUNKED) + in_chunks(BODY),
]


async def test_no_bytes_make_the_server_fail(capsys: pytest.CaptureFixture[str]) -> None:
    """Raw bytes: noise, pieces of requests in any order, and sound requests with bytes changed."""
    async with watched(capsys) as service:
        drawn: list[bytes] = []

        @settings(FUZZ, max_examples=100)
        @given(st.binary(max_size=200) | st.lists(PIECES, max_size=25).map(b"".join))
        def draw(data: bytes) -> None:
            drawn.append(data)

        @settings(FUZZ, max_examples=150)
        @given(st.sampled_from(SOUND), st.lists(st.tuples(st.integers(0, 400), st.binary(max_size=3)), min_size=1, max_size=4))
        def change(data: bytes, changes: list[tuple[int, bytes]]) -> None:
            for at, put in changes:
                at %= len(data)
                data = data[:at] + put + data[at + 1 :]
            drawn.append(data)

        draw()
        change()

        statuses: set[int] = set()

        async def send(data: bytes) -> None:
            """What comes back until the server closes, at most for longer than its patience."""
            reader, writer = await asyncio.open_connection("127.0.0.1", service.port)
            answer = b""
            with contextlib.suppress(ConnectionError, TimeoutError):
                writer.write(data)
                async with asyncio.timeout(1.5):
                    while piece := await reader.read(1 << 16):
                        answer += piece
            found = {int(part[:3]) for part in answer.split(b"HTTP/1.1 ")[1:]}
            assert all(status < 500 for status in found), (data, answer)
            statuses.update(found)
            writer.transport.abort()

        await asyncio.gather(*map(send, drawn))
        assert statuses >= {200, 400, 404, 408, 415}
        assert json.loads((await service.client.get("/live")).text) == {"status": "ok"}
