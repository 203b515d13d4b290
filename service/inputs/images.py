"""Encoded images to upright RGB pixels of a grid's size. The only file that knows how images are decoded; what
strangers sent it decodes in the image child.

It does not know requests, tokens or processes. Invariants: nothing is decoded before its size, which the header tells, is within the
bound; whatever is wrong with an image becomes a Refused.
"""

from __future__ import annotations

import io
import struct
import zlib

from PIL import Image, ImageOps

from service.inputs.image_messages import Prepare, Prepared, Refused
from service.types.vision import Grid, VisionSpec

FORMATS = ("PNG", "JPEG", "WEBP", "GIF")
BACKGROUND = (255, 255, 255)
_DAMAGE = (OSError, SyntaxError, ValueError, EOFError, LookupError, TypeError, ArithmeticError, AttributeError, struct.error, zlib.error)

# The bound is ours and is checked on the header; the library's own is a warning at first.
Image.MAX_IMAGE_PIXELS = None


def prepare(request: Prepare) -> Prepared | Refused:
    """Decode the first frame, turn it as its EXIF orientation says, put transparency on white, and resize it to its grid."""
    try:
        image = Image.open(io.BytesIO(request.encoded), formats=FORMATS)
    except MemoryError:
        return Refused("memory")
    except _DAMAGE:
        return Refused("format")
    try:
        source_pixels = image.width * image.height
        if source_pixels > request.most_pixels:
            return Refused("too_large", source_pixels)
        _shrink_on_load(image, request.vision)
        upright = ImageOps.exif_transpose(image)
        grid = request.vision.grid(upright.width, upright.height, request.most_tokens)
        return Prepared(grid.rows, grid.columns, source_pixels, _resize(upright, grid, request.vision.unit).tobytes())
    except MemoryError:
        return Refused("memory")
    except _DAMAGE:
        return Refused("broken")


def resize_pixels(pixels: bytes, width: int, height: int, vision: VisionSpec) -> bytes:
    """RGB pixels of an image as `prepare` would give them for the same image losslessly encoded."""
    return _resize(Image.frombytes("RGB", (width, height), pixels), vision.grid(width, height), vision.unit).tobytes()


def _shrink_on_load(image: Image.Image, vision: VisionSpec) -> None:
    """A JPEG much larger than any grid is decoded at a half, a quarter or an eighth of its size."""
    most = 2 * vision.side_tokens * vision.unit
    if image.format == "JPEG" and max(image.size) > most:
        image.draft(None, (most, most))


def _resize(image: Image.Image, grid: Grid, unit: int) -> Image.Image:
    size = (grid.columns * unit, grid.rows * unit)
    if image.mode.startswith("I"):  # 16 bits of grey: the library clips where it should scale
        image = image.convert("I").point(lambda value: value / 256).convert("L")
    if "A" in image.getbands() or "transparency" in image.info:
        image = image.convert("RGBA")
        image.load()
        flat = Image.new("RGB", image.size, BACKGROUND)
        flat.paste(image, mask=image.getchannel("A"))
        image = flat
    return image.convert("RGB").resize(size, Image.Resampling.BICUBIC, reducing_gap=3.0)
