"""What a client is told when the server cannot serve it, and what happens when the client leaves: all through real sockets."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest

from service.api.protocol import BoundedProtocol
from service.types.settings import HttpLimits, SchedulerSettings
from tests.api.conftest import Options, Service, post, running, until
from tests.fakes import FakeBehaviour

BUSY = {"prompt": "abcdefghijklmno", "max_tokens": 5}


@contextlib.asynccontextmanager
async def full(scheduler: SchedulerSettings) -> AsyncIterator[Service]:
    """A server whose worker hangs, with one sequence running and one waiting."""
    behaviour = FakeBehaviour(step_s=0.001, start_s=0.0, stalled=True)
    async with running(Options(scheduler=scheduler, behaviour=behaviour)) as service:
        async with httpx.AsyncClient(base_url=service.url, timeout=30, verify=False) as client:
            posts = [asyncio.ensure_future(client.post("/v1/completions", json=BUSY))]
            await until(lambda: service.metric("requests_running") == 1)
            posts.append(asyncio.ensure_future(client.post("/v1/completions", json=BUSY)))
            await until(lambda: service.metric("requests_waiting") == 1)
            yield service
            for one in posts:
                one.cancel()
            await asyncio.gather(*posts, return_exceptions=True)
        await until(lambda: service.metric("requests_running") == 0)


def refused(response: httpx.Response, status: int, code: str) -> dict[str, Any]:
    assert (response.status_code, response.headers["content-type"]) == (status, "application/json")
    error: dict[str, Any] = response.json()["error"]
    assert error["code"] == code
    assert set(error) == {"message", "type", "param", "code"}
    return error


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    "scheduler",
    [SchedulerSettings(batch_size=1, queue_requests=1), SchedulerSettings(batch_size=1, queue_tokens=20)],
    ids=["requests", "tokens"],
)
async def test_a_full_queue_says_when_to_come_back(scheduler: SchedulerSettings, stream: bool) -> None:
    async with full(scheduler) as service:
        response = await service.client.post("/v1/completions", json={**BUSY, "stream": stream})
        assert refused(response, 429, "queue_full")["type"] == "rate_limit_error"
        assert 1 <= int(response.headers["retry-after"]) <= 60
        assert service.metric("admission_rejections_total", reason="queue_full") == 1
        assert (await service.client.get("/live")).status_code == 200


async def test_what_still_fits_the_queue_is_taken() -> None:
    async with full(SchedulerSettings(batch_size=1, queue_requests=2, queue_tokens=30)) as service:
        third = asyncio.ensure_future(service.client.post("/v1/completions", json=BUSY))
        await until(lambda: service.metric("requests_waiting") == 2)
        third.cancel()


async def test_a_loading_server_says_so() -> None:
    async with running(Options(start=False)) as service:
        response = await service.client.post("/v1/completions", json=BUSY)
        refused(response, 503, "unavailable")
        assert int(response.headers["retry-after"]) >= 1
        probes = [(await service.client.get(path)).status_code for path in ("/ready", "/health", "/live")]
        assert probes == [503, 503, 200]


async def test_a_draining_server_refuses_what_is_new_and_ends_what_runs() -> None:
    async with full(SchedulerSettings(batch_size=1)) as service:
        draining = asyncio.ensure_future(service.router.drain(0.2))
        await until(lambda: not service.router.ready())
        response = await service.client.post("/v1/completions", json=BUSY)
        refused(response, 503, "unavailable")
        assert int(response.headers["retry-after"]) >= 1
        await draining


@pytest.mark.parametrize("stream", [False, True])
async def test_a_request_that_kills_its_worker_is_told_not_to_return(stream: bool) -> None:
    behaviour = FakeBehaviour(step_s=0.001, start_s=0.0, kills=lambda opening: opening.tokens[0] == ord("K"))
    async with running(Options(behaviour=behaviour)) as service:
        killer = asyncio.ensure_future(service.client.post("/v1/completions", json={"prompt": "K", "stream": stream}))
        innocent = service.client.post("/v1/completions", json={"prompt": "x", "max_tokens": 200})
        answer, response = await asyncio.gather(innocent, killer)
        assert answer.status_code == 200
        refused(response, 500, "worker_killed")
        assert response.headers["x-should-retry"] == "false"
        assert service.backend.starts > 1
        await service.complete(prompt="y", max_tokens=1)


@pytest.mark.parametrize("stream", [False, True])
async def test_a_passed_deadline_is_504(stream: bool) -> None:
    behaviour = FakeBehaviour(step_s=0.001, start_s=0.0, stalled=True)
    async with running(Options(behaviour=behaviour, scheduler=SchedulerSettings(request_deadline_s=0.1))) as service:
        response = await service.client.post("/v1/completions", json={**BUSY, "stream": stream})
        refused(response, 504, "deadline_exceeded")
        assert service.metric("requests_total", outcome="deadline") == 1


async def test_a_deadline_that_passes_in_a_stream_is_its_last_event() -> None:
    behaviour = FakeBehaviour(step_s=0.02, start_s=0.0)
    async with running(Options(behaviour=behaviour, scheduler=SchedulerSettings(request_deadline_s=0.3))) as service:
        body = {"prompt": "x", "max_tokens": 2000, "stream": True}
        events = (await service.client.post("/v1/completions", json=body)).text.strip().split("\n\n")
        assert json.loads(events[-1].removeprefix("data: "))["error"]["code"] == "deadline_exceeded"
        assert len(events) > 2


@pytest.fixture
def steps_when_lost(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Called by every connection when the server sees its end; what it returns is kept."""
    noted: list[Any] = [None]
    real = BoundedProtocol.connection_lost

    def noting(self: BoundedProtocol, exc: Exception | None) -> None:
        if noted[0] is not None:
            noted.append(noted[0]())
        real(self, exc)

    monkeypatch.setattr(BoundedProtocol, "connection_lost", noting)
    return noted


@pytest.mark.parametrize("leave", ["abort", "close", "half_close"])
@pytest.mark.parametrize("stream", [True, False])
async def test_a_client_that_leaves_frees_its_rows_within_a_step(stream: bool, leave: str, steps_when_lost: list[Any]) -> None:
    """From the moment at which the server sees the end of the connection, at most one more step is sent to the worker.

    The end is seen in the event loop's next turn after it arrives; a step may be sent between that and the wake-up of the task that
    cancels. (What passes between the client's call and the arrival is the network's.)
    """
    async with running(Options(behaviour=FakeBehaviour(step_s=0.005, start_s=0.0))) as service:
        steps_when_lost[0] = lambda: service.backend.steps_executed
        body = json.dumps({"prompt": "x", "max_tokens": 2000, "n": 3, "stream": stream}).encode()
        _, writer = await asyncio.open_connection("127.0.0.1", service.port)
        writer.write(post("/v1/completions", body))
        await until(lambda: service.rows() == 3 and service.backend.steps_executed > 3)
        {"abort": writer.transport.abort, "close": writer.close, "half_close": writer.write_eof}[leave]()
        await until(lambda: len(steps_when_lost) > 1)
        seen_at = steps_when_lost[1]
        await service.quiet()
        assert service.backend.steps_executed - seen_at <= 1
        assert service.metric("requests_total", outcome="cancelled") == 3
        writer.close()


async def test_a_client_that_leaves_while_it_waits_leaves_the_queue() -> None:
    async with full(SchedulerSettings(batch_size=1)) as service:
        _, writer = await asyncio.open_connection("127.0.0.1", service.port)
        writer.write(post("/v1/completions", json.dumps(BUSY).encode()))
        await until(lambda: service.metric("requests_waiting") == 2)
        writer.transport.abort()
        await until(lambda: service.metric("requests_waiting") == 1)


async def test_a_client_that_stops_reading_is_cut_off_and_costs_no_memory() -> None:
    """With small buffers on both sides: the kernel's own would take some megabytes before anything waits."""
    limits = HttpLimits(stream_write_s=0.2)
    async with running(Options(limits=limits, send_bytes=4096)) as service:
        loop = asyncio.get_running_loop()
        client = socket.socket()
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.setblocking(False)
        await loop.sock_connect(client, ("127.0.0.1", service.port))
        body = {"prompt": "x", "max_tokens": 2000, "n": 8, "stream": True}
        await loop.sock_sendall(client, post("/v1/completions", json.dumps(body).encode()))
        await until(lambda: service.rows() == 8)
        [connection] = [one for one in service.server.server_state.connections if one.exchange is not None]
        buffered: list[int] = []
        paused: list[bool] = []

        def gone() -> bool:
            buffered.append(connection.transport.get_write_buffer_size())
            paused.append(connection.flow.write_paused)
            return connection not in service.server.server_state.connections

        await until(gone)
        await service.quiet()
        # Writing pauses above 64 KiB; the kernel may take a little more before anyone looks.
        assert any(paused) and max(buffered) < 80 * 1024
        assert service.metric("requests_total", outcome="cancelled") == 8
        received = b""
        with contextlib.suppress(ConnectionError):
            while data := await loop.sock_recv(client, 1 << 16):
                received += data
        assert b"[DONE]" not in received
        client.close()
        await service.complete(prompt="x", max_tokens=1)
