"""What a model sees with, as data: the patch encoder and projector, the gated fusion of image and text, and what an image costs.

Every image is cut into patches, encoded on its own, and `merge` × `merge` patches become one image token that stands in place among the
text tokens. It does not know pixels, tensors or files. Invariant: the grid of an image is a function of its size and the spec alone, so the
same image gives the same tokens in every request.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

CHANNELS = 3


@dataclass(frozen=True, slots=True)
class Grid:
    """The image tokens of one image: `rows` × `columns`, read row by row."""

    rows: int
    columns: int

    @property
    def tokens(self) -> int:
        """Image tokens in all."""
        return self.rows * self.columns


@dataclass(frozen=True, slots=True)
class VisionSpec:
    """A patch encoder (Dosovitskiy et al. 2020) with learned row and column positions, and a two-layer projector to the decoder's width.

    `patch` is a patch's side in pixels, `merge` the side in patches of what becomes one image token. An image gets about its own size in
    tokens, at least about `least_tokens` (small ones are enlarged), at most `most_tokens`, and at most `side_tokens` along a side.
    """

    patch: int
    merge: int
    dim: int
    layers: int
    heads: int
    mlp_hidden: int
    least_tokens: int
    most_tokens: int
    side_tokens: int

    @property
    def unit(self) -> int:
        """Side of one image token in pixels."""
        return self.patch * self.merge

    @property
    def patch_values(self) -> int:
        """Numbers in one patch."""
        return self.patch * self.patch * CHANNELS

    def grid(self, width: int, height: int, most_tokens: int | None = None) -> Grid:
        """The grid of an image of that size in pixels; the aspect ratio is kept as far as whole tokens allow."""
        most = self.most_tokens if most_tokens is None else min(most_tokens, self.most_tokens)
        area = (width / self.unit) * (height / self.unit)
        factor = math.sqrt(min(max(area, self.least_tokens), most) / area)
        rows = min(max(round(height / self.unit * factor), 1), self.side_tokens)
        columns = min(max(round(width / self.unit * factor), 1), self.side_tokens)
        while rows * columns > most:
            rows, columns = (rows - 1, columns) if rows >= columns else (rows, columns - 1)
        return Grid(rows, columns)

    def parameters(self, model_dim: int) -> int:
        """Stored parameters of encoder and projector."""
        positions = 2 * self.side_tokens * self.merge * self.dim
        vectors = self.dim + self.layers * 2 * self.dim + self.dim + 2 * model_dim
        return positions + vectors + self._patch_matrices() + self._projector_matrices(model_dim)

    def flops(self, tokens: int, model_dim: int) -> float:
        """FLOPs of encoding and projecting one image of `tokens` image tokens; its patches all see each other."""
        patches = tokens * self.merge**2
        attention = 4.0 * patches * patches * self.dim * self.layers
        return 2.0 * patches * self._patch_matrices() + 2.0 * tokens * self._projector_matrices(model_dim) + attention

    def _patch_matrices(self) -> int:
        return self.patch_values * self.dim + self.layers * (4 * self.dim**2 + 3 * self.dim * self.mlp_hidden)

    def _projector_matrices(self, model_dim: int) -> int:
        return self.merge**2 * self.dim * model_dim + model_dim**2


@dataclass(frozen=True, slots=True)
class FusionSpec:
    """Gated cross-modal fusion after the first `after_layers` layers of the decoder, at positions that have seen an image.

    Each head mixes what it reads from the text state and what it reads from the image tokens seen so far, weighed by two learned gates (a
    multi-head form of the gated multimodal unit, Arevalo et al. 2017). Text without images passes unchanged, bit for bit.
    """

    after_layers: int
    heads: int
    kv_heads: int
    head_dim: int

    @property
    def width(self) -> int:
        """Features of all heads."""
        return self.heads * self.head_dim

    @property
    def kv_width(self) -> int:
        """Features of the keys of one image token; its values have as many."""
        return self.kv_heads * self.head_dim

    def parameters(self, model_dim: int) -> int:
        """Stored parameters."""
        return self._matrices(model_dim) + 2 * model_dim * self.kv_width + 2 * model_dim + 2 * self.heads

    def image_flops(self, tokens: int, model_dim: int) -> float:
        """FLOPs of the keys and values of `tokens` image tokens, computed once for an image."""
        return 4.0 * tokens * model_dim * self.kv_width

    def flops(self, positions: int, seen: int, model_dim: int) -> float:
        """FLOPs of fusing `positions` that see `seen` image tokens in all."""
        return 2.0 * positions * self._matrices(model_dim) + 4.0 * seen * self.width

    def _matrices(self, model_dim: int) -> int:
        return 3 * model_dim * self.width + model_dim * 2 * self.heads
