"""The bounded HTTP/1.1 connection: uvicorn's httptools protocol with limits that hold before anything is buffered or parsed.

It does not know routes or bodies' meaning. A head is collected here up to its limit and handed to the parser whole, one request at a
time: the next head waits, unparsed, until the response before it is complete, so a pipeline costs one buffer and never a task.
Invariants: no more than `header_bytes` are kept of a head or between two pieces of a chunked body; a head is complete `header_read_s`
after its first byte or the client gets 408; a connection with unread input is drained for a moment before it closes, so the answer arrives.
"""

from __future__ import annotations

import asyncio
import re
import urllib.parse
from typing import Any

import httptools
from uvicorn.config import Config
from uvicorn.protocols.http.flow_control import HIGH_WATER_LIMIT
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.server import ServerState

from service.api.errors import error_response
from service.api.exchange import WRITE_EXTENSION, Exchange
from service.types.errors import HeadersTooLarge, InvalidRequest, RequestTimeout, ServiceError
from service.types.settings import HttpLimits

LINGER_S = 2.0
HEAD_END = b"\r\n\r\n"
VERSIONS = ("1.0", "1.1")
# Offers to speak another protocol are not taken. The parser would drop the body of a request that makes one, as Java's client does.
UPGRADE_FIELD = re.compile(rb"\r\nupgrade:[^\r\n]*", re.IGNORECASE)
# Two of these would mean different things to different programs on the way.
SINGLE_FIELDS = frozenset({b"host", b"authorization", b"origin", b"content-type", b"content-encoding"})


class BoundedProtocol(HttpToolsProtocol):
    """One connection. See the invariants above."""

    def __init__(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
        *,
        limits: HttpLimits,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self.limits = limits
        self.exchange: Exchange | None = None
        self._incoming = bytearray()
        self._scanned = 0
        self._in_body = False
        self._left: int | None = None
        self._idle_bytes = 0
        self._lingering = False
        self._keeps_alive = False
        self._timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Start the clock of the first head."""
        super().connection_made(transport)
        self._arm(self.limits.header_read_s, self._head_expired)

    def connection_lost(self, exc: Exception | None) -> None:
        """Tell the running exchange."""
        self._disarm()
        if self.exchange is not None and not self.exchange.response_complete:
            self.exchange.disconnect()
        self._unset_keepalive_if_required()
        super().connection_lost(exc)

    def shutdown(self) -> None:
        """The server stops: idle connections close now, busy ones after their response."""
        if self._busy() and self.exchange is not None:
            self.exchange.keep_alive = False
        else:
            self._close()

    def default_headers(self) -> list[tuple[bytes, bytes]]:
        """Headers of every response."""
        return self.server_state.default_headers

    def data_received(self, data: bytes) -> None:
        """Bytes of a head, of a body, or of a request that must wait."""
        self._unset_keepalive_if_required()
        if self._lingering or self.transport.is_closing():
            return
        if self._in_body:
            data = self._feed_body(data)
        if not data or self._in_body:
            return
        self._incoming += data
        if not self._busy():
            self._take_head()
        elif len(self._incoming) > HIGH_WATER_LIMIT:
            self.flow.pause_reading()

    def _busy(self) -> bool:
        return self.exchange is not None and not self.exchange.response_complete

    def _take_head(self) -> None:
        incoming = self._incoming
        if self._timer is None:
            self._arm(self.limits.header_read_s, self._head_expired)
        while incoming.startswith(b"\r\n"):
            del incoming[:2]
        end = incoming.find(HEAD_END, max(0, self._scanned - len(HEAD_END) + 1))
        self._scanned = len(incoming)
        size = (end if end >= 0 else len(incoming)) + (len(HEAD_END) if end >= 0 else 0)
        if size > self.limits.header_bytes:
            self._refuse(HeadersTooLarge(f"The request's head is over the limit of {self.limits.header_bytes} bytes."))
        elif end >= 0 and incoming.count(b"\r\n", 0, end) > self.limits.header_fields:
            self._refuse(HeadersTooLarge(f"The request has more than {self.limits.header_fields} header fields."))
        elif end >= 0:
            head, rest = bytes(incoming[:size]), bytes(incoming[size:])
            incoming.clear()
            self._scanned = 0
            self._disarm()
            self._begin(head, rest)

    def _begin(self, head: bytes, rest: bytes) -> None:
        """Parse one whole head, start its exchange, pass on what came with it."""
        self._in_body, self._left, self._idle_bytes = True, 0, 0
        self.exchange = None
        try:
            self.parser.feed_data(UPGRADE_FIELD.sub(b"", head))
        except (httptools.HttpParserError, httptools.HttpParserUpgrade):
            self._refuse(InvalidRequest("The request is not valid HTTP."))
            return
        scope = self._request_scope()
        if scope is None:
            self._refuse(InvalidRequest("The request's target is not a valid path."))
            return
        fields = dict(self.headers)
        if not self._plain_http(scope["http_version"], fields):
            self._refuse(InvalidRequest("The request must be HTTP/1.0 or 1.1 and have each of its header fields that matter once."))
            return
        exchange = self.exchange = Exchange(self, scope, self.limits.stream_write_s)
        scope["extensions"] = {WRITE_EXTENSION: exchange.write}
        chunked = b"transfer-encoding" in fields
        self._left = None if chunked else int(fields.get(b"content-length", b"0"))
        exchange.expects_continue = self.expect_100_continue
        exchange.keep_alive = scope["http_version"] == "1.1" and self._keeps_alive and not chunked
        if self._left == 0:
            self._in_body = False
            exchange.feed_end()
        task = self.loop.create_task(exchange.run(self.app))
        task.add_done_callback(self.tasks.discard)
        self.tasks.add(task)
        if rest:
            self.data_received(rest)

    def _request_scope(self) -> dict[str, Any] | None:
        scope: dict[str, Any] = self.scope  # type: ignore[assignment]
        try:
            url = httptools.parse_url(self.url)
            raw_path = url.path or b""
            scope["path"] = urllib.parse.unquote(raw_path.decode("ascii"))
        except (httptools.HttpParserError, UnicodeDecodeError):
            return None
        scope["method"] = self.parser.get_method().decode("ascii")
        scope["http_version"] = self.parser.get_http_version()
        scope["raw_path"] = raw_path
        scope["query_string"] = url.query or b""
        return scope

    def _plain_http(self, version: str, fields: dict[bytes, bytes]) -> bool:
        if version not in VERSIONS or (version == "1.1" and b"host" not in fields):
            return False
        if len(fields) == len(self.headers):
            return True
        names = [name for name, _ in self.headers if name in SINGLE_FIELDS]
        return len(names) == len(set(names))

    def _feed_body(self, data: bytes) -> bytes:
        """Parse body bytes; gives back what lies behind the body's end."""
        exchange = self.exchange
        if exchange is None or not exchange.more_body:
            return b""
        rest = b""
        if self._left is not None:
            data, rest = data[: self._left], data[self._left :]
            self._left -= len(data)
        self._idle_bytes += len(data)
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserError:
            if exchange.more_body:
                exchange.fail(InvalidRequest("The request's body is not framed as HTTP asks."))
            self._incoming.clear()
            return b""
        if self._idle_bytes > self.limits.header_bytes and exchange.more_body:
            exchange.fail(HeadersTooLarge("The body's chunk extensions or trailers are over the limit of header bytes."))
        return rest

    def on_headers_complete(self) -> None:
        """Keep what the parser forgets when the message is complete; everything else is done after it returned."""
        self._keeps_alive = self.parser.should_keep_alive()

    def on_header(self, name: bytes, value: bytes) -> None:
        """Fields of the head; trailers are dropped."""
        if self.exchange is None:
            super().on_header(name, value)

    def on_body(self, body: bytes) -> None:
        """Hand body bytes to the exchange."""
        self._idle_bytes = 0
        if self.exchange is not None and self.exchange.more_body:
            self.exchange.feed(body)

    def on_message_complete(self) -> None:
        """The body's end. Behind a chunked one nothing more is read, as the connection will close."""
        if self.exchange is not None:
            self._in_body = self._left is None
            self.exchange.feed_end()

    def exchange_complete(self, exchange: Exchange) -> None:
        """Close, or take up the next request."""
        self.server_state.total_requests += 1
        if self.transport.is_closing():
            return
        if not exchange.keep_alive:
            self._linger() if exchange.more_body or self._incoming else self._close()
            return
        self.flow.resume_reading()
        if self._incoming:
            self.loop.call_soon(self._take_next)
        else:
            self.timeout_keep_alive_task = self.loop.call_later(self.timeout_keep_alive, self._close)

    def _take_next(self) -> None:
        if not self.transport.is_closing() and not self._busy():
            self._take_head()

    def _refuse(self, error: ServiceError) -> None:
        self._disarm()
        self.transport.write(error_response(error))
        self._linger()

    def _head_expired(self) -> None:
        self._timer = None
        if self._incoming:
            self._refuse(RequestTimeout(f"The request's head was not complete within {self.limits.header_read_s:g} seconds."))
        else:
            self._close()

    def _linger(self) -> None:
        """Close our side, throw away what still arrives, and close for good a little later: an early close would destroy the answer."""
        self._lingering = True
        self._incoming.clear()
        self.flow.resume_reading()
        if self.transport.can_write_eof():
            self.transport.write_eof()
        self._arm(LINGER_S, self._close)

    def _close(self) -> None:
        """Close when what was written has left, at the latest `stream_write_s` from now."""
        if not self.transport.is_closing():
            self.transport.close()
        self._arm(self.limits.stream_write_s, self.transport.abort)

    def _arm(self, seconds: float, action: Any) -> None:
        self._disarm()
        self._timer = self.loop.call_later(seconds, action)

    def _disarm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
