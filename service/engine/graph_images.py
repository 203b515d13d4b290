"""The images of a worker's sequences through an exported encoder: what a rectangle shows and sees, as the graph takes it. No torch.

It does not know plans or blocks. Invariant: `encodings` grows with each image that was computed, so that a long step is seen to get on.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from service.checkpoints.onnx_graph import Floats, OnnxEncoder, Seen, Sight, seen_by
from service.engine.batch import PlanError
from service.engine.kept_images import Encoded, KeptImages
from service.engine.rectangles import Part
from service.types.model_spec import ModelSpec
from service.types.request import ImageInput
from service.types.vision import Grid


class GraphImages(KeptImages[Floats]):
    """The images of one worker of exported graphs; without an `encoder` there are none."""

    def __init__(self, spec: ModelSpec, encoder: OnnxEncoder | None = None, most_tokens: int = 0) -> None:
        super().__init__(spec, most_tokens)
        self._encoder = encoder
        self.encodings = 0

    def seen(self, rows: Sequence[int], parts: Sequence[Part]) -> Seen | None:
        """What these parts, each of one of `rows`, show and see; None when none of them sees any image."""
        fusion = self._spec.fusion
        if fusion is None or not self._rows:
            return None
        sights = [self._sight(row, part) for row, part in zip(rows, parts, strict=True)]
        return seen_by(sights, fusion.heads // fusion.kv_heads)

    def count_gates(self, seen: Seen, gates: Floats) -> None:
        """Add the sums that a call of the graph gave: the gates of the text, head by head, then those of the images."""
        work = self._work
        before = np.array([*work.text_gates, *work.image_gates] or np.zeros(len(gates)), np.float64)
        text, image = np.split(before + gates, 2)
        seeing = work.seeing + int(seen.sees.sum())
        self._work = work._replace(seeing=seeing, text_gates=tuple(text.tolist()), image_gates=tuple(image.tolist()))

    def warm_up(self) -> None:
        """Encode a small image, so that no request pays for the runtime's first allocations."""
        if self._encoder is not None:
            self._encode(ImageInput(0, 1, 1, "", bytes(self._encoder.spec.unit**2 * 3)))

    def _sight(self, row: int, part: Part) -> Sight | None:
        looks = self.looks(row, part.start, part.end)
        if looks is None:
            return None
        at, shown = [np.zeros(0, np.int64)], [np.zeros((0, self._spec.dim), np.float32)]
        for image in looks.shown:
            at.append(np.arange(image.end - image.first) + image.at)
            shown.append(image.encoded.embeddings[image.first : image.end])
        return Sight(np.concatenate(at), np.concatenate(shown), looks.counts, looks.keys, looks.values)

    def _encode(self, image: ImageInput) -> Encoded[Floats]:
        if self._encoder is None:
            raise PlanError("this model reads no images")
        encoded = Encoded(*self._encoder.encode(image.pixels, Grid(image.rows, image.columns)))
        self.encodings += 1
        return encoded

    def _join(self, parts: Sequence[Floats]) -> Floats:
        return np.concatenate(parts)
