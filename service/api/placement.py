"""Images take their places in a prompt: one mark in the rendered messages becomes the tokens of one image.

It does not know templates or limits. Invariant: there are as many marks as images, or the prompt is refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from service.inputs.image_preparer import PreparedImage
from service.types.errors import InvalidRequest
from service.types.request import ImageInput


@dataclass(frozen=True, slots=True)
class ChatPrompt:
    """Token ids, and the images that stand among them."""

    ids: list[int]
    images: tuple[ImageInput, ...] = ()


def place_images(ids: Sequence[int], image_id: int | None, pictures: Sequence[PreparedImage]) -> ChatPrompt:
    """Give each picture its tokens where `image_id` marks its place. Raises InvalidRequest unless the places are as many."""
    if sum(token == image_id for token in ids) != len(pictures):
        raise InvalidRequest("The model's chat template does not place the images of these messages.", param="messages")
    left = iter(pictures)
    spread: list[int] = []
    images: list[ImageInput] = []
    for token in ids:
        if token != image_id:
            spread.append(token)
            continue
        picture = next(left)
        images.append(ImageInput(len(spread), picture.rows, picture.columns, picture.digest, picture.pixels))
        spread += [token] * images[-1].tokens
    return ChatPrompt(spread, tuple(images))
