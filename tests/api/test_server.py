"""SIGTERM in a process of its own: readiness off, running streams to their end or to one error event, the second signal ends now."""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import sys
from collections.abc import AsyncIterator

import httpx
import pytest

from tests.api.conftest import Options, running


@contextlib.asynccontextmanager
async def process(drain_s: float) -> AsyncIterator[tuple[asyncio.subprocess.Process, httpx.AsyncClient]]:
    child = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "tests.api.drained_server", str(drain_s), stdout=asyncio.subprocess.PIPE
    )
    assert child.stdout is not None
    port = int(await child.stdout.readline())
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=30) as client:
        yield child, client
    assert await child.wait() == 0


async def stream_through_a_signal(child: asyncio.subprocess.Process, client: httpx.AsyncClient, tokens: int, signals: int = 1) -> list[str]:
    lines: list[str] = []
    body = {"prompt": "x", "max_tokens": tokens, "stream": True, "stream_options": {"include_usage": True}}
    async with client.stream("POST", "/v1/completions", json=body) as response:
        async for line in response.aiter_lines():
            lines += [line] if line else []
            if len(lines) == 3 and signals:
                for _ in range(signals):
                    child.send_signal(signal.SIGTERM)
                    await asyncio.sleep(0.05)
                if signals == 1:
                    assert (await client.get("/ready")).status_code == 503
                    refused = await client.post("/v1/completions", json={"prompt": "y"})
                    assert refused.status_code == 503
                    assert refused.headers["retry-after"]
                signals = 0
    return lines


async def test_running_streams_end_before_the_server_does() -> None:
    async with process(30.0) as (child, client):
        lines = await stream_through_a_signal(child, client, 60)
    assert lines[-1] == "data: [DONE]"
    assert json.loads(lines[-2].removeprefix("data: "))["usage"]["completion_tokens"] == 60


async def test_what_does_not_end_in_time_gets_one_error_event() -> None:
    async with process(0.3) as (child, client):
        lines = await stream_through_a_signal(child, client, 2000)
    assert '"code":"unavailable"' in lines[-1]
    assert "[DONE]" not in "".join(lines)


async def test_the_second_signal_ends_at_once() -> None:
    async with process(600.0) as (child, client):
        with contextlib.suppress(httpx.RemoteProtocolError, httpx.ReadError):
            lines = await stream_through_a_signal(child, client, 2000, signals=2)
            assert "[DONE]" not in "".join(lines)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
async def test_an_idle_server_ends_cleanly(number: signal.Signals) -> None:
    async with process(5.0) as (child, client):
        assert (await client.get("/ready")).status_code == 200
        child.send_signal(number)


@pytest.mark.parametrize("access_log", [True, False])
async def test_the_access_log_has_a_line_for_each_request_or_none(access_log: bool, capsys: pytest.CaptureFixture[str]) -> None:
    async with running(Options(http={"access_log": access_log})) as service:
        answer = await service.client.post("/v1/completions", json={"prompt": "xyz", "max_tokens": 2})
        await service.client.get("/nope")
    lines = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    logged = [line for line in lines if line["event"] == "request"]
    assert "worker_ready" in {line["event"] for line in lines}
    if access_log:
        assert [(line["route"], line["status"], line["outcome"]) for line in logged] == [
            ("/v1/completions", 200, "ok"),
            ("other", 404, "not_found"),
        ]
        assert logged[0]["request_id"] == answer.headers["x-request-id"]
        assert (logged[0]["prompt_tokens"], logged[0]["completion_tokens"]) == (3, 2)
    else:
        assert logged == []
