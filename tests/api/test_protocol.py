"""Raw sockets against the connection: heads, bodies, slow senders, pipelines, clients that leave."""

from __future__ import annotations

import asyncio
import json

import pytest

from service.types.settings import HttpLimits
from tests.api.conftest import Options, Service, failure, head, parse, post, running

TIGHT = HttpLimits(header_bytes=500, header_fields=10, header_read_s=0.2, body_idle_s=0.2)
BODY = json.dumps({"prompt": "x", "max_tokens": 2}).encode()


def padded(size: int) -> bytes:
    base = head("GET", "/live", ("x-pad", ""))
    return head("GET", "/live", ("x-pad", "p" * (size - len(base))))


@pytest.mark.parametrize("pieces", [1, 7])
async def test_head_bytes_below_at_and_above_their_limit(pieces: int) -> None:
    async with running(Options(limits=TIGHT)) as service:
        for size, expected in ((499, 200), (500, 200), (501, 431)):
            data = padded(size)
            assert len(data) == size
            reader, writer = await asyncio.open_connection("127.0.0.1", service.port)
            step = -(-size // pieces)
            for at in range(0, size, step):
                writer.write(data[at : at + step])
                await writer.drain()
                await asyncio.sleep(0)
            assert parse(await reader.read())[0] == expected
            writer.close()


async def test_header_fields_below_at_and_above_their_limit() -> None:
    async with running(Options(limits=TIGHT)) as service:
        for count, expected in ((9, 200), (10, 200), (11, 431)):
            fields = [(f"x-{at}", "1") for at in range(count - 2)]
            status, _, _ = parse(await service.raw(head("GET", "/live", *fields)))
            assert status == expected


async def test_a_head_of_twenty_megabytes_is_cut_off(service: Service) -> None:
    status, error = failure(await service.raw(b"GET /live HTTP/1.1\r\nx: " + b"a" * (20 << 20)))
    assert (status, error["code"]) == (431, "headers_too_large")


@pytest.mark.parametrize(
    "data",
    [
        b"NONSENSE\r\n\r\n",
        b"GET /live HTTP/9.9\r\n\r\n",
        b"GET /live HTTP/1.1\r\nbad header\r\n\r\n",
        b"GET /live HTTP/1.1\r\nhost: a\r\n folded\r\n\r\n",
        b"POST /tokenize HTTP/1.1\r\ncontent-length: 1\r\ncontent-length: 2\r\n\r\n",
        b"POST /tokenize HTTP/1.1\r\ncontent-length: 5\r\ntransfer-encoding: chunked\r\n\r\n",
        b"GET /\xff\xfe HTTP/1.1\r\nhost: a\r\n\r\n",
        bytes(range(256)) + b"\r\n\r\n",
    ],
)
async def test_what_is_not_http_gets_400(service: Service, data: bytes) -> None:
    assert failure(await service.raw(data))[0] == 400


async def test_a_stalled_head_gets_408_and_a_silent_connection_is_closed() -> None:
    async with running(Options(limits=TIGHT)) as service:
        assert failure(await service.raw(b"GET /live HTTP/1.1\r\nhost"))[0] == 408
        assert await service.raw(b"") == b""


async def test_a_head_that_trickles_does_not_extend_its_time() -> None:
    async with running(Options(limits=TIGHT)) as service:
        reader, writer = await asyncio.open_connection("127.0.0.1", service.port)
        answer = asyncio.ensure_future(reader.read())
        for _ in range(200):
            if answer.done():
                break
            writer.write(b"x")
            await asyncio.wait({answer}, timeout=0.02)
        assert failure(await answer)[0] == 408
        writer.close()


@pytest.mark.parametrize("framing", [("content-length", "50"), ("transfer-encoding", "chunked")])
async def test_a_stalled_body_gets_408(framing: tuple[str, str]) -> None:
    async with running(Options(limits=TIGHT)) as service:
        data = head("POST", "/v1/completions", ("content-type", "application/json"), framing)
        assert failure(await service.raw(data + b"1\r\n{"))[0] == 408


async def test_bad_chunks_and_endless_chunk_extensions_are_refused() -> None:
    async with running(Options(limits=TIGHT)) as service:
        data = head("POST", "/v1/completions", ("content-type", "application/json"), ("transfer-encoding", "chunked"))
        assert failure(await service.raw(data + b"zz\r\n"))[0] == 400
        assert failure(await service.raw(data + b"1;x=" + b"y" * 1000))[0] == 431
        assert failure(await service.raw(data + b"1\r\n{\r\n0\r\nx: " + b"y" * 1_000_000))[0] == 431


async def test_a_pipeline_is_answered_in_order(service: Service) -> None:
    first = post("/v1/completions", BODY, close=False)
    answer = await service.raw(first + head("GET", "/live", close=False) + head("GET", "/nope"))
    assert [int(part[9:12]) for part in answer.split(b"HTTP/1.1 ")[1:] for part in [b"HTTP/1.1 " + part]] == [200, 200, 404]


async def test_a_long_pipeline_costs_no_tasks_and_is_answered(service: Service) -> None:
    answer = await service.raw(head("GET", "/live", close=False) * 300 + head("GET", "/live"))
    assert answer.count(b"HTTP/1.1 200") == 301


async def test_bytes_behind_a_chunked_body_are_not_a_request(service: Service) -> None:
    fields = (("content-type", "application/json"), ("transfer-encoding", "chunked"))
    data = head("POST", "/v1/completions", *fields, close=False) + b"%x\r\n%b\r\n0\r\n\r\n" % (len(BODY), BODY)
    answer = await service.raw(data + head("GET", "/live", close=False))
    assert answer.count(b"HTTP/1.1 ") == 1
    assert parse(answer)[1]["connection"] == "close"


async def test_connections_are_kept_and_http_1_0_is_closed(service: Service) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", service.port)
    for _ in range(3):
        writer.write(head("GET", "/live", close=False))
        start = await reader.readuntil(b"\r\n\r\n")
        assert b"200 OK" in start
        await reader.readexactly(len(b'{"status":"ok"}'))
    writer.write(b"GET /live HTTP/1.0\r\n\r\n")
    assert (await reader.read()).endswith(b'{"status":"ok"}')
    writer.close()


async def test_an_unread_body_is_drained_so_that_the_answer_arrives(service: Service) -> None:
    status, error = failure(await service.raw(post("/nope", b"x" * (4 << 20), close=False)))
    assert (status, error["code"]) == (404, "not_found")


async def test_continue_is_sent_when_the_body_is_wanted(service: Service) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", service.port)
    fields = (("content-type", "application/json"), ("content-length", str(len(BODY))), ("expect", "100-continue"))
    writer.write(head("POST", "/v1/completions", *fields))
    assert await reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
    writer.write(BODY)
    assert (await reader.read()).startswith(b"HTTP/1.1 200")
    writer.close()
