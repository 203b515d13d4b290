"""A reader that stops reading, on sockets whose buffers are small."""

from __future__ import annotations

import asyncio
import socket

import pytest
from uvicorn.protocols.http.flow_control import FlowControl

from service.api.exchange import Exchange


class Wire(asyncio.Protocol):
    """The server's end, with the flow control that a connection has."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport, self.flow = transport, FlowControl(transport)
        self.lost = asyncio.get_running_loop().create_future()

    def pause_writing(self) -> None:
        self.flow.pause_writing()

    def resume_writing(self) -> None:
        self.flow.resume_writing()

    def connection_lost(self, exc: Exception | None) -> None:
        self.lost.set_result(exc)

    def default_headers(self) -> list[tuple[bytes, bytes]]:
        return []

    def exchange_complete(self, exchange: Exchange) -> None:
        raise AssertionError("nothing completes here")


@pytest.mark.parametrize("reads", [False, True])
async def test_a_client_that_stops_reading_is_cut_off_after_its_time(reads: bool) -> None:
    ours, theirs = socket.socketpair()
    theirs.setblocking(False)
    loop = asyncio.get_running_loop()
    _, wire = await loop.create_connection(Wire, sock=ours)
    exchange = Exchange(wire, {"method": "POST", "http_version": "1.1"}, write_s=0.1)
    exchange.feed_end()

    async def read_on() -> None:
        while reads and await loop.sock_recv(theirs, 1 << 20):
            pass

    reader = asyncio.ensure_future(read_on())
    await exchange.send({"type": "http.response.start", "status": 200, "headers": []})
    for _ in range(200):
        await exchange.write(b"x" * 65_536)
    assert exchange.disconnected is not reads
    if not reads:
        await wire.lost
        assert (await exchange.receive())["type"] == "http.disconnect"
    reader.cancel()
    wire.transport.abort()
    theirs.close()
