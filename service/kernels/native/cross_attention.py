"""Attention of text rows to image tokens by the compiled paged attention: the same bits of a row whatever other rows the call has.

The image tokens are blocks of one table that every row shares, each row a sequence of its own that has seen `counts` tokens. It does not
know sequences or prompts. Invariant: the arithmetic of a row depends on its count and what it sees alone.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from service.kernels.native.attention import paged_attention

BLOCK_TOKENS = 64


def attend_images(query: Tensor, keys: Tensor, values: Tensor, counts: Tensor | None, scale: float) -> Tensor:
    """As `cross_attention.attend_images`, on a CPU, all of one type; weights are not rounded to the type of query."""
    rows, images = len(query), len(keys)
    blocks = -(-images // BLOCK_TOKENS)
    stores = (pad(x, (0, 0, 0, 0, 0, blocks * BLOCK_TOKENS - images)) for x in (keys, values))
    key_blocks, value_blocks = (x.view(blocks, BLOCK_TOKENS, *keys.shape[1:]).transpose(1, 2) for x in stores)
    tables = torch.arange(blocks, dtype=torch.int32).repeat(rows, 1)
    starts = torch.arange(rows + 1, dtype=torch.int32)
    contexts = torch.full((rows,), images, dtype=torch.int32) if counts is None else counts.to(torch.int32)
    return paged_attention(query, key_blocks, value_blocks, tables, starts, contexts, scale=scale, window=None)
