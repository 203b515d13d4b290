"""A server that answers every completion with ready-made events and does nothing else: what a load generator can reach at most.

`python loadtests/null_server.py --port 8100 --tokens 10` speaks enough HTTP/1.1 for `/v1/models`, completions and chat; each token is a
write of its own. It knows no model. Invariant: the answer to a request is the same bytes every time.
"""

from __future__ import annotations

import argparse
import asyncio
import json


def _part(data: bytes) -> bytes:
    return f"{len(data):x}\r\n".encode() + data + b"\r\n"


def _event(value: object) -> bytes:
    return _part(b"data: " + json.dumps(value).encode() + b"\n\n")


HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
MODELS = json.dumps({"object": "list", "data": [{"id": "null", "object": "model"}]}).encode()


class NullProtocol(asyncio.Protocol):
    """One connection. `tokens` events a request, then the end; `first_s` before the first and `gap_s` between them, else at once."""

    def __init__(self, tokens: int, gap_s: float = 0.0, first_s: float = 0.0) -> None:
        self._gap_s, self._first_s = gap_s, first_s
        self._rest = b""
        usage = {"prompt_tokens": 8, "completion_tokens": tokens, "total_tokens": 8 + tokens}
        self._text = _event({"choices": [{"index": 0, "text": " word", "finish_reason": None}]})
        self._chat = _event({"choices": [{"index": 0, "delta": {"content": " word"}, "finish_reason": None}]})
        self._tail = _event({"choices": [], "usage": usage}) + _part(b"data: [DONE]\n\n") + b"0\r\n\r\n"
        self._tokens = tokens
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Remember the transport."""
        self._transport = transport  # type: ignore[assignment]

    def data_received(self, data: bytes) -> None:
        """Answer every complete request."""
        data = self._rest + data
        while (end := data.find(b"\r\n\r\n")) >= 0:
            head = data[:end].lower()
            at = head.find(b"content-length:")
            length = int(head[at + 15 :].partition(b"\r\n")[0]) if at >= 0 else 0
            if len(data) < end + 4 + length:
                break
            data = data[end + 4 + length :]
            self._answer(head)
        self._rest = data

    def _answer(self, head: bytes) -> None:
        write = self._transport.write  # type: ignore[union-attr]
        if head.startswith(b"get"):
            write(b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%b" % (len(MODELS), MODELS))
            return
        event = self._chat if b"/chat/" in head[:60] else self._text
        write(HEAD)
        if self._gap_s or self._first_s:
            loop = asyncio.get_running_loop()
            loop.call_later(self._first_s, self._later, event, self._tokens, loop.time() + self._first_s)
            return
        for _ in range(self._tokens):
            write(event)
        write(self._tail)

    def _later(self, event: bytes, left: int, due_s: float) -> None:
        if self._transport is None or self._transport.is_closing():
            return
        if left == 0:
            self._transport.write(self._tail)
            return
        self._transport.write(event)
        asyncio.get_running_loop().call_at(due_s + self._gap_s, self._later, event, left - 1, due_s + self._gap_s)


async def _serve(given: argparse.Namespace) -> None:
    def connection() -> NullProtocol:
        return NullProtocol(given.tokens, given.gap_ms / 1000, given.first_ms / 1000)

    server = await asyncio.get_running_loop().create_server(connection, "127.0.0.1", given.port, backlog=2048)
    print(f"ready on {server.sockets[0].getsockname()[1]}", flush=True)
    await server.serve_forever()


def main() -> None:
    """Serve until stopped."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, default=8100)
    parser.add_argument("--tokens", type=int, default=10)
    parser.add_argument("--gap_ms", type=float, default=0.0)
    parser.add_argument("--first_ms", type=float, default=0.0)
    arguments = parser.parse_args()
    try:
        import uvloop

        run = uvloop.run
    except ImportError:
        run = asyncio.run
    run(_serve(arguments))


if __name__ == "__main__":
    main()
