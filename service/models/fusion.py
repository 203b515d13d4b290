"""Gated cross-modal fusion: at positions that have seen an image, each head weighs what the text says against what the images show.

Image tokens arrive as arguments, with the rows of the flat batch that they concern; it does not know sequences, prompts or caches.
Invariants: rows that see no image leave as they came, bit for bit; what a row gets depends on its own sequence alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from service.models.layers import Computed, Linear, RmsNorm
from service.types.vision import FusionSpec


class SeenImages(NamedTuple):
    """What `rows` consecutive seeing rows, all of one sequence, see of its images.

    `keys` and `values` [image tokens, kv_heads, head_dim], in order of position. `counts` [rows] int64, each at least 1, says how many of
    them each row sees; None: each sees all.
    """

    rows: int
    keys: Tensor
    values: Tensor
    counts: Tensor | None = None


class ImageContext(NamedTuple):
    """The images of one step. `embeddings` [M, dim] replace those of the tokens in the rows `at` [M] int64 of the flat batch.

    `rows` [R] int64 are the rows that see an image, ascending, and `seen` what they see, sequence by sequence. `gates` collects the
    gates of the rows, (text, image), each [R, heads], when somebody wants to look.
    """

    at: Tensor
    embeddings: Tensor
    rows: Tensor
    seen: Sequence[SeenImages]
    gates: list[tuple[Tensor, Tensor]] | None = None


class GatedFusion(Computed):
    """The fusion sublayer: out(g_text · text(x) + g_image · attend(query(x), images)), the gates being sigmoid(gates(x)) a head.

    `key_value` holds the key heads, then the value heads; `gates` those of the text, then those of the images.
    """

    def __init__(self, spec: FusionSpec, dim: int, eps: float, device: torch.device | str, dtype: torch.dtype) -> None:
        super().__init__()
        self.spec = spec
        self.norm = RmsNorm(dim, eps, device, dtype)
        self.image_norm = RmsNorm(dim, eps, device, dtype)
        self.query = Linear(dim, spec.width, False, device, dtype)
        self.text = Linear(dim, spec.width, False, device, dtype)
        self.key_value = Linear(dim, 2 * spec.kv_width, False, device, dtype)
        self.gates = Linear(dim, 2 * spec.heads, True, device, dtype)
        self.out = Linear(spec.width, dim, False, device, dtype)

    def keys_values(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Image tokens [N, dim] -> keys and values, each [N, kv_heads, head_dim]; once for each image."""
        heads = self.key_value(self.image_norm(images)).view(len(images), 2, self.spec.kv_heads, self.spec.head_dim)
        keys, values = heads.unbind(1)
        return keys, values

    def forward(self, update: Tensor, residual: Tensor, context: ImageContext) -> Tensor:
        """What to add to the residual stream in the rows that see images, [R, dim]; the stream is `update` + `residual` [T, dim]."""
        spec, rows = self.spec, len(context.rows)
        x, _ = self.norm.add(update.index_select(0, context.rows), residual.index_select(0, context.rows))
        query = self.query(x).view(rows, spec.heads, spec.head_dim)
        parts = query.split([seen.rows for seen in context.seen])
        attend, scale = self.kernels.attend_images, spec.head_dim**-0.5
        found = zip(parts, context.seen, strict=True)
        shown = torch.cat([attend(part, seen.keys, seen.values, seen.counts, scale) for part, seen in found])
        text_gate, image_gate = self.gates(x).view(rows, 2, spec.heads).unbind(1)
        if context.gates is not None:
            context.gates.append((text_gate.sigmoid(), image_gate.sigmoid()))
        gated = self.kernels.head_gate
        mixed = gated(self.text(x).view(query.shape), text_gate) + gated(shown, image_gate)
        added: Tensor = self.out(mixed.reshape(rows, spec.width))
        return added
