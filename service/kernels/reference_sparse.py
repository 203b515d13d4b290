"""Window + far attention over two stores in plain PyTorch: this file defines "correct" for demoting, choosing and attending.

A sequence's last tokens and its first blocks (sinks) lie in the near store, in the model's type; older full blocks lie in the far store,
quantised, with bounds of their keys to choose by. It does not know models, layers, tables' owners or devices.
Invariants: what a query sees, and in which precision, is a function of its position alone; the signatures are those of the fast versions;
memory that an operation does not own (the null block, unused table entries, positions past the query's) is never read.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from service.kernels.kv_store import row_size, widen_rows

# Candidates that the first stages of choosing keep for each block that may be chosen: by bounds of blocks, then of their parts.
FIRST_STAGE, SECOND_STAGE = 4, 3


class FarBlocks(NamedTuple):
    """One layer's far store: F blocks of B tokens of Hkv K/V heads.

    `keys` [F, Hkv, B, D] and `values` [F, Hkv, B, Dv] are int8; or uint8 with two 4-bit values a byte ([…, D / 2], the even index in the
    low nibble); or the near store's type, then without scales. `key_scales` and `value_scales` float16 [F, Hkv, B]. `bounds` int8
    [F, Hkv, 2, D]: the largest and the smallest key of each feature in the block; `part_bounds` int8 [F, Hkv, subs, 2, D]: in each of its
    equal sub-blocks; both in units of `bound_scales` float16 [F, Hkv], rounded outward. A choice reads `bounds` and their scales of all
    candidates, so `kv_pool` lays these out with a head's blocks side by side; kernels take them in any strides of blocks and heads.
    """

    keys: Tensor
    values: Tensor
    key_scales: Tensor | None
    value_scales: Tensor | None
    bounds: Tensor
    part_bounds: Tensor
    bound_scales: Tensor


class ChosenFar(NamedTuple):
    """What a step's rows read of a layer's far store.

    `tables` int32 [S, M] give far block ids by sequence and table index. Row t reads, for K/V head h, the table indices
    choices[a, h, : counts[a]] with a = anchors[t]; none where that is −1. `choices` int32 [A, Hkv, most], `counts` int32 [A], both as
    `choose_far` gives them (in this step or an earlier one), `anchors` int64 [T]. `budget` is how many blocks the model's rows choose at
    least, where there are as many: the same in every step, since the order of a kernel's sums may follow from it.
    """

    blocks: FarBlocks
    tables: Tensor
    choices: Tensor
    counts: Tensor
    anchors: Tensor
    budget: int


def near_start(position: int, window: int, refresh: int, block_tokens: int) -> int:
    """The first block that the query at `position` reads from the near store because of its window.

    The window of its anchor counts, which is the last multiple of `refresh` up to `position`; its blocks are read whole.
    """
    anchor = position // refresh * refresh
    return max(anchor - window + 1, 0) // block_tokens


def quantise(x: Tensor, levels: int) -> tuple[Tensor, Tensor]:
    """Symmetric integers −levels … levels of rows x [..., D] as int8, and a float16 scale [...] for each row.

    The scale max|x| / levels is rounded to float16 first; rows whose scale is 0 get zeros. Not finite rows come back not finite.
    """
    scales = (x.float().abs().amax(dim=-1) / levels).to(torch.float16)
    units = torch.round(x.float() / scales.float().unsqueeze(-1)).clamp(-levels, levels)
    usable = (scales > 0) & torch.isfinite(scales)
    return torch.where(usable.unsqueeze(-1), units, torch.zeros_like(units)).to(torch.int8), scales


def pack_nibbles(x: Tensor) -> Tensor:
    """int8 values −8 … 7 [..., D] as uint8 [..., D / 2]: the even index in the low nibble."""
    nibbles = x.to(torch.int16) & 15
    return (nibbles[..., 0::2] | (nibbles[..., 1::2] << 4)).to(torch.uint8)


def unpack_nibbles(packed: Tensor) -> Tensor:
    """uint8 [..., D / 2] back to int8 values −8 … 7 [..., D]."""
    pairs = torch.stack((packed & 15, packed >> 4), dim=-1).to(torch.int8)
    return ((pairs ^ 8) - 8).flatten(-2)


def dequantise(stored: Tensor, scales: Tensor | None) -> Tensor:
    """Far keys or values [..., D or D / 2] with their scales [...] as float32 [..., D]; a store of the near type comes back as it is."""
    if scales is None:
        return stored
    units = unpack_nibbles(stored) if stored.dtype == torch.uint8 else stored
    return units.float() * scales.float().unsqueeze(-1)


def key_bounds(keys: Tensor, sub_blocks: int) -> tuple[Tensor, Tensor]:
    """Bounds of one block's keys [Hkv, B, D]: int8 [Hkv, 1 + sub_blocks, 2, D] and their scales float16 [Hkv], both rounded outward.

    bounds[:, i, 0] · scale ≥ every key of part i ≥ bounds[:, i, 1] · scale, part 0 being the block. With 7 bits of units and 11 of scale
    these products are exact in float32.
    """
    heads, tokens, size = keys.shape
    keys = keys.float()
    parts = keys.view(heads, sub_blocks, tokens // sub_blocks, size)
    highest = torch.cat((keys.amax(dim=1, keepdim=True), parts.amax(dim=2)), dim=1)
    lowest = torch.cat((keys.amin(dim=1, keepdim=True), parts.amin(dim=2)), dim=1)
    largest = keys.abs().amax(dim=(1, 2))
    scales = (largest / 127).to(torch.float16)
    above = (scales.view(torch.int16) + 1).view(torch.float16)
    scales = torch.where(scales.float() * 127 < largest, above, scales)
    unit = scales.float()[:, None, None]
    return torch.stack((_upward(highest, unit), -_upward(-lowest, unit)), dim=2).to(torch.int8), scales


def _upward(x: Tensor, unit: Tensor) -> Tensor:
    """The least whole number of units that is ≥ x, even where the quotient was rounded down; 0 where the unit is 0."""
    count = torch.ceil(x / unit)
    count = torch.where(count * unit < x, count + 1, count)
    return torch.where((unit > 0) & torch.isfinite(unit), count, torch.zeros_like(count))


def demote(key_blocks: Tensor, value_blocks: Tensor, far: FarBlocks, near_ids: Tensor, far_ids: Tensor) -> None:
    """Write full near blocks near_ids [n] into the far blocks far_ids [n]: keys, values, scales and bounds.

    key_blocks [N, Hkv, B, D], value_blocks [N, Hkv, B, Dv], or both in 8 bits as `kv_store` has them; the ids are integers, those of
    far_ids differ from each other. The bounds are those of the keys as they will be read back. Quantised per token and head: see
    `quantise`.
    """
    for near, target in zip(near_ids.tolist(), far_ids.tolist(), strict=True):
        for blocks, stored, scales in ((key_blocks, far.keys, far.key_scales), (value_blocks, far.values, far.value_scales)):
            rows = near_rows(blocks, near)
            if scales is None:
                stored[target] = rows
                continue
            packed = stored.dtype == torch.uint8
            units, scales[target] = quantise(rows, 7 if packed else 127)
            stored[target] = pack_nibbles(units) if packed else units
        keys = dequantise(far.keys[target], None if far.key_scales is None else far.key_scales[target])
        bounds, far.bound_scales[target] = key_bounds(keys, far.part_bounds.shape[2])
        far.bounds[target], far.part_bounds[target] = bounds[:, 0], bounds[:, 1:]


def near_rows(blocks: Tensor, ids: Tensor | int) -> Tensor:
    """Keys or values of near blocks as they are, or in float32 where they are kept in 8 bits."""
    return widen_rows(blocks[ids]) if blocks.dtype == torch.int8 else blocks[ids]


def bound_scores(query: Tensor, far: FarBlocks, block: int, head: int) -> Tensor:
    """Upper bounds of the product of any query of [G, D] with any key of each part of a far block's K/V head: [1 + subs] float32."""
    positive, negative = query.float().clamp(min=0), (-query.float()).clamp(min=0)
    bounds = torch.cat((far.bounds[block, head, None], far.part_bounds[block, head])).float()
    return (bounds[:, 0] @ positive.T - bounds[:, 1] @ negative.T).amax(dim=1) * far.bound_scales[block, head].float()


def key_score(query: Tensor, far: FarBlocks, block: int, head: int) -> float:
    """The highest product of any query of [G, D] with any key of a far block's K/V head, as it is kept."""
    keys = dequantise(far.keys[block, head], None if far.key_scales is None else far.key_scales[block, head])
    return float((keys.float() @ query.float().T).max())


def choose_far(
    query: Tensor,
    far: FarBlocks,
    far_tables: Tensor,
    sequences: Tensor,
    candidate_ends: Tensor,
    budgets: Tensor,
    *,
    sink_blocks: int,
    most: int,
) -> tuple[Tensor, Tensor]:
    """Choose far blocks for the anchor queries [A, Hq, D]: choices int32 [A, Hkv, most] and counts int32 [A].

    Anchor a belongs to sequence sequences[a], a row of far_tables [S, M]; its candidates are the table indices sink_blocks …
    candidate_ends[a] − 1 (none if that is empty), of which each K/V head gets the best budgets[a] ≤ most. The query heads of a K/V head
    choose together: a block's score bounds the product of any of them with any of its keys. By the bounds of whole blocks the best
    FIRST_STAGE · budget are kept, of these the best SECOND_STAGE · budget by the highest bound of a sub-block, and of these the best by
    their highest product with a key as it is kept; ties go to the lower index. All in float32. The choices are table indices in ascending
    order, −1 behind the first counts[a], which is the same for every head.
    """
    heads, kv_heads = query.shape[1], far.bounds.shape[1]
    grouped = query.view(query.shape[0], kv_heads, heads // kv_heads, query.shape[2])
    choices = torch.full((query.shape[0], kv_heads, most), -1, dtype=torch.int32)
    counts = torch.zeros(query.shape[0], dtype=torch.int32)
    for anchor in range(query.shape[0]):
        table, budget = far_tables[int(sequences[anchor])].tolist(), int(budgets[anchor])
        candidates = range(sink_blocks, int(candidate_ends[anchor]))
        counts[anchor] = min(len(candidates), budget)
        for head in range(kv_heads):
            scores = {index: bound_scores(grouped[anchor, head], far, table[index], head) for index in candidates}
            kept = sorted(candidates, key=lambda index: (-float(scores[index][0]), index))[: FIRST_STAGE * budget]
            kept = sorted(kept, key=lambda index: (-float(scores[index][1:].max()), index))[: SECOND_STAGE * budget]
            products = {index: key_score(grouped[anchor, head], far, table[index], head) for index in kept}
            best = sorted(kept, key=lambda index: (-products[index], index))[:budget]
            choices[anchor, head, : len(best)] = torch.tensor(sorted(best), dtype=torch.int32)
    return choices.to(query.device), counts.to(query.device)


def window_sparse_attention(
    query: Tensor,
    key_blocks: Tensor,
    value_blocks: Tensor,
    near_tables: Tensor,
    query_starts: Tensor,
    context_lengths: Tensor,
    *,
    far: ChosenFar | None,
    scale: float,
    window: int,
    refresh: int,
    sink_blocks: int,
    softcap: float | None = None,
    sink_logits: Tensor | None = None,
    plan: object = None,
) -> Tensor:
    """Causal attention of query [T, Hq, D] to sinks, chosen far blocks and the window: [T, Hq, Dv].

    Rows, sequences, near blocks and tables are as in `paged_attention`. The query at position p reads, up to p, the near blocks 0 …
    sink_blocks − 1 and `near_start(p)` … p // B, and between them whole far blocks as `far` says (None: nothing is ever far). Table
    entries that no row reads are never looked at. `softcap` and `sink_logits` are as in `paged_attention`, rows that see nothing give 0,
    and a `plan` may only say again what the tables say.
    """
    del plan
    block_tokens, heads, kv_heads = key_blocks.shape[2], query.shape[1], key_blocks.shape[1]
    out = query.new_zeros(query.shape[0], heads, row_size(value_blocks))
    for sequence in range(context_lengths.shape[0]):
        first, last, context = int(query_starts[sequence]), int(query_starts[sequence + 1]), int(context_lengths[sequence])
        for row in range(first, last):
            position = context - (last - row)
            if position < 0:
                continue
            start = near_start(position, window, refresh, block_tokens)
            near = [block for block in range(position // block_tokens + 1) if block < sink_blocks or block >= start]
            for head in range(heads):
                shared = head // (heads // kv_heads)
                keys, values = [], []
                for block in near:
                    seen, at = min(block_tokens, position + 1 - block * block_tokens), int(near_tables[sequence, block])
                    keys.append(near_rows(key_blocks, at)[shared, :seen].to(query.dtype))
                    values.append(near_rows(value_blocks, at)[shared, :seen].to(query.dtype))
                for far_keys, far_values in [] if far is None else chosen_blocks(far, sequence, row, shared):
                    keys.append(far_keys.to(query.dtype))
                    values.append(far_values.to(query.dtype))
                logit = None if sink_logits is None else sink_logits[head : head + 1]
                out[row, head] = _attend(query[row, head] * scale, torch.cat(keys), torch.cat(values), softcap, logit)
    return out


def chosen_blocks(far: ChosenFar, sequence: int, row: int, head: int) -> list[tuple[Tensor, Tensor]]:
    """Keys [B, D] and values [B, Dv] of every far block that a row reads for one K/V head, dequantised."""
    anchor, store = int(far.anchors[row]), far.blocks
    if anchor < 0:
        return []
    ids = far.tables[sequence, far.choices[anchor, head, : int(far.counts[anchor])].long()].tolist()
    scales = (store.key_scales, store.value_scales)
    key_scales, value_scales = ([None if scale is None else scale[block, head] for block in ids] for scale in scales)
    return [
        (dequantise(store.keys[block, head], key_scales[at]), dequantise(store.values[block, head], value_scales[at]))
        for at, block in enumerate(ids)
    ]


def _attend(query: Tensor, keys: Tensor, values: Tensor, softcap: float | None, sink_logit: Tensor | None) -> Tensor:
    """One scaled query [D] over keys [n, D] and values [n, Dv]: [Dv]."""
    scores = keys @ query
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if sink_logit is not None:
        scores = torch.cat((scores, sink_logit.to(scores.dtype)))
    return torch.softmax(scores, dim=0)[: values.shape[0]] @ values
