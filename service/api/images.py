"""Image parts of messages to prepared pixels: where the bytes come from, the limits on a request's images, and who can read them.

It does not know how images are decoded or where they stand in a prompt. Invariant: number and size are checked before anything is decoded,
and what one image used of the pixels is not left for the next.
"""

from __future__ import annotations

import asyncio
import binascii
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from service.api.fetch import Fetcher
from service.api.schemas import ChatMessage, ImagePart
from service.inputs.image_preparer import ImagePreparer, PreparedImage
from service.types.errors import InvalidRequest
from service.types.settings import HttpLimits, HttpSettings
from service.types.vision import VisionSpec

if TYPE_CHECKING:
    from service.schedulers.router import ServedVersion

LOW_DETAIL = 4  # a quarter of the tokens
THREAD_CHARACTERS = 1 << 18


class ImageReader:
    """Reads the images of requests for every version; it owns the processes that decode and the rule of what may be fetched."""

    def __init__(self, settings: HttpSettings) -> None:
        limits = settings.limits
        self._limits: HttpLimits = limits
        self._fetcher = Fetcher(settings.image_hosts, limits.fetch_s, limits.image_bytes)
        self._preparer = ImagePreparer(limits.image_s, limits.image_memory_bytes, limits.image_processes, limits.prepared_bytes)

    async def warm(self) -> None:
        """Have a decoding process ready."""
        await self._preparer.warm()

    async def close(self) -> None:
        """End the decoding processes."""
        await self._preparer.close()

    async def read(self, served: ServedVersion, others: Sequence[ServedVersion], messages: Sequence[ChatMessage]) -> list[PreparedImage]:
        """The images of messages in order. `others` are the versions served here. Raises InvalidRequest."""
        places = list(_places(messages))
        if not places:
            return []
        vision = served.manifest.spec.vision
        if vision is None:
            raise InvalidRequest(_blind(served, others), param=places[0].param)
        if len(places) > self._limits.images:
            raise InvalidRequest(f"A request may hold at most {self._limits.images} images.", param=places[self._limits.images].param)
        left, prepared = self._limits.image_pixels, []
        for place in places:
            image = await self._preparer.prepare(await self._bytes(place), vision, _most_tokens(place, vision), left, place.param)
            left -= image.source_pixels
            prepared.append(image)
        return prepared

    async def _bytes(self, place: _Place) -> bytes:
        url = place.part.image_url.url
        if url[:5].lower() != "data:":
            return await self._fetcher.fetch(url, place.param)
        head, comma, text = url.partition(",")
        if not comma or not head.lower().endswith(";base64"):
            raise InvalidRequest(f"`{place.param}`: a data URL must hold base64 (data:image/png;base64,…).", param=place.param)
        most = self._limits.image_bytes
        if len(text) // 4 * 3 - text[-2:].count("=") > most:
            raise InvalidRequest(f"`{place.param}`: an image may have at most {most} bytes.", param=place.param)
        try:
            if len(text) > THREAD_CHARACTERS:
                return await asyncio.to_thread(binascii.a2b_base64, text, strict_mode=True)
            return binascii.a2b_base64(text, strict_mode=True)
        except (binascii.Error, ValueError):
            raise InvalidRequest(f"`{place.param}`: the data URL is not valid base64.", param=place.param) from None


def holds_images(messages: Sequence[ChatMessage]) -> bool:
    """Whether any message has an image part."""
    return next(_places(messages), None) is not None


@dataclass(frozen=True, slots=True)
class _Place:
    """An image part and the name of its field."""

    part: ImagePart
    param: str


def _places(messages: Sequence[ChatMessage]) -> Iterator[_Place]:
    for at, message in enumerate(messages):
        for index, part in enumerate(message.content if isinstance(message.content, list) else ()):
            if isinstance(part, ImagePart):
                param = f"messages.{at}.content.{index}.image_url"
                if message.role != "user":
                    raise InvalidRequest(f"`{param}`: images may stand in messages of the user only.", param=param)
                yield _Place(part, param)


def _most_tokens(place: _Place, vision: VisionSpec) -> int:
    """Image tokens at most: all that the version gives an image, or a quarter of it for `detail: low`."""
    if place.part.image_url.detail == "low":
        return max(vision.most_tokens // LOW_DETAIL, min(vision.least_tokens, vision.most_tokens))
    return vision.most_tokens


def _blind(served: ServedVersion, others: Sequence[ServedVersion]) -> str:
    able = [other.name for other in others if "image" in other.manifest.modalities]
    advice = f"{' and '.join(able[:3])} can" if able else "no version served here can"
    return f"The model {served.name} does not read images; {advice}."
