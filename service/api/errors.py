"""The one function that turns a failure into bytes: the OpenAI error shape, its headers, and a whole HTTP/1.1 response of it.

It does not know routes or who failed. Invariant: a message is at most MESSAGE_CHARACTERS long and never carries what an unexpected
exception says; strangers see `InternalError` instead.
"""

from __future__ import annotations

import http
import math
import secrets

import msgspec

from service.types.errors import InternalError, ServiceError, Unauthorized, WorkerKilled

ECHO_CHARACTERS = 200
MESSAGE_CHARACTERS = 1000

Headers = list[tuple[bytes, bytes]]


def clip(text: str, limit: int = ECHO_CHARACTERS) -> str:
    """`text` for quoting in a message: at most `limit` characters, printable, safe to encode."""
    short = text if len(text) <= limit else text[: limit - 1] + "…"
    return "".join(character if character.isprintable() else "\ufffd" for character in short)


def new_request_id() -> str:
    """A fresh id for one HTTP request."""
    return f"req-{secrets.token_hex(12)}"


def public(error: BaseException) -> ServiceError:
    """The failure as a stranger may see it."""
    return error if isinstance(error, ServiceError) else InternalError("The server failed on this request; the fault is on our side.")


def error_body(error: ServiceError) -> bytes:
    """The JSON of a failure, in the one shape."""
    message = clip(error.message, MESSAGE_CHARACTERS)
    param = None if error.param is None else clip(error.param)
    return msgspec.json.encode({"error": {"message": message, "type": error.kind, "param": param, "code": error.code}})


def error_headers(error: ServiceError) -> Headers:
    """The headers that belong to a failure, content type and length aside."""
    headers: Headers = []
    if error.retry_after_s is not None or error.status in (429, 503):
        seconds = max(1, math.ceil(error.retry_after_s or 1.0))
        headers.append((b"retry-after", str(seconds).encode()))
    if isinstance(error, WorkerKilled):
        headers.append((b"x-should-retry", b"false"))
    if isinstance(error, Unauthorized):
        headers.append((b"www-authenticate", b"Bearer"))
    return headers


def error_event(error: ServiceError) -> bytes:
    """A failure inside a stream that has begun: one server-sent event."""
    return b"data: " + error_body(error) + b"\n\n"


def error_response(error: ServiceError) -> bytes:
    """A whole HTTP/1.1 response that closes the connection, for failures before there is a request to answer."""
    body = error_body(error)
    status = f"HTTP/1.1 {error.status} {http.HTTPStatus(error.status).phrase}".encode()
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(body)).encode()),
        (b"connection", b"close"),
        (b"x-request-id", new_request_id().encode()),
        *error_headers(error),
    ]
    lines = [status, *(name + b": " + value for name, value in headers), b"", body]
    return b"\r\n".join(lines)
