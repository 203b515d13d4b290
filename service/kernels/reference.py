"""Every operation in plain PyTorch: this file defines "correct"; the fast versions are compared with it.

Each function computes in the type of its inputs, so that float64 inputs give a float64 answer; nothing here is tuned. It does not know
models, engines or devices. Invariant: the signatures are those of the fast versions, and memory that an operation does not own (the null
block, released blocks, slots past the end of a sequence) is never read.
"""

from __future__ import annotations

import torch
from torch import Tensor

from service.kernels.kv_store import quantise_rows, row_size, widen_rows


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [T, in] times weight [out, in] transposed, plus bias [out]: [T, out]."""
    out = x @ weight.transpose(0, 1)
    return out if bias is None else out + bias


def quantised_linear(x: Tensor, steps: Tensor, scales: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [T, in], quantised row by row to −127 … 127, times a quantised weight, plus bias [out]: [T, out].

    The weight is steps [out, in], whole numbers, times scales [out, groups], one for each in / groups inputs. A row's scale is its largest
    magnitude over 127.
    """
    largest = x.abs().amax(dim=1, keepdim=True)
    rows = torch.round(x * torch.where(largest > 0, torch.full_like(largest, 127.0) / largest, 0.0))
    outputs, groups = scales.shape
    parts = torch.einsum("tgk,ogk->tog", rows.view(len(x), groups, -1), steps.to(x.dtype).view(outputs, groups, -1))
    out = (parts * scales.to(x.dtype)).sum(dim=2) * (largest / 127)
    return out if bias is None else out + bias


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Root mean square norm over the last dimension (Zhang and Sennrich 2019): x / sqrt(mean(x²) + eps) * weight."""
    return x / torch.sqrt(x.square().mean(dim=-1, keepdim=True) + eps) * weight


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The residual stream after adding x, and its norm: (rms_norm(x + residual), x + residual)."""
    total = x + residual
    return rms_norm(total, weight, eps), total


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding by halves (the Hugging Face llama convention) of x [T, H, D].

    cos and sin are [T, rotary_dim / 2], one angle for each pair (i, i + rotary_dim / 2); dimensions from rotary_dim on pass unchanged.
    """
    half = cos.shape[-1]
    first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    cos, sin = cos[:, None, :], sin[:, None, :]
    return torch.cat((first * cos - second * sin, second * cos + first * sin, rest), dim=-1)


def apply_rope(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """`rotate` of query [T, Hq, D] and of key [T, Hkv, D]."""
    return rotate(query, cos, sin), rotate(key, cos, sin)


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) * up (Shazeer 2020), gate being the first half of the last dimension and up the second."""
    gate, up = gate_up.chunk(2, dim=-1)
    return gate * torch.sigmoid(gate) * up


def head_gate(out: Tensor, gate_logits: Tensor) -> Tensor:
    """Attention output out [T, H, D], each head scaled by sigmoid(gate_logits [T, H])."""
    return out * torch.sigmoid(gate_logits)[:, :, None]


def write_kv(key: Tensor, value: Tensor, key_blocks: Tensor, value_blocks: Tensor, block_ids: Tensor, offsets: Tensor) -> None:
    """Store key [T, Hkv, D] and value [T, Hkv, Dv] of token t at [block_ids[t], :, offsets[t]] of the blocks [N, Hkv, B, D or Dv].

    Blocks of int8 have rows as `kv_store.quantise_rows` makes them.
    """
    if key_blocks.dtype == torch.int8:
        key, value = quantise_rows(key), quantise_rows(value)
    for token in range(key.shape[0]):
        block, offset = int(block_ids[token]), int(offsets[token])
        key_blocks[block, :, offset] = key[token]
        value_blocks[block, :, offset] = value[token]


def rotate_write(
    heads: Tensor,
    value: Tensor,
    cos: Tensor,
    sin: Tensor,
    key_blocks: Tensor,
    value_blocks: Tensor,
    block_ids: Tensor,
    offsets: Tensor,
) -> Tensor:
    """`rotate` of heads [T, Hq + Hkv, D], the query heads first, and `write_kv` of what the key heads become with value [T, Hkv, Dv].

    The rotated query heads [T, Hq, D].
    """
    turned = rotate(heads, cos, sin)
    query_heads = heads.shape[1] - value.shape[1]
    write_kv(turned[:, query_heads:], value, key_blocks, value_blocks, block_ids, offsets)
    return turned[:, :query_heads]


def gather_tokens(blocks: Tensor, table: Tensor, start: int, end: int) -> Tensor:
    """Positions start … end − 1 of one sequence, [end − start, Hkv, D], from blocks [N, Hkv, B, D] through its table [M]."""
    size = blocks.shape[2]
    return torch.stack([blocks[int(table[position // size]), :, position % size] for position in range(start, end)])


def paged_attention(
    query: Tensor,
    key_blocks: Tensor,
    value_blocks: Tensor,
    block_tables: Tensor,
    query_starts: Tensor,
    context_lengths: Tensor,
    *,
    scale: float,
    window: int | None,
    softcap: float | None = None,
    sink_logits: Tensor | None = None,
    plan: object = None,
) -> Tensor:
    """Causal attention of query [T, Hq, D] over block tables: [T, Hq, Dv].

    Sequence s owns the query rows query_starts[s] … query_starts[s + 1] − 1, which are the last rows of its context_lengths[s] tokens. The
    query at position p sees the positions max(0, p − window + 1) … p. Table entry i holds the block of positions i·B … i·B + B − 1;
    entries wholly behind every window or past the end are not read. `softcap` c bounds the scores: c·tanh(score / c). `sink_logits` [Hq]
    is a learned logit for each head that takes part in the softmax and has no value. Rows that see nothing give 0. A `plan` may only say
    again what the tables say, so the reference reads the tables.
    """
    del plan
    heads, kv_heads, value_dim = query.shape[1], key_blocks.shape[1], row_size(value_blocks)
    out = query.new_zeros(query.shape[0], heads, value_dim)
    for sequence in range(context_lengths.shape[0]):
        first, last, context = int(query_starts[sequence]), int(query_starts[sequence + 1]), int(context_lengths[sequence])
        for row in range(first, last):
            position = context - (last - row)
            if position < 0:
                continue
            start = 0 if window is None else max(0, position - window + 1)
            seen = [gather_tokens(blocks, block_tables[sequence], start, position + 1) for blocks in (key_blocks, value_blocks)]
            keys, values = ((widen_rows(rows) if rows.dtype == torch.int8 else rows).to(query.dtype) for rows in seen)
            for head in range(heads):
                shared = head // (heads // kv_heads)
                scores = keys[:, shared] @ query[row, head] * scale
                if softcap is not None:
                    scores = softcap * torch.tanh(scores / softcap)
                if sink_logits is not None:
                    scores = torch.cat((scores, sink_logits[head : head + 1].to(scores.dtype)))
                weights = torch.softmax(scores, dim=0)[: values.shape[0]]
                out[row, head] = weights @ values[:, shared]
    return out
