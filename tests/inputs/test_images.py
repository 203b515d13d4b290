"""Decoding: formats, orientation, transparency, resizing, and what is refused."""

from __future__ import annotations

import io
import struct
import zlib
from typing import Any

import numpy as np
import pytest
from PIL import Image

from service.inputs.image_messages import Prepare, Prepared, Refused
from service.inputs.images import prepare
from service.types.vision import VisionSpec

EYES = VisionSpec(patch=2, merge=2, dim=8, layers=1, heads=2, mlp_hidden=12, least_tokens=1, most_tokens=16, side_tokens=8)


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def striped(width: int = 12, height: int = 8) -> Image.Image:
    """Red above, blue below, a green column at the left."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[: height // 2, :, 0] = 255
    pixels[height // 2 :, :, 2] = 255
    pixels[:, : width // 4] = (0, 255, 0)
    return Image.fromarray(pixels)


def asked(data: bytes, most_tokens: int = 16, most_pixels: int = 1 << 20) -> Prepared | Refused:
    return prepare(Prepare(data, EYES, most_tokens, most_pixels))


def pixels_of(reply: Prepared | Refused) -> np.ndarray:
    assert isinstance(reply, Prepared), reply
    return np.frombuffer(reply.pixels, np.uint8).reshape(reply.rows * EYES.unit, reply.columns * EYES.unit, 3)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF"])
def test_every_format_gives_the_same_picture(kind: str) -> None:
    options = {"lossless": True} if kind == "WEBP" else {"quality": 95, "subsampling": 0} if kind == "JPEG" else {}
    reply = asked(encoded(striped(), kind, **options))
    assert isinstance(reply, Prepared) and (reply.rows, reply.columns, reply.source_pixels) == (2, 3, 96)
    exact = np.asarray(striped()).astype(int)
    assert np.abs(pixels_of(reply).astype(int) - exact).max() < (60 if kind == "JPEG" else 1)


@pytest.mark.parametrize("kind", ["TIFF", "BMP", "PPM", "ICO"])
def test_other_formats_are_not_even_tried(kind: str) -> None:
    assert asked(encoded(striped(16, 16), kind)) == Refused("format")


def test_exif_orientation_turns_the_picture() -> None:
    turned = striped().transpose(Image.Transpose.ROTATE_90)
    exif = Image.Exif()
    exif[0x0112] = 6  # "rotate by 270 degrees to show"
    reply = asked(encoded(turned, exif=exif.tobytes()))
    assert isinstance(reply, Prepared) and (reply.rows, reply.columns) == (2, 3)
    assert np.array_equal(pixels_of(reply), np.asarray(striped()))


def test_transparency_lies_on_white() -> None:
    image = striped().convert("RGBA")
    image.putalpha(Image.new("L", image.size, 0))
    assert (pixels_of(asked(encoded(image))) == 255).all()
    palette = striped().convert("P")
    assert (pixels_of(asked(encoded(palette, transparency=palette.getpixel((11, 0)))))[0, 11] == 255).all()


@pytest.mark.parametrize("mode", ["1", "L", "P", "LA", "I;16", "CMYK"])
def test_every_mode_becomes_rgb(mode: str) -> None:
    if mode == "I;16":
        image = Image.fromarray(np.full((8, 8), 0x8000, np.uint16))
    else:
        image = Image.new("RGB", (8, 8), (128, 128, 128)).convert(mode)
    data = encoded(image, "JPEG" if mode == "CMYK" else "PNG")
    assert abs(pixels_of(asked(data)).mean() - 128) < (70 if mode == "1" else 3)


def test_the_first_frame_of_an_animation_counts() -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ((255, 0, 0), (0, 255, 0))]
    for kind in ("GIF", "WEBP"):
        picture = pixels_of(asked(encoded(frames[0], kind, save_all=True, append_images=frames[1:])))
        assert picture[..., 0].mean() > 240 and picture[..., 1].mean() < 20


def test_large_images_shrink_and_small_ones_grow_to_their_grid() -> None:
    large = asked(encoded(striped(1200, 800), "JPEG"))
    assert isinstance(large, Prepared) and (large.rows, large.columns, large.source_pixels) == (3, 5, 960_000)
    assert pixels_of(large)[1, 15, 0] > 200 and pixels_of(large)[10, 15, 2] > 200
    assert isinstance(few := asked(encoded(striped(1200, 800)), most_tokens=2), Prepared) and few.rows * few.columns <= 2
    assert isinstance(dot := asked(encoded(Image.new("RGB", (1, 1)))), Prepared) and (dot.rows, dot.columns) == (1, 1)


def test_the_size_is_bounded_before_anything_is_decoded() -> None:
    assert isinstance(asked(encoded(striped(), "PNG"), most_pixels=96), Prepared)
    assert asked(encoded(striped(), "PNG"), most_pixels=95) == Refused("too_large", 96)
    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I", 13) + b"IHDR" + header + struct.pack(">I", zlib.crc32(b"IHDR" + header))
    bomb = b"\x89PNG\r\n\x1a\n" + chunk + struct.pack(">I", 4) + b"IDAT" + bytes(8)
    assert asked(bomb) == Refused("too_large", 3_600_000_000)


def test_damage_is_refused_wherever_it_is() -> None:
    for kind in ("PNG", "JPEG", "WEBP", "GIF"):
        data = encoded(striped(64, 64), kind)
        assert asked(b"") == asked(b"not an image") == Refused("format")
        for end in (10, len(data) // 2, len(data) - 12):
            reply = asked(data[:end])
            assert isinstance(reply, Prepared) or reply.kind in ("broken", "format"), (kind, end)
    data = encoded(striped(64, 64))
    assert asked(data[: len(data) // 2]) == Refused("broken")


def test_random_damage_never_escapes() -> None:
    draw = np.random.default_rng(0)
    for kind in ("PNG", "JPEG", "WEBP", "GIF"):
        data = np.frombuffer(encoded(striped(40, 40), kind), np.uint8)
        for _ in range(60):
            damaged = data.copy()
            damaged[draw.integers(0, len(data), 6)] = draw.integers(0, 256, 6)
            assert isinstance(asked(damaged.tobytes(), most_pixels=1 << 16), Prepared | Refused)
