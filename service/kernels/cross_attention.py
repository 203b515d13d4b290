"""Attention of text rows to the image tokens that their sequence has seen, in torch: for any device, and differentiable.

It does not know sequences, prompts or gates. Invariant: a row reads the first of the image tokens, as many as its count says.
"""

from __future__ import annotations

import torch
from torch import Tensor


def attend_images(query: Tensor, keys: Tensor, values: Tensor, counts: Tensor | None, scale: float) -> Tensor:
    """query [R, H, D], keys and values [N, Hkv, D] of image tokens -> [R, H, D] in the type of query, weights in float32.

    `counts` [R] int64, each at least 1, says how many image tokens each row sees; None: each sees all.
    """
    (rows, heads, size), (images, kv_heads, _) = query.shape, keys.shape
    grouped = query.view(rows, kv_heads, heads // kv_heads, size)
    scores = torch.einsum("rkgd,nkd->kgrn", grouped, keys).float() * scale
    if counts is not None:
        hidden = torch.arange(images, device=query.device) >= counts[:, None]
        scores = scores.masked_fill(hidden, float("-inf"))
    shown = torch.einsum("kgrn,nkd->rkgd", scores.softmax(-1).to(query.dtype), values)
    return shown.reshape(rows, heads, size)
