"""Reading HTTP/1.1 responses and server-sent events from bytes as they arrive, for a client that must cost little.

Pure: bytes in, calls out; no sockets, no clock. It reads what servers send to a client of our kind (content-length, chunked or until
close), nothing more. Invariant: how the bytes are cut makes no difference to what comes out.
"""

from __future__ import annotations

from collections.abc import Callable

from service.loadgen.watch import SendFailure

HEAD_BYTES = 64 * 1024
EVENT_BYTES = 16 * 1024 * 1024


class ResponseParser:
    """One response. `on_body` gets pieces of the decoded body; `status`, `complete` and `keep_alive` say the rest."""

    __slots__ = ("_left", "_on_body", "_rest", "_step", "complete", "headers", "keep_alive", "status")

    def __init__(self, on_body: Callable[[bytes], None]) -> None:
        self._on_body = on_body
        self._rest = b""
        self._left = 0
        self._step: Callable[[bytes, int], int] = self._head
        self.status = 0
        self.headers: dict[bytes, bytes] = {}
        self.complete, self.keep_alive = False, True

    def feed(self, data: bytes) -> None:
        """Take bytes. Raises SendFailure when they are not HTTP."""
        if self._rest:
            data, self._rest = self._rest + data, b""
        position, size = 0, len(data)
        while position < size and not self.complete:
            after = self._step(data, position)
            if after < 0:
                self._rest = data[position:]
                return
            position = after
        if position < size:
            self.keep_alive = False

    def close(self) -> None:
        """The connection ended; a body that lasts until then is complete."""
        self.keep_alive = False
        if self._step == self._until_close:
            self.complete = True

    def _head(self, data: bytes, position: int) -> int:
        end = data.find(b"\r\n\r\n", position)
        if end < 0:
            if len(data) - position > HEAD_BYTES:
                raise SendFailure("protocol", "the response's head does not end")
            return -1
        lines = data[position:end].split(b"\r\n")
        parts = lines[0].split(b" ", 2)
        if len(parts) < 2 or not parts[0].startswith(b"HTTP/1.") or not parts[1].isdigit():
            raise SendFailure("protocol", "the answer is not HTTP/1.1")
        self.status = int(parts[1])
        self.headers = {name.lower(): value.strip() for name, _, value in (line.partition(b":") for line in lines[1:])}
        if 100 <= self.status < 200:
            return end + 4
        self.keep_alive = parts[0] == b"HTTP/1.1" and self.headers.get(b"connection", b"").lower() != b"close"
        self._choose_body()
        return end + 4

    def _choose_body(self) -> None:
        length = self.headers.get(b"content-length", b"")
        if b"chunked" in self.headers.get(b"transfer-encoding", b"").lower():
            self._step = self._size
        elif length.isdigit():
            self._left, self._step = int(length), self._plain
            self.complete = self._left == 0
        elif self.status in (204, 304):
            self.complete = True
        else:
            self._step = self._until_close

    def _plain(self, data: bytes, position: int) -> int:
        piece = data[position : position + self._left]
        self._left -= len(piece)
        self._on_body(piece)
        self.complete = self._left == 0
        return position + len(piece)

    def _until_close(self, data: bytes, position: int) -> int:
        self._on_body(data[position:])
        return len(data)

    def _size(self, data: bytes, position: int) -> int:
        end = data.find(b"\r\n", position)
        if end < 0:
            return -1
        try:
            self._left = int(data[position:end].partition(b";")[0], 16)
        except ValueError:
            raise SendFailure("protocol", "a chunk has no size") from None
        self._step = self._part if self._left else self._trailer
        return end + 2

    def _part(self, data: bytes, position: int) -> int:
        if self._left:
            piece = data[position : position + self._left]
            self._left -= len(piece)
            self._on_body(piece)
            return position + len(piece)
        if len(data) - position < 2:
            return -1
        self._step = self._size
        return position + 2

    def _trailer(self, data: bytes, position: int) -> int:
        end = data.find(b"\r\n", position)
        if end < 0:
            return -1
        self.complete = end == position
        return end + 2


class EventParser:
    """Server-sent events: `feed` gives the data of each event that is now complete; comments and other fields are skipped."""

    __slots__ = ("_rest",)

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, piece: bytes) -> list[bytes]:
        """The data of every event that ended in these bytes. Raises SendFailure for an event without end."""
        text = self._rest + piece if self._rest else piece
        if b"\r" in text:
            text, held = (text[:-1], b"\r") if text.endswith(b"\r") else (text, b"")
            text = text.replace(b"\r\n", b"\n")
        else:
            held = b""
        *events, rest = text.split(b"\n\n")
        self._rest = rest + held
        if len(self._rest) > EVENT_BYTES:
            raise SendFailure("protocol", "an event does not end")
        return [data for data in map(_data_of, events) if data]


def _data_of(event: bytes) -> bytes:
    if event.startswith(b"data: ") and b"\n" not in event:
        return event[6:]
    lines = [line[5:].removeprefix(b" ") for line in event.split(b"\n") if line.startswith(b"data:")]
    return b"\n".join(lines)
