"""One HTTP request and its response on a connection: the `receive` and `send` of ASGI, lean enough for one call a token.

It does not know parsing, limits on heads or the app. Invariants: a response starts and completes at most once; nothing is written
after the client left; a client that stops reading for `write_s` seconds is cut off; a request whose body was not read to its end
is answered with `connection: close`.
"""

from __future__ import annotations

import asyncio
import http
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any, Protocol

from uvicorn.protocols.http.flow_control import HIGH_WATER_LIMIT, FlowControl

from service.api.errors import error_response
from service.types.errors import InternalError, ServiceError

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
AsgiApp = Callable[[Scope, Receive, Send], Awaitable[None]]

# A scope's extension: `await write(data)` sends a piece of a started body past the layers between app and connection.
WRITE_EXTENSION = "service.write"

STATUS_LINES = {status.value: f"HTTP/1.1 {status.value} {status.phrase}\r\n".encode() for status in http.HTTPStatus}
STATUS_LINES[499] = b"HTTP/1.1 499 Client Closed Request\r\n"


class Connection(Protocol):
    """What an exchange needs of its connection."""

    transport: asyncio.Transport
    flow: FlowControl

    def default_headers(self) -> list[tuple[bytes, bytes]]:
        """Headers of every response (the date)."""

    def exchange_complete(self, exchange: Exchange) -> None:
        """The response was written to its end."""


class Exchange:
    """ASGI's view of one request. The connection feeds it body bytes and tells it when the client left."""

    def __init__(self, connection: Connection, scope: Scope, write_s: float) -> None:
        self.connection = connection
        self.transport = connection.transport
        self.flow = connection.flow
        self.scope = scope
        self.write_s = write_s
        self.keep_alive = True
        self.expects_continue = False
        self.more_body = True
        self.disconnected = False
        self.response_started = False
        self.response_complete = False
        self.failure: ServiceError | None = None
        self._body = bytearray()
        self._changed = asyncio.Event()
        self._chunked = False
        self._bodyless = False

    def feed(self, data: bytes) -> None:
        """Body bytes arrived; reading pauses while the app has not taken them."""
        if self.response_complete:
            return
        self._body += data
        if len(self._body) > HIGH_WATER_LIMIT:
            self.flow.pause_reading()
        self._changed.set()

    def feed_end(self) -> None:
        """The request's body is complete."""
        self.more_body = False
        self._changed.set()

    def fail(self, failure: ServiceError) -> None:
        """The rest of the body cannot be read: `receive` raises this."""
        self.failure = failure
        self.keep_alive = False
        self._changed.set()

    def disconnect(self) -> None:
        """The client left."""
        self.disconnected = True
        self._changed.set()
        self.flow.resume_writing()

    async def run(self, app: AsgiApp) -> None:
        """Run the app; whatever it does, the response ends or the connection closes."""
        try:
            await app(self.scope, self.receive, self.send)
        finally:
            if not self.response_complete and not self.disconnected:
                if not self.response_started:
                    self.transport.write(error_response(InternalError("The server ended without an answer; the fault is on our side.")))
                self.transport.close()

    async def receive(self) -> Message:
        """ASGI receive: body messages, then `http.disconnect` once the client left or the response is complete."""
        if self.expects_continue and not self.response_started and not self.transport.is_closing():
            self.expects_continue = False
            self.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        if not self.disconnected and not self.response_complete:
            self.flow.resume_reading()
            await self._changed.wait()
            self._changed.clear()
        if self.disconnected or self.response_complete:
            return {"type": "http.disconnect"}
        if self.failure is not None:
            raise self.failure
        body, self._body = bytes(self._body), bytearray()
        return {"type": "http.request", "body": body, "more_body": self.more_body}

    async def send(self, message: Message) -> None:
        """ASGI send. Waits while the transport's buffer is full, at most `write_s` seconds."""
        if self.flow.write_paused:
            await self._drain()
        if self.disconnected:
            return
        if message["type"] == "http.response.body":
            self._write_body(message.get("body", b""), message.get("more_body", False))
        else:
            self._write_start(message["status"], list(message.get("headers", ())))

    async def write(self, data: bytes) -> None:
        """One more piece of a body that has started: what `send` does with it, without the layers between."""
        if self.flow.write_paused:
            await self._drain()
        if not self.disconnected:
            self._write_body(data, True)

    async def _drain(self) -> None:
        try:
            async with asyncio.timeout(self.write_s):
                await self.flow.drain()
        except TimeoutError:
            self.disconnect()
            self.transport.abort()

    def _write_start(self, status: int, headers: list[tuple[bytes, bytes]]) -> None:
        if self.response_started:
            raise RuntimeError("a response can start once")
        self.response_started = True
        if self.more_body:
            self.keep_alive = False
        content = [STATUS_LINES[status]]
        sized = status in (204, 304)
        for name, value in (*self.connection.default_headers(), *headers):
            if b"\n" in value or b"\r" in value:
                raise RuntimeError("a header value holds a line break")
            lowered = name.lower()
            sized = sized or lowered == b"content-length"
            if lowered == b"connection":
                self.keep_alive = self.keep_alive and value.lower() != b"close"
                continue
            content += (lowered, b": ", value, b"\r\n")
        self._bodyless = self.scope["method"] == "HEAD" or status in (204, 304)
        if not sized and not self._bodyless:
            self._chunked = self.scope["http_version"] == "1.1"
            self.keep_alive = self.keep_alive and self._chunked
            content.append(b"transfer-encoding: chunked\r\n" if self._chunked else b"")
        content.append(b"\r\n" if self.keep_alive else b"connection: close\r\n\r\n")
        self.transport.write(b"".join(content))

    def _write_body(self, body: bytes, more: bool) -> None:
        if self.response_complete or not self.response_started:
            raise RuntimeError("a body needs a response that has started and not ended")
        if self._bodyless:
            pass
        elif self._chunked:
            data = b"%x\r\n%b\r\n" % (len(body), body) if body else b""
            self.transport.write(data if more else data + b"0\r\n\r\n")
        elif body:
            self.transport.write(body)
        if not more:
            self.response_complete = True
            self._changed.set()
            self.connection.exchange_complete(self)
