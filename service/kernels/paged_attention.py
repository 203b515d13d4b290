"""Paged attention on a CPU: one flat batch that mixes prefill slices and decode rows, read over block tables.

Decode rows are computed together, flash-decoding style, over the flat list of (sequence, block) pairs that they see: no padding to the
longest context and no loop over rows. Each prefill slice is computed in query tiles, each over the blocks that its rows see; a decode
row that is alone goes the same way, which has a third of the fixed cost. Blocks behind
the window are skipped. It does not know models, layers or who owns a block.
Invariant: a block that no row sees is never read, and whatever unused slots of a block hold (NaN included) never reaches the output.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from service.kernels.kv_store import row_size, widen_rows, widened
from service.kernels.workspace import Workspace

# K and V gathered at once, so that both fit the second and third level caches.
GATHER_BYTES = 4 << 20
# Query rows of a prefill slice computed at once: bounds the scores of a tile and what a windowed slice reads beyond its window.
TILE_ROWS = 256

_WORKSPACE = Workspace()


@dataclass(frozen=True, slots=True)
class Scoring:
    """How scores become weights: their scale, the window, the cap on scores or None, learned sink logits [Hkv, G] float32 or None."""

    scale: float
    window: int | None
    softcap: float | None
    sinks: Tensor | None


@dataclass(frozen=True, slots=True)
class PrefillTile:
    """Consecutive query rows of one sequence and the keys they see.

    Rows first_row … last_row − 1 stand at positions first_position …; they see positions key_start … key_end − 1 at most, which lie in the
    blocks `ids` [n] from position block_start on.
    """

    first_row: int
    last_row: int
    first_position: int
    key_start: int
    key_end: int
    block_start: int
    ids: Tensor


@dataclass(frozen=True, slots=True)
class AttentionPlan:
    """What one step reads, the same for all layers of a KV group: made once by `plan_attention`, used by each layer.

    rows [S]: the query rows of decoding sequences that see something. For pair p of the P (sequence, block) pairs they see: sequences [P]
    (index into rows), ids [P] the physical block, hidden [P, B] the slots not seen, bias [P, B] −inf there and 0 elsewhere.
    offsets [S + 1] delimit each sequence's pairs. `run` is
    the first id where all ids follow each other, so that nothing needs gathering.
    """

    rows: Tensor
    sequences: Tensor
    ids: Tensor
    hidden: Tensor
    bias: Tensor
    offsets: Tensor
    run: int | None
    tiles: tuple[PrefillTile, ...]


def plan_attention(
    block_tables: Tensor, query_starts: Tensor, context_lengths: Tensor, *, block_tokens: int, window: int | None
) -> AttentionPlan:
    """Find the blocks that every row of a step sees; arguments as in `paged_attention`."""
    starts = query_starts.to(torch.int64)
    contexts = context_lengths.to(torch.int64)
    counts = starts[1:] - starts[:-1]
    decoding = ((counts == 1) & (contexts > 0)).nonzero().squeeze(1)
    together = len(decoding) > 1
    decoding = decoding if together else decoding[:0]
    lengths = contexts[decoding]
    first_seen = torch.zeros_like(lengths) if window is None else (lengths - window).clamp_(min=0)
    tiles: list[PrefillTile] = []
    for sequence in (counts > (1 if together else 0)).nonzero().squeeze(1).tolist():
        first, last, context = int(starts[sequence]), int(starts[sequence + 1]), int(contexts[sequence])
        tiles.extend(_tiles(block_tables[sequence], first, last, context, block_tokens, window))
    pairs = plan_pairs(block_tables[decoding], lengths, first_seen, sink_blocks=0, block_tokens=block_tokens)
    return replace(pairs, rows=starts[:-1][decoding], tiles=tuple(tiles))


def plan_pairs(tables: Tensor, lengths: Tensor, first_seen: Tensor, *, sink_blocks: int, block_tokens: int) -> AttentionPlan:
    """The pairs of decoding sequences with `tables` [S, M] that see lengths [S] tokens from first_seen [S] on, and their sinks.

    Rows are 0 … S − 1 and there are no tiles.
    """
    count = len(lengths)
    gaps = (first_seen // block_tokens - sink_blocks).clamp_(min=0)
    pairs = (lengths - 1) // block_tokens - gaps + 1
    offsets = torch.zeros(count + 1, dtype=torch.int64)
    torch.cumsum(pairs, 0, out=offsets[1:])
    sequences = torch.repeat_interleave(torch.arange(count), pairs)
    blocks = torch.arange(len(sequences)) - offsets[:-1][sequences]
    blocks += torch.where(blocks < sink_blocks, 0, gaps[sequences])
    ids = tables[sequences, blocks].to(torch.int64)
    positions = blocks[:, None] * block_tokens + torch.arange(block_tokens)
    hidden = positions >= lengths[sequences, None]
    hidden |= (positions < first_seen[sequences, None]) & (blocks >= sink_blocks)[:, None]
    bias = torch.zeros(hidden.shape).masked_fill_(hidden, float("-inf"))
    consecutive = len(ids) > 0 and bool((ids[1:] - ids[:-1] == 1).all())
    run = int(ids[0]) if consecutive else None
    return AttentionPlan(torch.arange(count), sequences, ids, hidden, bias, offsets, run, ())


def _tiles(table: Tensor, first: int, last: int, context: int, block_tokens: int, window: int | None) -> list[PrefillTile]:
    """The tiles of one prefill slice whose rows first … last − 1 are the last of `context` tokens; rows before position 0 are left out."""
    shift = context - last  # position = row + shift
    tiles = []
    for row in range(max(first, -shift), last, TILE_ROWS):
        end = min(row + TILE_ROWS, last)
        key_start = 0 if window is None else max(0, row + shift - window + 1)
        block = key_start // block_tokens
        ids = table[block : -(-(end + shift) // block_tokens)].to(torch.int64)
        tiles.append(PrefillTile(row, end, row + shift, key_start, end + shift, block * block_tokens, ids))
    return tiles


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
    plan: AttentionPlan | None = None,
) -> Tensor:
    """Causal attention of query [T, Hq, D] over block tables: [T, Hq, Dv] in the type of query, computed in float32.

    key_blocks [N, Hkv, B, D], value_blocks [N, Hkv, B, Dv] (in int8 as `kv_store` has them), block_tables [S, M] int32, query_starts
    [S + 1] int32, context_lengths [S] int32. Sequence s owns the query rows query_starts[s] … query_starts[s + 1] − 1: the last of its
    context_lengths[s] tokens. Table entry
    i holds the block of positions i·B … i·B + B − 1; entries behind the window or past the end may hold anything. The row at position p
    sees positions max(0, p − window + 1) … p; rows that see nothing give 0. `softcap` c bounds the scores: c·tanh(score / c).
    `sink_logits` [Hq] takes part in the softmax and has no value. `plan` is what `plan_attention` gives for the same tables and window.
    """
    if plan is None:
        plan = plan_attention(block_tables, query_starts, context_lengths, block_tokens=key_blocks.shape[2], window=window)
    heads, kv_heads = query.shape[1], key_blocks.shape[1]
    group = heads // kv_heads
    scoring = Scoring(scale, window, softcap, None if sink_logits is None else sink_logits.float().view(kv_heads, group))
    if len(plan.rows) == query.shape[0] > 0:
        return _decode(query, key_blocks, value_blocks, plan, scoring)
    out = query.new_zeros(query.shape[0], heads, row_size(value_blocks))
    if len(plan.rows):
        out.index_copy_(0, plan.rows, _decode(query.index_select(0, plan.rows), key_blocks, value_blocks, plan, scoring))
    for tile in plan.tiles:
        rows = query[tile.first_row : tile.last_row]
        out[tile.first_row : tile.last_row] = _prefill(rows, key_blocks, value_blocks, tile, scoring)
    return out


def _decode(query: Tensor, key_blocks: Tensor, value_blocks: Tensor, plan: AttentionPlan, scoring: Scoring) -> Tensor:
    """Query rows [S, Hq, D], one a sequence, over the plan's pairs: [S, Hq, Dv] in the type of query."""
    kv_heads, (count, heads, size) = key_blocks.shape[1], query.shape
    packed = (query.float() * scoring.scale).view(count, kv_heads, heads // kv_heads, size)
    mixed = attend_pairs(packed, key_blocks, value_blocks, plan, scoring)
    return mixed.total.div_(mixed.sums.unsqueeze(-1)).view(count, heads, -1).to(query.dtype)


class Partial(NamedTuple):
    """Attention to some of the keys, still to be divided: total [..., Dv], the sum of the weights and the score they are relative to."""

    total: Tensor
    sums: Tensor
    highest: Tensor


def attend_pairs(query: Tensor, key_blocks: Tensor, value_blocks: Tensor, plan: AttentionPlan, scoring: Scoring) -> Partial:
    """Scaled rows [S, Hkv, G, D] float32 over the plan's pairs: the parts are [S, Hkv, G, …] float32.

    Unused slots get weight 0 by adding −infinity to their scores, so only NaN or infinity there can disturb the result. It then shows in
    the sum, and the rows are computed again with unused slots overwritten: what is rare pays, and the common case needs no extra pass.
    """
    result = _attend(query, key_blocks, value_blocks, plan, scoring, clean=False)
    if not math.isfinite(result.total.sum().item()):
        result = _attend(query, key_blocks, value_blocks, plan, scoring, clean=True)
    return result


def _attend(query: Tensor, key_blocks: Tensor, value_blocks: Tensor, plan: AttentionPlan, scoring: Scoring, *, clean: bool) -> Partial:
    """`attend_pairs`; `clean` overwrites unused slots instead of weighing them 0."""
    count, kv_heads, group, size = query.shape
    pairs, tokens, value_size = len(plan.ids), key_blocks.shape[2], row_size(value_blocks)
    step = max(1, min(pairs, GATHER_BYTES // (kv_heads * tokens * max(size, value_size) * 4)))
    packed = query.index_select(0, plan.sequences).view(pairs * kv_heads, group, size)
    scores = _WORKSPACE.take("scores", pairs * kv_heads, group, tokens)
    for start in range(0, pairs, step):
        keys = _pick(key_blocks, plan, start, start + step)
        span = slice(start * kv_heads, (start + step) * kv_heads)
        torch.bmm(packed[span], keys.view(-1, tokens, size).transpose(1, 2), out=scores[span])
    if clean:
        scores.view(pairs, kv_heads, group, tokens).masked_fill_(plan.hidden[:, None, None, :], 0.0)
    sums, highest = _weigh(scores.view(pairs, kv_heads, group, tokens), plan, scoring)
    partial = _WORKSPACE.take("partial", pairs * kv_heads, group, value_size)
    for start in range(0, pairs, step):
        values = _pick(value_blocks, plan, start, start + step)
        if clean:
            values = values.masked_fill(plan.hidden[start : start + step, None, :, None], 0.0)
        span = slice(start * kv_heads, (start + step) * kv_heads)
        torch.bmm(scores[span], values.view(-1, tokens, value_size), out=partial[span])
    total = torch.embedding_bag(partial.view(pairs, -1), torch.arange(pairs), plan.offsets[:-1], False, 0)[0]
    return Partial(total.view(count, kv_heads, group, value_size), sums, highest)


def _pick(blocks: Tensor, plan: AttentionPlan, start: int, end: int) -> Tensor:
    """The blocks of pairs start … end − 1 in float32, [n, Hkv, B, D]: a view where they lie one after the other, else in the workspace."""
    ids = plan.ids[start:end]
    if plan.run is not None:
        return widened(blocks[plan.run + start : plan.run + start + len(ids)])
    if blocks.dtype == torch.int8:
        return widen_rows(blocks.index_select(0, ids))
    picked = _WORKSPACE.take("blocks", len(ids), *blocks.shape[1:])
    if blocks.dtype == torch.float32:
        return torch.index_select(blocks, 0, ids, out=picked)
    return picked.copy_(blocks.index_select(0, ids))


def _weigh(scores: Tensor, plan: AttentionPlan, scoring: Scoring) -> tuple[Tensor, Tensor]:
    """Turn scores [P, Hkv, G, B] into unnormalised softmax weights in place; the sums to divide by and the highest scores, [S, Hkv, G]."""
    pairs, kv_heads, group = scores.shape[:3]
    if scoring.softcap is not None:
        scores.div_(scoring.softcap).tanh_().mul_(scoring.softcap)
    scores.add_(plan.bias[:, None, None, :])
    highest = torch.segment_reduce(scores.amax(dim=-1).view(pairs, -1), "max", offsets=plan.offsets).view(-1, kv_heads, group)
    if scoring.sinks is not None:
        highest = torch.maximum(highest, scoring.sinks)
    scores.sub_(highest.index_select(0, plan.sequences).unsqueeze(-1)).exp_()
    sums = torch.segment_reduce(scores.sum(dim=-1).view(pairs, -1), "sum", offsets=plan.offsets).view(-1, kv_heads, group)
    return (sums if scoring.sinks is None else sums + torch.exp(scoring.sinks - highest)), highest


def _gather(blocks: Tensor, tile: PrefillTile, name: str) -> Tensor:
    """The tile's keys or values as [Hkv, key_end − key_start, D] float32, each head's in order: only slots that are seen."""
    heads, tokens, size = blocks.shape[1:]
    count = len(tile.ids)
    if blocks.is_contiguous():
        rows = (tile.ids * heads + torch.arange(heads)[:, None]).view(-1)
        flat = blocks.view(-1, tokens * size)
        out = _WORKSPACE.take(name, heads * count, tokens * size) if blocks.dtype == torch.float32 else None
        picked = torch.index_select(flat, 0, rows, out=out)
    else:
        picked = blocks.index_select(0, tile.ids).transpose(0, 1).contiguous()
    seen = picked.view(heads, count * tokens, size)[:, tile.key_start - tile.block_start : tile.key_end - tile.block_start]
    return widened(seen)


def lone_row(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """One scaled row [1, Hkv, G, D] that sees all of keys [Hkv, L, D] and values [Hkv, L, D]: [1, Hq, D]."""
    return scaled_dot_product_attention(query, keys[None], values[None], scale=1.0).reshape(1, -1, values.shape[2])


def _prefill(query: Tensor, key_blocks: Tensor, value_blocks: Tensor, tile: PrefillTile, scoring: Scoring) -> Tensor:
    """Query rows [n, Hq, D] of one tile: [n, Hq, Dv] float32."""
    kv_heads, (count, heads, size) = key_blocks.shape[1], query.shape
    group = heads // kv_heads
    rows = (query.float() * scoring.scale).view(count, kv_heads, group, size)
    keys, values = _gather(key_blocks, tile, "keys"), _gather(value_blocks, tile, "values")
    plain = scoring.softcap is None and scoring.sinks is None and values.shape[2] == size
    if plain and count == 1:
        return lone_row(rows, keys, values)
    query_at = torch.arange(tile.first_position, tile.first_position + count)[:, None]
    key_at = torch.arange(tile.key_start, tile.key_end)
    seen = key_at <= query_at
    if scoring.window is not None:
        seen &= key_at > query_at - scoring.window
    if plain:
        query = rows.permute(1, 2, 0, 3).reshape(1, kv_heads * group, count, size)
        mixed = scaled_dot_product_attention(query, keys[None], values[None], attn_mask=seen, scale=1.0, enable_gqa=True)
        return mixed[0].transpose(0, 1)
    scores = torch.matmul(rows.permute(1, 2, 0, 3), keys.unsqueeze(1).transpose(-1, -2))
    if scoring.softcap is not None:
        scores.div_(scoring.softcap).tanh_().mul_(scoring.softcap)
    scores.masked_fill_(~seen, float("-inf"))
    if scoring.sinks is not None:
        scores = torch.cat((scores, scoring.sinks[:, :, None, None].expand(-1, -1, count, 1)), dim=-1)
    weights = torch.softmax(scores, dim=-1)[..., : keys.shape[1]]
    return torch.matmul(weights, values.unsqueeze(1)).permute(2, 0, 1, 3).reshape(count, kv_heads * group, -1)
