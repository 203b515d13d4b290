"""Whether exported graphs compute what the torch decoder computes: two prompts side by side in two steps, with images where it reads some.

It does not know how the graph was written. Invariant: in float32 the logits agree to rounding. Quantised activations round to whole steps,
and where a value lies between two steps the last bit decides; over many layers this grows until two sound implementations differ as much
as either does from exact arithmetic (4e-2 of the largest logit after 20 layers of random weights, docs/log.md). So each layer is compared
on the graph's own input to it, where nothing can grow, and the whole only with what quantising itself changes.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from service.checkpoints.onnx_graph import Floats, OnnxEncoder, OnnxGraph, Rectangle, Sight, seen_by
from service.models.attention import DenseAttend
from service.models.decoder import Decoder
from service.models.fusion import ImageContext, SeenImages
from service.types.errors import CheckpointError
from service.types.model_spec import ModelSpec
from service.types.vision import CHANNELS, Grid

# Largest difference of a value, relative to the largest one: of logits, and where weights are quantised of what a layer adds.
TOLERANCES = {"none": 1e-4, "int8": 2e-2, "int4": 2e-2}
# The quantised graph may differ from the quantised decoder by so many times what quantising changes, both as root mean squares: roundings
# that fall differently everywhere give at most the square root of two.
OWN_ERROR = 2.0
_CHECKED_TOKENS = 80


class Picture(NamedTuple):
    """An image of a probe: it stands in sequence `number` from position `start` on. `encoded` are its tokens, keys and values."""

    number: int
    start: int
    grid: Grid
    pixels: bytes
    encoded: tuple[Floats, Floats, Floats]


class Probe:
    """The prompts that are compared: `tokens` int64 [2, count]. Of two images one is cut by the steps, and the other seen by the second."""

    def __init__(self, spec: ModelSpec) -> None:
        self.spec = spec
        self.count = min(_CHECKED_TOKENS, spec.context_tokens)
        draw = np.random.default_rng(1)
        self.tokens = draw.integers(0, spec.vocab_size, (2, self.count))
        self.pictures: list[Picture] = []
        if spec.vision is not None:
            nothing = (np.zeros((0, spec.dim), np.float32),) * 3
            for number, rows, start in ((0, 2, self.count // 2 - 1), (1, 1, self.count // 2 + 3)):
                pixels = draw.integers(0, 256, rows * 2 * spec.vision.unit**2 * CHANNELS, np.uint8).tobytes()
                self.pictures.append(Picture(number, start, Grid(rows, 2), pixels, nothing))

    def decoded(self, decoder: Decoder) -> Floats:
        """The decoder's logits [2, count, vocab] over the whole."""
        with torch.inference_mode():
            logits = decoder(torch.from_numpy(self.tokens.reshape(-1)), self.positions(), self.attend(), images=self.context())
        return self._apart(logits.float().numpy())

    def context(self) -> ImageContext | None:
        """What all positions show and see; None for a model that reads no images."""
        if not self.pictures:
            return None
        at, rows, seen = [], [], []
        for picture in self.pictures:
            first, end = (picture.number * self.count + place for place in (picture.start, self.count))
            tokens, keys, values = (torch.from_numpy(part) for part in picture.encoded)
            at.append(torch.arange(first, first + len(tokens)))
            rows.append(torch.arange(first, end))
            seen.append(SeenImages(end - first, keys, values, torch.arange(1, end - first + 1).clamp(max=len(tokens))))
        embeddings = torch.cat([torch.from_numpy(picture.encoded[0]) for picture in self.pictures])
        return ImageContext(torch.cat(at), embeddings, torch.cat(rows), seen)

    def sights(self, start: int, end: int) -> list[Sight | None]:
        """What positions start … end of each sequence show and see."""
        found: list[Sight | None] = [None, None]
        positions = np.arange(start, end)
        for picture in self.pictures:
            tokens, keys, values = picture.encoded
            counts = np.clip(positions - picture.start + 1, 0, len(tokens))
            low, high = (min(max(place, start), end) for place in (picture.start, picture.start + len(tokens)))
            if counts.any():
                shown = tokens[low - picture.start : high - picture.start]
                found[picture.number] = Sight(np.arange(low, high) - start, shown, counts, keys, values)
        return found

    def graphed(self, directory: Path, name: str) -> tuple[Floats, list[Floats]]:
        """The logits of the graph `name` in `directory`, and the values [2, count, dim] that it watches."""
        layout = self.spec.kv_layout()
        blocks = -(-self.count // layout.block_tokens)
        graph = OnnxGraph(directory, layout, [2 * blocks] * len(layout.groups), name=name)
        table = np.arange(1, 2 * blocks + 1).reshape(2, blocks)
        logits, watched = [], []
        for start, end in ((0, self.count // 2), (self.count // 2, self.count)):
            every = np.arange(2 * (end - start))
            fusion = self.spec.fusion
            seen = None if fusion is None else seen_by(self.sights(start, end), fusion.heads // fusion.kv_heads)
            batch = Rectangle(self.tokens[:, start:end], np.full(2, start), (table,) * len(layout.groups), every, seen)
            logits.append(graph.logits(batch).reshape(2, end - start, -1))
            watched.append(graph.watched)
        return np.concatenate(logits, axis=1), [np.concatenate(parts, axis=1) for parts in zip(*watched, strict=True)]

    def attend(self) -> DenseAttend:
        """Attention over both sequences without a cache."""
        return DenseAttend(2, self.count, self.spec.layers)

    def positions(self) -> Tensor:
        """[2 · count] int64."""
        return torch.arange(self.count).repeat(2)

    def _apart(self, flat: NDArray[np.float32]) -> Floats:
        return flat.reshape(2, self.count, -1)


def check_images(decoder: Decoder, probe: Probe, directory: Path) -> None:
    """Have the graph encode the probe's images, and raise CheckpointError unless the decoder's agrees. Vision is never quantised."""
    if decoder.vision is None or decoder.fusion is None:
        return
    encoder = OnnxEncoder(directory, decoder.vision.spec)
    for index, picture in enumerate(probe.pictures):
        found = encoder.encode(picture.pixels, picture.grid)
        side = decoder.vision.spec.unit
        pixels = torch.frombuffer(bytearray(picture.pixels), dtype=torch.uint8)
        with torch.inference_mode():
            shaped = pixels.view(1, picture.grid.rows * side, picture.grid.columns * side, CHANNELS)
            tokens = decoder.vision(shaped, picture.grid)[0]
            expected = (tokens, *decoder.fusion.keys_values(tokens))
        difference = max(_difference(mine, theirs.numpy()) for mine, theirs in zip(found, expected, strict=True))
        if not difference <= TOLERANCES["none"]:
            raise CheckpointError(
                f"The exported encoder of images differs from the model's by {difference:.1e} of its largest value: serve it through torch."
            )
        probe.pictures[index] = picture._replace(encoded=found)


def check_logits(expected: Floats, found: Floats) -> None:
    """Raise CheckpointError unless logits in float32 agree."""
    difference = _difference(found, expected)
    if not difference <= TOLERANCES["none"]:
        raise CheckpointError(
            f"The exported graph differs from the model by {difference:.1e} of its largest logit: serve it through torch."
        )


def check_layers(decoder: Decoder, probe: Probe, logits: Floats, streams: list[Floats], tolerance: float) -> None:
    """Compare each part of a quantised graph with the decoder's on the graph's own input to it.

    `streams` are the residual stream [2, count, dim] after the embedding, the fusion and each layer. Raises CheckpointError.
    """
    for part, found, expected in _parts(decoder, probe, streams, logits):
        difference = _difference(found, expected)
        if not difference <= tolerance:
            raise CheckpointError(
                f"The exported graph differs from the model by {difference:.1e} of the largest value in its {part}: serve it through torch."
            )


def check_quantised(plain: Floats, quantised: Floats, found: Floats) -> None:
    """Compare logits of the graph with those of the decoder, quantised and `plain`. Raises CheckpointError."""
    own, theirs = _root_mean_square(found - quantised), _root_mean_square(quantised - plain)
    if not own <= OWN_ERROR * theirs:
        raise CheckpointError(
            f"The exported graph differs from the quantised model by {own / max(theirs, 1e-9):.1f} times what quantising changes: "
            "serve it through torch."
        )


@torch.inference_mode()
def _parts(decoder: Decoder, probe: Probe, streams: list[Floats], logits: Floats) -> Iterator[tuple[str, Floats, Floats]]:
    """(name, what the graph made, what the decoder makes) of embedding, fusion, each layer and head."""
    shape, context = streams[0].shape, probe.context()
    rotation = decoder.rope.rows(probe.positions())
    embedded = decoder.embed(torch.from_numpy(probe.tokens.reshape(-1)))
    if context is not None:
        embedded = embedded.index_copy(0, context.at, context.embeddings)
    yield "embedding", streams[0], embedded.numpy().reshape(shape)
    made = pairwise(streams)
    for index, layer in enumerate(decoder.layers):
        if context is not None and decoder.fusion is not None and index == decoder.fusion.spec.after_layers:
            earlier, later = next(made)
            stream = torch.from_numpy(earlier.reshape(-1, shape[-1]))
            fused = torch.zeros_like(stream).index_add(0, context.rows, decoder.fusion(torch.zeros_like(stream), stream, context))
            yield "fusion", later - earlier, fused.numpy().reshape(shape)
        earlier, later = next(made)
        before = torch.from_numpy(earlier.reshape(-1, shape[-1]))
        update, residual = layer(torch.zeros_like(before), before, rotation, probe.attend())
        added: Floats = (update + residual - before).numpy().reshape(shape)
        yield f"layer {index}", later - earlier, added
    last = torch.from_numpy(streams[-1].reshape(-1, shape[-1]))
    normed, _ = decoder.norm.add(torch.zeros_like(last), last)
    yield "head", logits, decoder.logits(normed).numpy().reshape(logits.shape)


def _difference(found: Floats, expected: Floats) -> float:
    return float(np.abs(found - expected).max() / max(np.abs(expected).max(), 1e-9))


def _root_mean_square(values: Floats) -> float:
    return float(np.sqrt(np.square(values, dtype=np.float64).mean()))
