"""The children that decode images: what they give, how they are bounded, and what is kept."""

from __future__ import annotations

import asyncio
import io
from collections.abc import AsyncIterator

import pytest
from PIL import Image

from service.inputs import image_preparer
from service.inputs.image_preparer import ImagePreparer
from service.types.errors import InvalidRequest
from service.types.vision import VisionSpec

EYES = VisionSpec(patch=2, merge=2, dim=8, layers=1, heads=2, mlp_hidden=12, least_tokens=1, most_tokens=16, side_tokens=8)
MIB = 1 << 20


def png(width: int = 8, height: int = 8, colour: tuple[int, int, int] = (10, 20, 30)) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (width, height), colour).save(stream, "PNG")
    return stream.getvalue()


@pytest.fixture
async def preparer() -> AsyncIterator[ImagePreparer]:
    made = ImagePreparer(seconds=30.0, memory_bytes=512 * MIB, processes=2, cache_bytes=1000)
    yield made
    await made.close()


async def take(preparer: ImagePreparer, data: bytes, most_tokens: int = 16, most_pixels: int = MIB) -> image_preparer.PreparedImage:
    return await preparer.prepare(data, EYES, most_tokens, most_pixels, "here")


async def test_an_image_is_decoded_once_and_found_again(preparer: ImagePreparer, monkeypatch: pytest.MonkeyPatch) -> None:
    first = await take(preparer, png())
    assert (first.rows, first.columns, first.source_pixels, len(first.pixels)) == (2, 2, 64, 8 * 8 * 3)
    monkeypatch.setattr(image_preparer, "CHILD", "service.nowhere")
    for child in preparer._idle:
        child.kill("planted")
    assert await take(preparer, png()) is first
    with pytest.raises(InvalidRequest, match="64 pixels and 63 are left"):
        await take(preparer, png(), most_pixels=63)


async def test_digests_name_pixels_and_grid(preparer: ImagePreparer) -> None:
    square, wide, other = await take(preparer, png()), await take(preparer, png(16, 4)), await take(preparer, png(colour=(9, 9, 9)))
    assert len(square.pixels) == len(wide.pixels)
    assert len({square.digest, wide.digest, other.digest}) == 3
    assert (await take(preparer, png(), most_tokens=1)).digest != square.digest


async def test_the_cache_keeps_its_bound_and_the_latest(preparer: ImagePreparer) -> None:
    images = [png(colour=(at, 0, 0)) for at in range(8)]  # 192 bytes each when prepared
    for data in images:
        await take(preparer, data)
    assert preparer.kept_bytes == 5 * 192
    kept = [key[0] for key in preparer._cache]
    assert kept == [image_preparer._digest(data) for data in images[3:]]


async def test_what_is_no_image_is_refused_and_the_child_goes_on(preparer: ImagePreparer) -> None:
    await take(preparer, png())
    (child,) = preparer._idle
    for data, sentence in ((b"none", "not a PNG, JPEG, WEBP or GIF"), (png(64, 64)[:-60], "damaged or cut off")):
        with pytest.raises(InvalidRequest, match=rf"`here`: .*{sentence}") as refused:
            await take(preparer, data)
        assert refused.value.param == "here"
    assert preparer._idle == [child] and child.alive


async def test_memory_is_bounded_by_the_kernel() -> None:
    small = ImagePreparer(seconds=30.0, memory_bytes=24 * MIB, processes=1, cache_bytes=0)
    try:
        with pytest.raises(InvalidRequest, match=r"more than 24 MiB|cannot be decoded"):
            await take(small, png(6000, 4000), most_pixels=40 * MIB)
        assert (await take(small, png())).rows == 2
    finally:
        await small.close()


async def test_a_child_that_takes_too_long_is_ended_and_replaced() -> None:
    hasty = ImagePreparer(seconds=0.001, memory_bytes=512 * MIB, processes=1, cache_bytes=0)
    try:
        await hasty.warm()
        (child,) = hasty._idle
        with pytest.raises(InvalidRequest, match=r"longer than 0\.001 seconds"):
            await take(hasty, png(3000, 3000), most_pixels=40 * MIB)
        assert not child.alive and hasty._idle == []
    finally:
        await hasty.close()


async def test_no_more_children_than_allowed(preparer: ImagePreparer) -> None:
    await asyncio.gather(*(take(preparer, png(200, 200, (at, 0, 0))) for at in range(6)))
    assert 1 <= len(preparer._idle) <= 2
