"""The images of a worker's sequences through torch: the decoder's own encoder, and a step's ImageContext out of what is kept.

It does not know text, blocks or how images are fused in. Invariant: rows that see no image are in no context.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from service.engine.batch import Batch, PlanError
from service.engine.kept_images import Encoded, KeptImages
from service.models.decoder import Decoder
from service.models.fusion import ImageContext, SeenImages
from service.types.plan import ImageWork
from service.types.request import ImageInput
from service.types.vision import Grid


class ImageStore(KeptImages[Tensor]):
    """The images of one worker of torch. `on_layer` is called as the encoder gets on."""

    def __init__(self, decoder: Decoder, most_tokens: int, on_layer: Callable[[], None]) -> None:
        super().__init__(decoder.spec, most_tokens)
        self._decoder = decoder
        self._device = decoder.norm.weight.device
        self._on_layer = on_layer
        self._gates: list[tuple[Tensor, Tensor]] = []

    def context(self, batch: Batch) -> ImageContext | None:
        """What the slices of a batch show and see of images; None when none of them sees any."""
        if not self._rows:
            return None
        weight = self._decoder.norm.weight
        at, embeddings = [np.zeros(0, np.int64)], [weight.new_empty(0, len(weight))]
        rows, seen = [], []
        bounds = zip(batch.rows.tolist(), batch.starts.tolist(), batch.lengths.tolist(), batch.query_starts.tolist(), strict=False)
        for row, start, length, first_row in bounds:
            looks = self.looks(row, start, start + length)
            if looks is None:
                continue
            for shown in looks.shown:
                at.append(np.arange(shown.end - shown.first) + shown.at + first_row)
                embeddings.append(shown.encoded.embeddings[shown.first : shown.end])
            seeing = np.flatnonzero(looks.counts)
            counts = looks.counts[seeing]
            partial = None if counts[0] == len(looks.keys) else torch.from_numpy(counts).to(self._device)
            rows.append(seeing + first_row)
            seen.append(SeenImages(len(seeing), looks.keys, looks.values, partial))
        if not seen:
            return None
        flat, places = (torch.from_numpy(np.concatenate(parts)).to(self._device) for parts in (rows, at))
        return ImageContext(places, torch.cat(embeddings), flat, seen, self._gates)

    def take_work(self) -> ImageWork | None:
        """What was done since the last call, gates included; None for nothing."""
        gates, self._gates = self._gates, []
        if gates:
            text, image = (torch.cat(part).float().sum(0).tolist() for part in zip(*gates, strict=True))
            seeing = sum(len(part) for part, _ in gates)
            self._work = self._work._replace(seeing=seeing, text_gates=tuple(text), image_gates=tuple(image))
        return super().take_work()

    def warm_up(self) -> None:
        """Encode a small image, so that no request pays for the first use of the libraries."""
        if self._decoder.vision is not None and self._decoder.fusion is not None:
            side = self._decoder.vision.spec.unit
            self._encode(ImageInput(0, 1, 1, "", bytes(side * side * 3)))

    def _encode(self, image: ImageInput) -> Encoded[Tensor]:
        vision, fusion = self._decoder.vision, self._decoder.fusion
        if vision is None or fusion is None:
            raise PlanError("this model reads no images")
        unit = vision.spec.unit
        pixels = torch.frombuffer(bytearray(image.pixels), dtype=torch.uint8).to(self._device)
        tokens = vision(pixels.view(1, image.rows * unit, image.columns * unit, 3), Grid(image.rows, image.columns))[0]
        self._on_layer()
        return Encoded(tokens, *fusion.keys_values(tokens))

    def _join(self, parts: Sequence[Tensor]) -> Tensor:
        return torch.cat(list(parts))
