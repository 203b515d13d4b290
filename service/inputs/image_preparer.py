"""Images of requests to pixels of a version's grid: a few children that may be killed decode them, and what was prepared is kept.

It does not know HTTP, where bytes came from or how images are decoded. Invariants: an image that takes too long or too much ends its child
and is refused, nothing else; the cache, found by the digest of the encoded bytes and the grid's rule, stays within its bound in bytes.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from dataclasses import dataclass, field
from hashlib import blake2b

from service.inputs.image_messages import Prepare, Prepared, Ready, Refused, Reply, Warm
from service.processes import ChildLost, ChildProcess, FrameTooLarge
from service.types.errors import InternalError, InvalidRequest
from service.types.vision import VisionSpec

CHILD = "service.inputs.image_child"
START_S = 30.0
_DIGEST_BYTES = 16
_Key = tuple[bytes, VisionSpec, int]


@dataclass(frozen=True, slots=True)
class PreparedImage:
    """Pixels of a grid; `digest` (hex) names them with their grid, `source_pixels` is the size of the image that was sent."""

    rows: int
    columns: int
    digest: str
    source_pixels: int
    pixels: bytes = field(repr=False)


class ImagePreparer:
    """`processes` warm children at most, one image at a time each. `seconds` and `memory_bytes` bound the decoding of one image."""

    def __init__(self, seconds: float, memory_bytes: int, processes: int, cache_bytes: int) -> None:
        self._seconds = seconds
        self._memory_bytes = memory_bytes
        self._cache_bytes = cache_bytes
        self._idle: list[ChildProcess] = []
        self._turns = asyncio.Semaphore(processes)
        self._cache: OrderedDict[_Key, PreparedImage] = OrderedDict()
        self._kept_bytes = 0

    @property
    def kept_bytes(self) -> int:
        """Bytes of pixels in the cache."""
        return self._kept_bytes

    async def warm(self) -> None:
        """Have a child ready, so that the first image does not wait for it."""
        async with self._turns:
            self._idle.append(await self._take_child())

    async def close(self) -> None:
        """End the children."""
        idle, self._idle = self._idle, []
        await asyncio.gather(*(child.stop() for child in idle))

    async def prepare(self, encoded: bytes, vision: VisionSpec, most_tokens: int, most_pixels: int, param: str) -> PreparedImage:
        """The pixels of one encoded image. Raises InvalidRequest, naming `param`, for what cannot or may not be decoded."""
        digest = await asyncio.to_thread(_digest, encoded)
        key = (digest, vision, most_tokens)
        known = self._cache.get(key)
        if known is not None:
            self._cache.move_to_end(key)
            if known.source_pixels > most_pixels:
                raise InvalidRequest(_too_large(param, known.source_pixels, most_pixels), param=param)
            return known
        reply = await self._ask(Prepare(encoded, vision, most_tokens, most_pixels), param)
        if not isinstance(reply, Prepared):
            raise InvalidRequest(self._refusal(reply, most_pixels, param), param=param)
        grid = f"{reply.rows}x{reply.columns}:".encode()
        prepared = PreparedImage(reply.rows, reply.columns, _digest(grid, reply.pixels).hex(), reply.source_pixels, reply.pixels)
        self._keep(key, prepared)
        return prepared

    async def _ask(self, request: Prepare, param: str) -> object:
        async with self._turns:
            child = await self._take_child()
            try:
                reply: object = await child.ask(request, self._seconds)
            except FrameTooLarge:
                self._idle.append(child)
                raise InvalidRequest(f"`{param}`: the image is too large to be decoded.", param=param) from None
            except ChildLost as loss:
                raise InvalidRequest(self._loss(loss.reason, param), param=param) from None
            self._idle.append(child)
            return reply

    async def _take_child(self) -> ChildProcess:
        while self._idle:
            child = self._idle.pop()
            if child.alive:
                return child
        child = await ChildProcess.spawn(CHILD, Reply)
        try:
            reply = await child.ask(Warm(self._memory_bytes), START_S)
        except ChildLost:
            reply = None
        if not isinstance(reply, Ready):
            raise InternalError("The process that decodes images did not start.")
        return child

    def _keep(self, key: _Key, prepared: PreparedImage) -> None:
        before = self._cache.pop(key, None)
        self._cache[key] = prepared
        self._kept_bytes += len(prepared.pixels) - (len(before.pixels) if before is not None else 0)
        while self._kept_bytes > self._cache_bytes:
            _, oldest = self._cache.popitem(last=False)
            self._kept_bytes -= len(oldest.pixels)

    def _loss(self, reason: str, param: str) -> str:
        if reason == "deadline":
            return f"`{param}`: decoding the image took longer than {self._seconds:g} seconds."
        return f"`{param}`: the image cannot be decoded."

    def _refusal(self, reply: object, most_pixels: int, param: str) -> str:
        kind = reply.kind if isinstance(reply, Refused) else "broken"
        if kind == "too_large" and isinstance(reply, Refused):
            return _too_large(param, reply.source_pixels, most_pixels)
        if kind == "memory":
            return f"`{param}`: decoding the image needs more than {self._memory_bytes >> 20} MiB."
        if kind == "format":
            return f"`{param}`: the image is not a PNG, JPEG, WEBP or GIF."
        return f"`{param}`: the image is damaged or cut off."


def _digest(*parts: bytes) -> bytes:
    hasher = blake2b(digest_size=_DIGEST_BYTES)
    for part in parts:
        hasher.update(part)
    return hasher.digest()


def _too_large(param: str, pixels: int, most: int) -> str:
    return f"`{param}`: the image has {pixels} pixels and {max(most, 0)} are left of what the images of a request may have in all."
