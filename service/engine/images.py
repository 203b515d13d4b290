"""The images of a worker's sequences: their pixels while a row needs them, what they were encoded to as long as there is room.

It does not know text, blocks or how images are fused in. Invariants: what an image became depends on its pixels alone and is found by its
digest; images of open rows are never evicted, the others least recently used first, so that `most_tokens` hold (the parent opens no more).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from service.engine.batch import Batch, Ints, PlanError
from service.models.decoder import Decoder
from service.models.fusion import GatedFusion, ImageContext, SeenImages
from service.models.vision import PatchEncoder
from service.types.plan import BatchPlan, ImageWork, OpenSequence
from service.types.request import ImageInput
from service.types.vision import Grid


@dataclass(frozen=True, slots=True)
class _Encoded:
    """One image: `embeddings` [N, dim], `keys` and `values` [N, kv_heads, head_dim]."""

    embeddings: Tensor
    keys: Tensor
    values: Tensor


@dataclass(slots=True)
class _Row:
    """The images of one open row in order of position; `joined` are the keys and values of all of them, once all were needed."""

    images: tuple[ImageInput, ...]
    joined: tuple[Tensor, Tensor] | None = None


class ImageStore:
    """The images of one worker. For a model that reads none it does nothing. `on_layer` is called as the encoder gets on."""

    def __init__(self, decoder: Decoder, most_tokens: int, on_layer: Callable[[], None]) -> None:
        self._decoder = decoder
        self._device = decoder.norm.weight.device
        self._most_tokens = most_tokens
        self._on_layer = on_layer
        self._rows: dict[int, _Row] = {}
        self._encoded: OrderedDict[str, _Encoded] = OrderedDict()
        self._work = ImageWork(0, 0, 0, 0.0)
        self._gates: list[tuple[Tensor, Tensor]] = []

    @property
    def kept_tokens(self) -> int:
        """Image tokens that are kept encoded."""
        return sum(len(image.embeddings) for image in self._encoded.values())

    def apply(self, plan: BatchPlan) -> None:
        """Forget the images of rows that close, and take in those of rows that open. Raises PlanError."""
        for row in plan.close:
            self._rows.pop(row, None)
        brought: dict[str, bytes] = {}
        for sequence in plan.open:
            if sequence.images:
                self._open(sequence, brought)

    def context(self, batch: Batch) -> ImageContext | None:
        """What the slices of a batch show and see of images; None when none of them sees any."""
        if not self._rows:
            return None
        gathered = _Gathered()
        for index, row in enumerate(batch.rows.tolist()):
            held = self._rows.get(row)
            if held is not None:
                positions = batch.positions[batch.query_starts[index] : batch.query_starts[index + 1]]
                self._gather(held, positions, int(batch.query_starts[index]), gathered)
        if not gathered.seen:
            return None
        rows = torch.from_numpy(np.concatenate(gathered.rows)).to(self._device)
        at = torch.from_numpy(np.concatenate([*gathered.at, np.zeros(0, np.int64)])).to(self._device)
        weight = self._decoder.norm.weight
        embeddings = torch.cat(gathered.embeddings) if gathered.embeddings else weight.new_empty(0, len(weight))
        return ImageContext(at, embeddings, rows, gathered.seen, self._gates)

    def take_work(self) -> ImageWork | None:
        """What was done since the last call; None for nothing."""
        work, self._work = self._work, ImageWork(0, 0, 0, 0.0)
        gates, self._gates = self._gates, []
        if gates:
            text, image = (torch.cat(part).float().sum(0).tolist() for part in zip(*gates, strict=True))
            seeing = sum(len(part) for part, _ in gates)
            work = work._replace(seeing=seeing, text_gates=tuple(text), image_gates=tuple(image))
        return work if any(work) else None

    def warm_up(self) -> None:
        """Encode a small image, so that no request pays for the first use of the libraries."""
        if self._decoder.vision is not None and self._decoder.fusion is not None:
            side = self._decoder.vision.spec.unit
            self._encode(self._decoder.vision, self._decoder.fusion, ImageInput(0, 1, 1, "", bytes(side * side * 3)))

    def _open(self, sequence: OpenSequence, brought: dict[str, bytes]) -> None:
        vision = self._decoder.vision
        if vision is None:
            raise PlanError(f"row {sequence.row}: this model reads no images")
        end, images = 0, []
        for image in sequence.images:
            pixels = image.pixels or brought.get(image.digest, b"")
            if image.start < end or image.tokens < 1 or image.end > sequence.prompt_tokens:
                raise PlanError(f"row {sequence.row}: an image has no place in the prompt")
            if len(pixels) != image.tokens * vision.spec.unit**2 * 3 or max(image.rows, image.columns) > vision.spec.side_tokens:
                raise PlanError(f"row {sequence.row}: an image has not the pixels of its grid")
            brought[image.digest], end = pixels, image.end
            images.append(replace(image, pixels=pixels))
            self._work = self._work._replace(found=self._work.found + (image.digest in self._encoded))
        self._rows[sequence.row] = _Row(tuple(images))

    def _gather(self, held: _Row, positions: Ints, first_row: int, gathered: _Gathered) -> None:
        """Add what the positions of one row's slice, the first of which is `first_row` of the batch, show and see."""
        start, end = int(positions[0]), int(positions[-1]) + 1
        visible = [image for image in held.images if image.start < end]
        if not visible:
            return
        for image in visible:
            low, high = max(start, image.start), min(end, image.end)
            if low < high:
                gathered.at.append(np.arange(low, high) - start + first_row)
                gathered.embeddings.append(self._find(image).embeddings[low - image.start : high - image.start])
        seeing = positions[max(visible[0].start - start, 0) :]
        keys, values = self._joined(held, visible)
        counts = np.sum([np.clip(seeing - image.start + 1, 0, image.tokens) for image in visible], axis=0)
        partial = None if counts[0] == len(keys) else torch.from_numpy(counts).to(self._device)
        gathered.rows.append(seeing - start + first_row)
        gathered.seen.append(SeenImages(len(seeing), keys, values, partial))
        if self._decoder.fusion is not None:
            flops = self._decoder.fusion.spec.flops(len(seeing), int(counts.sum()), self._decoder.spec.dim)
            self._work = self._work._replace(flops=self._work.flops + flops)

    def _joined(self, held: _Row, visible: Sequence[ImageInput]) -> tuple[Tensor, Tensor]:
        if held.joined is not None:
            return held.joined
        found = [self._find(image) for image in visible]
        one = found[0]
        pair = (one.keys, one.values)
        if len(found) > 1:
            pair = (torch.cat([image.keys for image in found]), torch.cat([image.values for image in found]))
        if len(visible) == len(held.images):
            held.joined = pair
        return pair

    def _find(self, image: ImageInput) -> _Encoded:
        known = self._encoded.get(image.digest)
        if known is not None:
            self._encoded.move_to_end(image.digest)
            return known
        vision, fusion = self._decoder.vision, self._decoder.fusion
        if vision is None or fusion is None:
            raise PlanError("this model reads no images")
        self._make_room(image.tokens)
        encoded = self._encoded[image.digest] = self._encode(vision, fusion, image)
        work = self._work
        flops = work.flops + self._decoder.spec.image_flops(image.tokens)
        self._work = work._replace(encoded=work.encoded + 1, encoded_tokens=work.encoded_tokens + image.tokens, flops=flops)
        return encoded

    def _encode(self, vision: PatchEncoder, fusion: GatedFusion, image: ImageInput) -> _Encoded:
        unit = vision.spec.unit
        pixels = torch.frombuffer(bytearray(image.pixels), dtype=torch.uint8).to(self._device)
        tokens = vision(pixels.view(1, image.rows * unit, image.columns * unit, 3), Grid(image.rows, image.columns))[0]
        self._on_layer()
        return _Encoded(tokens, *fusion.keys_values(tokens))

    def _make_room(self, tokens: int) -> None:
        held = {image.digest for row in self._rows.values() for image in row.images}
        free = self._most_tokens - self.kept_tokens - tokens
        for digest in [digest for digest in self._encoded if digest not in held]:
            if free >= 0:
                return
            free += len(self._encoded.pop(digest).embeddings)


class _Gathered:
    """The parts of an ImageContext that is being made."""

    def __init__(self) -> None:
        self.at: list[Ints] = []
        self.embeddings: list[Tensor] = []
        self.rows: list[Ints] = []
        self.seen: list[SeenImages] = []
