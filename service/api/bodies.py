"""Read a request's body within its bounds and parse it as strict JSON.

It does not know what the fields mean. Invariants: a body over the limit is refused before it is read when it says its length, and as soon
as it passes the limit when it does not; what comes out is a JSON object without NaN, infinities, lone surrogates, deep nesting or
a key given twice (two readers of one body would take different values).
"""

from __future__ import annotations

import asyncio
import re
from typing import Any

import msgspec

from service.api.exchange import Receive, Scope
from service.types.errors import InvalidRequest, PayloadTooLarge, RequestCancelled, RequestTimeout, UnsupportedMediaType
from service.types.settings import HttpLimits

MOST_CONTAINERS = 1 << 17

_CONTAINERS = frozenset({dict, list})


async def read_json(scope: Scope, receive: Receive, limits: HttpLimits) -> dict[str, Any]:
    """The body of a request as a JSON object. Raises the 400, 408, 413 and 415 failures, and RequestCancelled when the client left."""
    headers = dict(scope["headers"])
    _check_media(headers)
    declared = headers.get(b"content-length")
    if declared is not None and int(declared) > limits.body_bytes:
        raise _too_large(limits)
    return parse_object(await _read(receive, limits), limits)


def parse_object(body: bytes, limits: HttpLimits) -> dict[str, Any]:
    """Parse a JSON object strictly. Raises InvalidRequest."""
    if _openers(body) > MOST_CONTAINERS and _openers(_without_texts(body)) > MOST_CONTAINERS:
        raise InvalidRequest(f"The JSON body has more than {MOST_CONTAINERS} objects and lists.")
    try:
        value = msgspec.json.decode(body)
    except RecursionError:
        raise _too_deep(limits) from None
    except (msgspec.DecodeError, UnicodeDecodeError):
        raise InvalidRequest("The body is not valid JSON (UTF-8, one object, no NaN, no infinities, no lone surrogates).") from None
    if not isinstance(value, dict):
        raise InvalidRequest("The JSON body must be an object.")
    depth, keys = _measure(value)
    if depth > limits.json_depth:
        raise _too_deep(limits)
    if body.count(b":") != keys and _without_texts(body).count(b":") != keys:
        raise InvalidRequest("The JSON body has an object with the same key twice.")
    return value


def _without_texts(body: bytes) -> bytes:
    return b"".join(body.replace(b"\\\\", b"").replace(b'\\"', b"").split(b'"')[::2])


def _openers(body: bytes) -> int:
    return body.count(b"[") + body.count(b"{")


def _measure(value: dict[str, Any]) -> tuple[int, int]:
    """Levels of nesting, and keys that are left: as many as the body has colons outside of texts, unless one was given twice."""
    depth, keys, level = 0, 0, [value]
    while level:
        depth += 1
        inner: list[Any] = []
        for container in level:
            items: Any = container
            if isinstance(container, dict):
                keys += len(container)
                items = container.values()
            if not _CONTAINERS.isdisjoint(map(type, items)):
                inner += [item for item in items if type(item) in _CONTAINERS]
        level = inner
    return depth, keys


async def _read(receive: Receive, limits: HttpLimits) -> bytes:
    pieces: list[bytes] = []
    size, more = 0, True
    while more:
        try:
            async with asyncio.timeout(limits.body_idle_s):
                message = await receive()
        except TimeoutError:
            raise RequestTimeout(f"No part of the body arrived for {limits.body_idle_s:g} seconds.") from None
        if message["type"] == "http.disconnect":
            raise RequestCancelled("The client left before its request was complete.")
        pieces.append(message["body"])
        size += len(message["body"])
        if size > limits.body_bytes:
            raise _too_large(limits)
        more = message["more_body"]
    return b"".join(pieces)


def _check_media(headers: dict[bytes, bytes]) -> None:
    encoding = headers.get(b"content-encoding", b"identity").strip().lower()
    if encoding not in (b"", b"identity"):
        raise UnsupportedMediaType("Compressed request bodies are not accepted; send plain JSON.")
    media, _, parameters = headers.get(b"content-type", b"").partition(b";")
    if media.strip().lower() != b"application/json":
        raise UnsupportedMediaType("The content type must be application/json.")
    charset = re.search(rb"charset\s*=\s*\"?([^\s\";]+)", parameters, re.IGNORECASE)
    if charset is not None and charset[1].lower() not in (b"utf-8", b"utf8"):
        raise UnsupportedMediaType("The body must be UTF-8.")


def _too_deep(limits: HttpLimits) -> InvalidRequest:
    return InvalidRequest(f"The JSON body nests deeper than {limits.json_depth} levels.")


def _too_large(limits: HttpLimits) -> PayloadTooLarge:
    return PayloadTooLarge(f"The body is over the limit of {limits.body_bytes} bytes.")
