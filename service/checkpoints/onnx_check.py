"""Whether an exported graph computes what the torch decoder computes: a prompt in two steps, two sequences side by side.

It does not know how the graph was written. Invariant: in float32 the logits agree to rounding. Quantised activations round to whole steps,
and where a value lies between two steps the last bit decides; over many layers this grows until two sound implementations differ as much
as either does from exact arithmetic (4e-2 of the largest logit after 20 layers of random weights, docs/log.md). So each layer is compared
on the graph's own input to it, where nothing can grow, and the whole only with what quantising itself changes.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from service.checkpoints.onnx_graph import Floats, OnnxGraph, Rectangle
from service.models.attention import DenseAttend
from service.models.decoder import Decoder
from service.types.errors import CheckpointError
from service.types.model_spec import ModelSpec

# Largest difference of a value, relative to the largest one: of logits, and where weights are quantised of what a layer adds.
TOLERANCES = {"none": 1e-4, "int8": 2e-2}
# The quantised graph may differ from the quantised decoder by so many times what quantising changes, both as root mean squares: roundings
# that fall differently everywhere give at most the square root of two.
OWN_ERROR = 2.0
_CHECKED_TOKENS = 80


class Probe:
    """The prompts that are compared: `tokens` int64 [2, count]."""

    def __init__(self, spec: ModelSpec) -> None:
        self.spec = spec
        self.count = min(_CHECKED_TOKENS, spec.context_tokens)
        self.tokens = np.random.default_rng(1).integers(0, spec.vocab_size, (2, self.count))

    def decoded(self, decoder: Decoder) -> Floats:
        """The decoder's logits [2, count, vocab] over the whole."""
        with torch.inference_mode():
            logits = decoder(torch.from_numpy(self.tokens.reshape(-1)), self.positions(), self.attend())
        return self._apart(logits.float().numpy())

    def graphed(self, directory: Path, name: str) -> tuple[Floats, list[Floats]]:
        """The logits of the graph `name` in `directory`, and the values [2, count, dim] that it watches."""
        layout = self.spec.kv_layout()
        blocks = -(-self.count // layout.block_tokens)
        graph = OnnxGraph(directory, layout, [2 * blocks] * len(layout.groups), name=name)
        table = np.arange(1, 2 * blocks + 1).reshape(2, blocks)
        logits, watched = [], []
        for start, end in ((0, self.count // 2), (self.count // 2, self.count)):
            every = np.arange(2 * (end - start))
            batch = Rectangle(self.tokens[:, start:end], np.full(2, start), (table,) * len(layout.groups), every)
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


def check_logits(expected: Floats, found: Floats) -> None:
    """Raise CheckpointError unless logits in float32 agree."""
    difference = _difference(found, expected)
    if not difference <= TOLERANCES["none"]:
        raise CheckpointError(
            f"The exported graph differs from the model by {difference:.1e} of its largest logit: serve it through torch."
        )


def check_layers(decoder: Decoder, probe: Probe, logits: Floats, streams: list[Floats], tolerance: float) -> None:
    """Compare each part of a quantised graph with the decoder's on the graph's own input to it.

    `streams` are the residual stream [2, count, dim] after the embedding and after each layer. Raises CheckpointError.
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
    """(name, what the graph made, what the decoder makes) of embedding, each layer and head."""
    shape = streams[0].shape
    rotation = decoder.rope.rows(probe.positions())
    yield "embedding", streams[0], decoder.embed(torch.from_numpy(probe.tokens.reshape(-1))).numpy().reshape(shape)
    for index, layer in enumerate(decoder.layers):
        before = torch.from_numpy(streams[index].reshape(-1, shape[-1]))
        update, residual = layer(torch.zeros_like(before), before, rotation, probe.attend())
        added: Floats = (update + residual - before).numpy().reshape(shape)
        yield f"layer {index}", streams[index + 1] - streams[index], added
    last = torch.from_numpy(streams[-1].reshape(-1, shape[-1]))
    normed, _ = decoder.norm.add(torch.zeros_like(last), last)
    yield "head", logits, decoder.logits(normed).numpy().reshape(logits.shape)


def _difference(found: Floats, expected: Floats) -> float:
    return float(np.abs(found - expected).max() / max(np.abs(expected).max(), 1e-9))


def _root_mean_square(values: Floats) -> float:
    return float(np.sqrt(np.square(values, dtype=np.float64).mean()))
