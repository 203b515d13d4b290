"""The images of a worker's sequences: their pixels while a row needs them, what they were encoded to as long as there is room. No torch.

It does not know text, blocks, encoders or how images are fused in. Invariants: what an image became depends on its pixels alone and is
found by its digest; images of open rows are never evicted, the others least recently used first, so that `most_tokens` hold (the parent
opens no more).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Generic, NamedTuple, TypeVar

import numpy as np

from service.engine.batch import Ints, PlanError
from service.types.model_spec import ModelSpec
from service.types.plan import BatchPlan, ImageWork, OpenSequence
from service.types.request import ImageInput

Array = TypeVar("Array")
_NOTHING = ImageWork(0, 0, 0, 0.0)


class Encoded(NamedTuple, Generic[Array]):
    """One image: `embeddings` [N, dim], `keys` and `values` [N, kv_heads, head_dim]."""

    embeddings: Array
    keys: Array
    values: Array


class Shown(NamedTuple, Generic[Array]):
    """Image tokens `first` … `end` − 1 of one image stand from place `at` on."""

    at: int
    encoded: Encoded[Array]
    first: int
    end: int


class Looks(NamedTuple, Generic[Array]):
    """What consecutive positions of one row show and see: `counts` [positions] int64 of the first image tokens, which have these `keys` and
    `values`, are seen by each."""

    shown: list[Shown[Array]]
    counts: Ints
    keys: Array
    values: Array


@dataclass(slots=True)
class _Row(Generic[Array]):
    """The images of one open row in order of position; `joined` are the keys and values of all of them, once all were needed."""

    images: tuple[ImageInput, ...]
    joined: tuple[Array, Array] | None = None


class KeptImages(Generic[Array]):
    """The images of one worker. For a model that reads none it does nothing. Who encodes them is a subclass."""

    def __init__(self, spec: ModelSpec, most_tokens: int) -> None:
        self._spec = spec
        self._most_tokens = most_tokens
        self._rows: dict[int, _Row[Array]] = {}
        self._encoded: OrderedDict[str, Encoded[Array]] = OrderedDict()
        self._tokens: dict[str, int] = {}
        self._work = _NOTHING

    @property
    def kept_tokens(self) -> int:
        """Image tokens that are kept encoded."""
        return sum(self._tokens.values())

    def apply(self, plan: BatchPlan) -> None:
        """Forget the images of rows that close, and take in those of rows that open. Raises PlanError."""
        for row in plan.close:
            self._rows.pop(row, None)
        brought: dict[str, bytes] = {}
        for sequence in plan.open:
            if sequence.images:
                self._open(sequence, brought)

    def looks(self, row: int, start: int, end: int) -> Looks[Array] | None:
        """What positions start … end − 1 of a row show and see; None when they see no image."""
        held = self._rows.get(row)
        visible = [] if held is None else [image for image in held.images if image.start < end]
        if held is None or not visible:
            return None
        shown = []
        for image in visible:
            low, high = max(start, image.start), min(end, image.end)
            if low < high:
                shown.append(Shown(low - start, self._find(image), low - image.start, high - image.start))
        keys, values = self._joined(held, visible)
        positions = np.arange(start, end)
        counts: Ints = np.sum([np.clip(positions - image.start + 1, 0, image.tokens) for image in visible], axis=0)
        if self._spec.fusion is not None:
            flops = self._spec.fusion.flops(int(np.count_nonzero(counts)), int(counts.sum()), self._spec.dim)
            self._work = self._work._replace(flops=self._work.flops + flops)
        return Looks(shown, counts, keys, values)

    def take_work(self) -> ImageWork | None:
        """What was done since the last call; None for nothing."""
        work, self._work = self._work, _NOTHING
        return work if any(work) else None

    def _encode(self, image: ImageInput) -> Encoded[Array]:
        """Compute what an image becomes."""
        raise NotImplementedError

    def _join(self, parts: Sequence[Array]) -> Array:
        """Arrays one after the other."""
        raise NotImplementedError

    def _open(self, sequence: OpenSequence, brought: dict[str, bytes]) -> None:
        vision = self._spec.vision
        if vision is None:
            raise PlanError(f"row {sequence.row}: this model reads no images")
        end, images = 0, []
        for image in sequence.images:
            pixels = image.pixels or brought.get(image.digest, b"")
            if image.start < end or image.tokens < 1 or image.end > sequence.prompt_tokens:
                raise PlanError(f"row {sequence.row}: an image has no place in the prompt")
            if len(pixels) != image.tokens * vision.unit**2 * 3 or max(image.rows, image.columns) > vision.side_tokens:
                raise PlanError(f"row {sequence.row}: an image has not the pixels of its grid")
            brought[image.digest], end = pixels, image.end
            images.append(replace(image, pixels=pixels))
            self._work = self._work._replace(found=self._work.found + (image.digest in self._encoded))
        self._rows[sequence.row] = _Row(tuple(images))

    def _joined(self, held: _Row[Array], visible: Sequence[ImageInput]) -> tuple[Array, Array]:
        if held.joined is not None:
            return held.joined
        found = [self._find(image) for image in visible]
        pair = (found[0].keys, found[0].values)
        if len(found) > 1:
            pair = (self._join([image.keys for image in found]), self._join([image.values for image in found]))
        if len(visible) == len(held.images):
            held.joined = pair
        return pair

    def _find(self, image: ImageInput) -> Encoded[Array]:
        known = self._encoded.get(image.digest)
        if known is not None:
            self._encoded.move_to_end(image.digest)
            return known
        self._make_room(image.tokens)
        encoded = self._encoded[image.digest] = self._encode(image)
        self._tokens[image.digest] = image.tokens
        work = self._work
        flops = work.flops + self._spec.image_flops(image.tokens)
        self._work = work._replace(encoded=work.encoded + 1, encoded_tokens=work.encoded_tokens + image.tokens, flops=flops)
        return encoded

    def _make_room(self, tokens: int) -> None:
        held = {image.digest for row in self._rows.values() for image in row.images}
        free = self._most_tokens - self.kept_tokens - tokens
        for digest in [digest for digest in self._encoded if digest not in held]:
            if free >= 0:
                return
            del self._encoded[digest]
            free += self._tokens.pop(digest)
