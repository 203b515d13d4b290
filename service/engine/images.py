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
from service.engine.upload import upload
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
        rows, seen, partial = [], [], []
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
            rows.append(seeing + first_row)
            partial.append(None if counts[0] == len(looks.keys) else counts)
            seen.append(SeenImages(len(seeing), looks.keys, looks.values))
        if not seen:
            return None
        counted = [counts for counts in partial if counts is not None]
        flat, places, *there = upload((np.concatenate(rows), np.concatenate(at), *counted), self._device)
        sent = iter(there)
        seen = [part if counts is None else part._replace(counts=next(sent)) for part, counts in zip(seen, partial, strict=True)]
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
        """Encode a small image and have a row see it, with a count and without, so that no request pays for the first use of libraries and
        kernels.
        """
        vision, fusion = self._decoder.vision, self._decoder.fusion
        if vision is None or fusion is None:
            return
        encoded = self._encode(ImageInput(0, 1, 1, "", bytes(vision.spec.unit**2 * 3)))
        row, first = encoded.embeddings[:1], torch.zeros(1, dtype=torch.int64, device=self._device)
        for counts in (None, first + 1):
            fusion(row, row, ImageContext(first, row, first, [SeenImages(1, encoded.keys, encoded.values, counts)]))

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
