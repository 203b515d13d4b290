"""The far store on a CPU in torch: demote near blocks into it, and choose the blocks that queries read.

Scores are matrix products of signed queries with bounds, and top-k runs over packed (score, index) keys, so that ties are decided by the
index. There is no loop over tokens, and none over decoding sequences. It does not know layers or who owns a block.
Invariant: the same blocks are chosen as by the reference wherever scores differ by more than rounding.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from service.kernels.reference_sparse import FIRST_STAGE, SECOND_STAGE, FarBlocks, dequantise, key_bounds, near_rows, pack_nibbles, quantise

# Bounds and keys widened to float32 at once: bounds the temporaries of a step.
GATHER_BYTES = 16 << 20


def demote(key_blocks: Tensor, value_blocks: Tensor, far: FarBlocks, near_ids: Tensor, far_ids: Tensor) -> None:
    """All blocks at once; see `reference_sparse.demote`."""
    keys = _store(near_rows(key_blocks, near_ids), far.keys, far.key_scales, far_ids)
    _store(near_rows(value_blocks, near_ids), far.values, far.value_scales, far_ids)
    count, heads, tokens, size = keys.shape
    bounds, scales = key_bounds(keys.view(count * heads, tokens, size), far.part_bounds.shape[2])
    bounds = bounds.view(count, heads, *bounds.shape[1:])
    far.bounds[far_ids], far.part_bounds[far_ids] = bounds[:, :, 0], bounds[:, :, 1:]
    far.bound_scales[far_ids] = scales.view(count, heads)


def _store(x: Tensor, stored: Tensor, scales: Tensor | None, ids: Tensor) -> Tensor:
    """Write x [n, Hkv, B, D] into the blocks `ids`; gives what will be read back."""
    if scales is None:
        stored[ids] = x
        return x.float()
    packed = stored.dtype == torch.uint8
    units, unit = quantise(x, 7 if packed else 127)
    stored[ids] = pack_nibbles(units) if packed else units
    scales[ids] = unit
    return units.float() * unit.float().unsqueeze(-1)


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
    """Three stages of scores and top-k over packed (score, index) keys; see `reference_sparse.choose_far`."""
    heads, size = query.shape[1:]
    kv_heads = far.bounds.shape[1]
    candidates = (candidate_ends.long() - sink_blocks).clamp_(min=0)
    counts = torch.minimum(candidates, budgets.long())
    places = torch.arange(most)
    # Where the budget covers all candidates there is nothing to score.
    choices = torch.where(places < counts[:, None], places + sink_blocks, -1).to(torch.int32)
    choices = choices[:, None].repeat(1, kv_heads, 1)
    deciding = (candidates > budgets).nonzero().squeeze(1)
    if len(deciding):
        grouped = query[deciding].float().view(len(deciding), kv_heads, heads // kv_heads, size)
        signed = torch.cat((grouped.clamp(min=0), grouped.clamp(max=0)), dim=-1)
        call = _Deciding(far, far_tables[:, sink_blocks:], sequences[deciding], candidates[deciding], budgets[deciding].long(), most)
        chosen = _decide(signed, call)
        choices[deciding] = torch.where(chosen >= 0, chosen + sink_blocks, -1).to(torch.int32)
    return choices, counts.to(torch.int32)


class _Deciding(NamedTuple):
    """Anchors with more candidates than budget; tables, candidates and choices count from the first candidate."""

    far: FarBlocks
    tables: Tensor
    sequences: Tensor
    candidates: Tensor
    budgets: Tensor
    most: int


def _decide(signed: Tensor, call: _Deciding) -> Tensor:
    """For signed queries [A, Hkv, G, 2 · D]: chosen candidates in ascending order, −1 behind them, [A, Hkv, most] int64."""
    scores = _block_scores(signed, call)
    width = scores.shape[2]
    keep = min(int(call.budgets.max()) * FIRST_STAGE, width)
    kept = _best(scores, torch.arange(width), keep)
    scores = _without_surplus(_sub_block_scores(signed, kept, call), kept, FIRST_STAGE, call)
    kept = _best(scores, kept, min(int(call.budgets.max()) * SECOND_STAGE, keep))
    scores = _without_surplus(_key_scores(signed, kept, call), kept, SECOND_STAGE, call)
    chosen = _best(scores, kept, min(call.most, kept.shape[2]))
    surplus = torch.arange(chosen.shape[2]) >= call.budgets[:, None, None]
    chosen = chosen.masked_fill_(surplus, width).sort(dim=-1).values
    chosen = torch.where(chosen < width, chosen, -1)
    return torch.nn.functional.pad(chosen, (0, call.most - chosen.shape[2]), value=-1)


def _without_surplus(scores: Tensor, kept: Tensor, stage: int, call: _Deciding) -> Tensor:
    """Scores of `kept` candidates [A, Hkv, K], best first; −inf for those that a stage with stage · budget places has none for."""
    surplus = torch.arange(kept.shape[2]) >= stage * call.budgets[:, None, None]
    return scores.masked_fill_(surplus | (kept >= call.candidates[:, None, None]), float("-inf"))


def _best(scores: Tensor, indices: Tensor, number: int) -> Tensor:
    """The `indices` (as scores [..., C], or [C]) of the highest scores, ties to the lower index: [..., number], best first."""
    bits = scores.contiguous().view(torch.int32)
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    keys = (ordered.long() << 32) | (0xFFFFFFFF - indices)
    return 0xFFFFFFFF - (keys.topk(number, dim=-1).values & 0xFFFFFFFF)


def _block_scores(signed: Tensor, call: _Deciding) -> Tensor:
    """Bounds by whole blocks [A, Hkv, C] float32, −inf where there is no candidate."""
    width = int(call.candidates.max())
    owners, at = torch.unique(call.sequences, return_inverse=True)
    alone = len(owners) == len(call.sequences)
    scores = signed.new_empty(*signed.shape[:2], width)
    # Sequences with one anchor are scored together; the anchors of a slice against one copy of the bounds.
    for rows in (torch.arange(len(at)),) if alone else ((at == owner).nonzero().squeeze(1) for owner in range(len(owners))):
        limit = call.candidates[rows]
        valid = torch.arange(width) < limit[:, None]
        tables = call.tables[call.sequences[rows], :width] if alone else call.tables[call.sequences[rows[:1]], :width]
        widest = valid if alone else valid.any(dim=0, keepdim=True)
        ids = torch.where(widest, tables, 0).long()
        bounds = call.far.bounds[ids].flatten(3).float()  # [S, C, Hkv, 2 · D], S = 1 for a slice
        units = call.far.bound_scales[ids].float().permute(0, 2, 1)
        asked = signed[rows] if alone else signed[rows].transpose(0, 1).flatten(1, 2).unsqueeze(0)
        found = torch.matmul(asked, bounds.permute(0, 2, 3, 1))  # [S, Hkv, G or rows · G, C]
        found = found.amax(dim=2) if alone else found[0].view(signed.shape[1], len(rows), -1, width).amax(dim=2).transpose(0, 1)
        found = found * units
        scores[rows] = found.masked_fill(~valid[:, None, :], float("-inf"))
    return scores


def _spans(kept: Tensor, floats: int, call: _Deciding) -> Iterator[tuple[slice, Tensor]]:
    """Anchors, as many at once as GATHER_BYTES allow with `floats` for each of the kept candidates [A, Hkv, K]; and where these lie when
    blocks and K/V heads are one dimension, [a, Hkv, K]."""
    anchors, kv_heads, keep = kept.shape
    step = max(1, GATHER_BYTES // (kv_heads * keep * floats * 4))
    for start in range(0, anchors, step):
        span = slice(start, start + step)
        inside = torch.minimum(kept[span], call.candidates[span, None, None] - 1)
        ids = call.tables[call.sequences[span, None, None], inside].long()
        yield span, ids * kv_heads + torch.arange(kv_heads)[:, None]


def _sub_block_scores(signed: Tensor, kept: Tensor, call: _Deciding) -> Tensor:
    """The highest bound of any sub-block of the kept candidates [A, Hkv, K], float32."""
    rows = call.far.part_bounds.flatten(3).flatten(0, 1)
    units = call.far.bound_scales.flatten()
    scores = signed.new_empty(kept.shape)
    for span, flat in _spans(kept, rows[0].numel(), call):
        bounds = rows[flat].float().flatten(2, 3)  # [a, Hkv, K · parts, 2 · D]
        found = torch.matmul(bounds, signed[span].transpose(2, 3)).view(*flat.shape, -1)  # [a, Hkv, K, parts · G]
        scores[span] = found.amax(dim=-1) * units[flat].float()
    return scores


def _key_scores(signed: Tensor, kept: Tensor, call: _Deciding) -> Tensor:
    """The highest product with any key of the kept candidates [A, Hkv, K], float32."""
    positive, negative = signed.chunk(2, dim=3)
    query = (positive + negative).transpose(2, 3)  # [A, Hkv, D, G]
    keys = call.far.keys.flatten(0, 1)
    units = None if call.far.key_scales is None else call.far.key_scales.flatten(0, 1)
    scores = signed.new_empty(kept.shape)
    for span, flat in _spans(kept, keys.shape[1] * query.shape[2], call):
        found = dequantise(keys[flat], None if units is None else units[flat]).float()  # [a, Hkv, K, B, D]
        scores[span] = torch.matmul(found.flatten(2, 3), query[span]).view(*flat.shape, -1).amax(dim=-1)
    return scores
