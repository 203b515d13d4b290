"""The patch encoder and the projector: pixels of images of one grid to image tokens of the decoder's width.

Every image is encoded on its own; its patches all see each other. It does not know sequences, places in a prompt or caches. Invariant:
what an image becomes depends on its pixels and grid alone, never on the images beside it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from service.models.layers import Computed, Embedding, Linear, RmsNorm, SwigluMlp
from service.types.model_spec import DenseMlp
from service.types.vision import CHANNELS, Grid, VisionSpec


class PatchAttention(Computed):
    """Attention of the patches of one image on all of them; `qkv` holds queries, keys, values, [3 · dim, dim]."""

    def __init__(self, spec: VisionSpec, device: torch.device | str, dtype: torch.dtype) -> None:
        super().__init__()
        self.spec = spec
        self.qkv = Linear(spec.dim, 3 * spec.dim, False, device, dtype)
        self.out = Linear(spec.dim, spec.dim, False, device, dtype)

    def forward(self, x: Tensor, images: int) -> Tensor:
        """[images · patches, dim] -> the same."""
        heads = self.qkv(x).view(images, -1, 3, self.spec.heads, self.spec.dim // self.spec.heads)
        query, key, value = heads.permute(2, 0, 3, 1, 4)
        seen = F.scaled_dot_product_attention(query, key, value)
        update: Tensor = self.out(seen.transpose(1, 2).reshape(x.shape))
        return update


class PatchLayer(nn.Module):
    """One pre-norm encoder layer."""

    def __init__(self, spec: VisionSpec, eps: float, device: torch.device | str, dtype: torch.dtype) -> None:
        super().__init__()
        self.attention_norm = RmsNorm(spec.dim, eps, device, dtype)
        self.attention = PatchAttention(spec, device, dtype)
        self.mlp_norm = RmsNorm(spec.dim, eps, device, dtype)
        self.mlp = SwigluMlp(DenseMlp(spec.mlp_hidden), spec.dim, device, dtype)

    def forward(self, x: Tensor, images: int) -> Tensor:
        """[images · patches, dim] -> the same."""
        x = x + self.attention(self.attention_norm(x), images)
        y: Tensor = x + self.mlp(self.mlp_norm(x))
        return y


class Projector(nn.Module):
    """merge · merge neighbouring patches to one token of the decoder's width: linear, GELU, linear (as in LLaVA 1.5, Liu et al. 2023)."""

    def __init__(self, spec: VisionSpec, dim: int, device: torch.device | str, dtype: torch.dtype) -> None:
        super().__init__()
        self.inner = Linear(spec.merge**2 * spec.dim, dim, True, device, dtype)
        self.out = Linear(dim, dim, True, device, dtype)

    def forward(self, x: Tensor) -> Tensor:
        """[tokens, merge² · dim of the encoder] -> [tokens, dim of the decoder]."""
        y: Tensor = self.out(F.gelu(self.inner(x)))
        return y


class PatchEncoder(nn.Module):
    """Pixels to image tokens for a decoder of width `dim`."""

    def __init__(self, spec: VisionSpec, dim: int, eps: float, device: torch.device | str, dtype: torch.dtype) -> None:
        super().__init__()
        self.spec = spec
        side = spec.side_tokens * spec.merge
        self.patch = Linear(spec.patch_values, spec.dim, True, device, dtype)
        self.row_embed = Embedding(side, spec.dim, device, dtype)
        self.column_embed = Embedding(side, spec.dim, device, dtype)
        self.layers = nn.ModuleList(PatchLayer(spec, eps, device, dtype) for _ in range(spec.layers))
        self.norm = RmsNorm(spec.dim, eps, device, dtype)
        self.projector = Projector(spec, dim, device, dtype)

    def forward(self, pixels: Tensor, grid: Grid) -> Tensor:
        """Image tokens [images, grid.tokens, dim], row by row; `pixels` [images, height, width, 3] uint8 of that grid's size."""
        images, spec = pixels.shape[0], self.spec
        rows, columns = grid.rows * spec.merge, grid.columns * spec.merge
        places = self._places(rows, columns, pixels.device)
        x = self.patch(self._patches(pixels, rows, columns, places.dtype)) + places.repeat(images, 1)
        for layer in self.layers:
            x = layer(x, images)
        x = self.norm(x).view(images, grid.rows, spec.merge, grid.columns, spec.merge, spec.dim)
        merged = x.transpose(2, 3).reshape(images * grid.tokens, spec.merge**2 * spec.dim)
        tokens: Tensor = self.projector(merged)
        return tokens.view(images, grid.tokens, -1)

    def _patches(self, pixels: Tensor, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
        """[images · patches, values of a patch] between −1 and 1, patches row by row."""
        side = self.spec.patch
        cut = pixels.view(len(pixels), rows, side, columns, side, CHANNELS).transpose(2, 3)
        return (cut.reshape(-1, self.spec.patch_values).to(torch.float32) / 127.5 - 1.0).to(dtype)

    def _places(self, rows: int, columns: int, device: torch.device) -> Tensor:
        """What row and column add to each patch, [patches, dim]."""
        down: Tensor = self.row_embed(torch.arange(rows, device=device))
        along: Tensor = self.column_embed(torch.arange(columns, device=device))
        return (down[:, None] + along[None, :]).reshape(rows * columns, self.spec.dim)
