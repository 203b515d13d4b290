"""Sending requests over our own lean HTTP/1.1 connections: one write, one parser, no task for each event.

It does not know loads or rows. A sender keeps idle connections and opens one whenever none is free, so that an open loop never waits for an
answer. Invariant: a connection carries one request at a time and is reused only after a complete answer.
"""

from __future__ import annotations

import asyncio
import time
from typing import Protocol
from urllib.parse import urlsplit

from service.loadgen.watch import SendFailure, Watch
from service.loadgen.wire import EventParser, ResponseParser

DETAIL_BYTES = 2000


class Sender(Protocol):
    """Sends one request at a time for each call; calls may overlap."""

    async def stream(self, path: str, body: bytes, watch: Watch) -> None:
        """POST `body` and report the stream to `watch` until it ends or the watch leaves. Raises SendFailure."""

    async def fetch(self, path: str) -> tuple[int, bytes]:
        """GET a small document: its status and body. Raises SendFailure."""

    async def close(self) -> None:
        """Close every connection."""


class _Connection(asyncio.Protocol):
    """One connection; `answer` is the future of the request on it."""

    def __init__(self) -> None:
        self.transport: asyncio.Transport | None = None
        self.answer: asyncio.Future[None] | None = None
        self.watch: Watch | None = None
        self.body = bytearray()
        self._parser = ResponseParser(self._piece)
        self._events = EventParser()
        self._now_s = 0.0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport  # type: ignore[assignment]

    def begin(self, head_and_body: bytes, watch: Watch | None) -> asyncio.Future[None]:
        """Write a request; the future ends with its answer, a SendFailure, or when the watch leaves."""
        if self.transport is None or self.transport.is_closing():
            raise SendFailure("disconnected", "the server closed an idle connection")
        self.answer = asyncio.get_running_loop().create_future()
        self.watch, self.body = watch, bytearray()
        self._parser, self._events = ResponseParser(self._piece), EventParser()
        if watch is not None:
            watch.sent_s = time.perf_counter()
        self.transport.write(head_and_body)
        return self.answer

    @property
    def status(self) -> int:
        """The status of the last answer."""
        return self._parser.status

    @property
    def reusable(self) -> bool:
        """Whether another request may go over this connection."""
        alive = self.transport is not None and not self.transport.is_closing()
        return alive and self._parser.complete and self._parser.keep_alive

    def data_received(self, data: bytes) -> None:
        if self.answer is None or self.answer.done():
            return
        self._now_s = time.perf_counter()
        try:
            self._parser.feed(data)
        except SendFailure as failure:
            self._end(failure)
            return
        if self._parser.complete:
            self._end(None)

    def connection_lost(self, exc: Exception | None) -> None:
        self._parser.close()
        self._end(None if self._parser.complete else SendFailure("disconnected", "the server closed the connection"))

    def _piece(self, piece: bytes) -> None:
        if self.watch is None or self._parser.status != 200:
            self.body += piece
            return
        for data in self._events.feed(piece):
            if not self.watch.event(data, self._now_s):
                self._end(None)
                return

    def _end(self, failure: SendFailure | None) -> None:
        if self.answer is None or self.answer.done():
            return
        if failure is None:
            self.answer.set_result(None)
        else:
            self.answer.set_exception(failure)


class RawSender:
    """A sender on asyncio's protocols. `url` is the server's, with or without `/v1`."""

    def __init__(self, url: str, api_key: str = "") -> None:
        parts = urlsplit(url)
        self._secure = parts.scheme == "https"
        self._host, self._port = parts.hostname or "", parts.port or (443 if self._secure else 80)
        self._prefix = parts.path.rstrip("/").removesuffix("/v1")
        key = f"authorization: Bearer {api_key}\r\n" if api_key else ""
        self._head = f"host: {parts.netloc}\r\naccept: */*\r\nuser-agent: deepseek-benchmark\r\n{key}"
        self._idle: list[_Connection] = []
        self._busy: set[_Connection] = set()

    async def stream(self, path: str, body: bytes, watch: Watch) -> None:
        """POST `body`; see Sender."""
        head = f"POST {self._prefix}{path} HTTP/1.1\r\n{self._head}content-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
        status, answer = await self._exchange(head.encode() + body, watch)
        if status != 200:
            raise SendFailure(f"status_{status}", answer[:DETAIL_BYTES].decode("utf-8", "replace"))

    async def fetch(self, path: str) -> tuple[int, bytes]:
        """GET a document; see Sender."""
        return await self._exchange(f"GET {self._prefix}{path} HTTP/1.1\r\n{self._head}\r\n".encode(), None)

    async def close(self) -> None:
        """Close every connection."""
        for connection in (*self._idle, *self._busy):
            if connection.transport is not None:
                connection.transport.abort()
        self._idle.clear()

    async def _exchange(self, request: bytes, watch: Watch | None) -> tuple[int, bytes]:
        connection = await self._acquire()
        self._busy.add(connection)
        try:
            await connection.begin(request, watch)
            return connection.status, bytes(connection.body)
        finally:
            self._busy.discard(connection)
            if connection.reusable:
                self._idle.append(connection)
            elif connection.transport is not None:
                connection.transport.abort()

    async def _acquire(self) -> _Connection:
        while self._idle:
            connection = self._idle.pop()
            if connection.reusable:
                return connection
        try:
            _, connection = await asyncio.get_running_loop().create_connection(
                _Connection, self._host, self._port, ssl=True if self._secure else None
            )
        except OSError as error:
            raise SendFailure("connect", error.strerror or str(error)) from None
        return connection
