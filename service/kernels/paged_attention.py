"""Paged attention on a CPU: one flat batch that mixes prefill slices and decode rows, read over block tables.

Decode rows are computed together, flash-decoding style, over the flat list of (sequence, block) pairs that they see: no padding to the
longest context and no loop over rows. Each prefill slice is computed in query tiles, each over the blocks that its rows see. Blocks behind
the window are skipped. It does not know models, layers or who owns a block.
Invariant: a block that no row sees is never read, and whatever unused slots of a block hold (NaN included) never reaches the output.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from service.kernels.workspace import Workspace

# K and V gathered at once, so that both fit the second and third level caches.
GATHER_BYTES = 4 << 20
# Query rows of a prefill slice computed at once: bounds the scores of a tile and what a windowed slice reads beyond its window.
TILE_ROWS = 256

_WORKSPACE = Workspace()


@dataclass(frozen=True, slots=True)
class Scoring:
    """How scores become weights: the window, the cap on scores or None, learned sink logits [Hkv, G] float32 or None."""

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
    (index into rows), ids [P] the physical block, hidden [P, B] the slots not seen. offsets [S + 1] delimit each sequence's pairs. `run` is
    the first id where all ids follow each other, so that nothing needs gathering.
    """

    rows: Tensor
    sequences: Tensor
    ids: Tensor
    hidden: Tensor
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
    lengths = contexts[decoding]
    first_seen = torch.zeros_like(lengths) if window is None else (lengths - window).clamp_(min=0)
    first_block = first_seen // block_tokens
    pairs = (lengths - 1) // block_tokens - first_block + 1
    offsets = torch.zeros(len(decoding) + 1, dtype=torch.int64)
    torch.cumsum(pairs, 0, out=offsets[1:])
    sequences = torch.repeat_interleave(torch.arange(len(decoding)), pairs)
    blocks = torch.arange(len(sequences)) - (offsets[:-1] - first_block)[sequences]
    ids = block_tables[decoding[sequences], blocks].to(torch.int64)
    positions = blocks[:, None] * block_tokens + torch.arange(block_tokens)
    hidden = (positions >= lengths[sequences, None]) | (positions < first_seen[sequences, None])
    tiles: list[PrefillTile] = []
    for sequence in (counts > 1).nonzero().squeeze(1).tolist():
        first, last, context = int(starts[sequence]), int(starts[sequence + 1]), int(contexts[sequence])
        tiles.extend(_tiles(block_tables[sequence], first, last, context, block_tokens, window))
    consecutive = len(ids) > 0 and bool((ids[1:] - ids[:-1] == 1).all())
    run = int(ids[0]) if consecutive else None
    return AttentionPlan(starts[:-1][decoding], sequences, ids, hidden, offsets, run, tuple(tiles))


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

    key_blocks [N, Hkv, B, D], value_blocks [N, Hkv, B, Dv], block_tables [S, M] int32, query_starts [S + 1] int32, context_lengths [S]
    int32. Sequence s owns the query rows query_starts[s] … query_starts[s + 1] − 1: the last of its context_lengths[s] tokens. Table entry
    i holds the block of positions i·B … i·B + B − 1; entries behind the window or past the end may hold anything. The row at position p
    sees positions max(0, p − window + 1) … p; rows that see nothing give 0. `softcap` c bounds the scores: c·tanh(score / c).
    `sink_logits` [Hq] takes part in the softmax and has no value. `plan` is what `plan_attention` gives for the same tables and window.
    """
    if plan is None:
        plan = plan_attention(block_tables, query_starts, context_lengths, block_tokens=key_blocks.shape[2], window=window)
    heads, size, kv_heads = query.shape[1], query.shape[2], key_blocks.shape[1]
    group = heads // kv_heads
    scoring = Scoring(window, softcap, None if sink_logits is None else sink_logits.float().view(kv_heads, group))
    out = query.new_zeros(query.shape[0], heads, value_blocks.shape[3])
    if len(plan.rows):
        packed = (query.index_select(0, plan.rows).float() * scale).view(-1, kv_heads, group, size)
        result = _decode(packed, key_blocks, value_blocks, plan, scoring, clean=False)
        if not bool(torch.isfinite(result).all()):
            result = _decode(packed, key_blocks, value_blocks, plan, scoring, clean=True)
        out.index_copy_(0, plan.rows, result.to(query.dtype))
    for tile in plan.tiles:
        rows = (query[tile.first_row : tile.last_row].float() * scale).view(-1, kv_heads, group, size)
        out[tile.first_row : tile.last_row] = _prefill(rows, key_blocks, value_blocks, tile, scoring)
    return out


def _decode(query: Tensor, key_blocks: Tensor, value_blocks: Tensor, plan: AttentionPlan, scoring: Scoring, *, clean: bool) -> Tensor:
    """Scaled query rows [S, Hkv, G, D], one a sequence, over the plan's pairs: [S, Hq, Dv] float32.

    Unused slots get weight 0, so only NaN or infinity there can disturb the result; the caller then asks again with `clean`, which
    zeroes them in the gathered copy.
    """
    count, kv_heads, group, size = query.shape
    pairs, tokens, value_size = len(plan.ids), key_blocks.shape[2], value_blocks.shape[3]
    step = max(1, min(pairs, GATHER_BYTES // (kv_heads * tokens * max(size, value_size) * 4)))
    packed = query.index_select(0, plan.sequences).view(pairs * kv_heads, group, size)
    scores = _WORKSPACE.take("scores", pairs * kv_heads, group, tokens)
    for start in range(0, pairs, step):
        keys = _pick(key_blocks, plan, start, start + step)
        span = slice(start * kv_heads, (start + step) * kv_heads)
        torch.bmm(packed[span], keys.view(-1, tokens, size).transpose(1, 2), out=scores[span])
    sums = _weigh(scores.view(pairs, kv_heads, group, tokens), plan, scoring)
    partial = _WORKSPACE.take("partial", pairs * kv_heads, group, value_size)
    for start in range(0, pairs, step):
        values = _pick(value_blocks, plan, start, start + step)
        if clean:
            values = values.masked_fill(plan.hidden[start : start + step, None, :, None], 0.0)
        span = slice(start * kv_heads, (start + step) * kv_heads)
        torch.bmm(scores[span], values.view(-1, tokens, value_size), out=partial[span])
    total = torch.embedding_bag(partial.view(pairs, -1), torch.arange(pairs), plan.offsets[:-1], False, 0)[0]
    return total.view(count, kv_heads, group, value_size).div_(sums.unsqueeze(-1)).view(count, kv_heads * group, value_size)


def _pick(blocks: Tensor, plan: AttentionPlan, start: int, end: int) -> Tensor:
    """The blocks of pairs start … end − 1 in float32, [n, Hkv, B, D]: a view where they lie one after the other, else in the workspace."""
    ids = plan.ids[start:end]
    if plan.run is not None:
        return blocks[plan.run + start : plan.run + start + len(ids)].float()
    picked = _WORKSPACE.take("blocks", len(ids), *blocks.shape[1:])
    if blocks.dtype == torch.float32:
        return torch.index_select(blocks, 0, ids, out=picked)
    return picked.copy_(blocks.index_select(0, ids))


def _weigh(scores: Tensor, plan: AttentionPlan, scoring: Scoring) -> Tensor:
    """Turn scores [P, Hkv, G, B] into unnormalised softmax weights in place; the sums to divide by are [S, Hkv, G]."""
    pairs, kv_heads, group = scores.shape[:3]
    if scoring.softcap is not None:
        scores.div_(scoring.softcap).tanh_().mul_(scoring.softcap)
    scores.masked_fill_(plan.hidden[:, None, None, :], float("-inf"))
    highest = torch.segment_reduce(scores.amax(dim=-1).view(pairs, -1), "max", offsets=plan.offsets).view(-1, kv_heads, group)
    if scoring.sinks is not None:
        highest = torch.maximum(highest, scoring.sinks)
    scores.sub_(highest.index_select(0, plan.sequences).unsqueeze(-1)).exp_()
    sums = torch.segment_reduce(scores.sum(dim=-1).view(pairs, -1), "sum", offsets=plan.offsets).view(-1, kv_heads, group)
    return sums if scoring.sinks is None else sums + torch.exp(scoring.sinks - highest)


def _gather(blocks: Tensor, tile: PrefillTile) -> Tensor:
    """The tile's keys or values as [Hkv, key_end − key_start, D] float32: only seen slots, contiguous for each head."""
    heads, tokens, size = blocks.shape[1:]
    picked = blocks.index_select(0, tile.ids).transpose(0, 1).reshape(heads, len(tile.ids) * tokens, size)
    return picked[:, tile.key_start - tile.block_start : tile.key_end - tile.block_start].float()


def _prefill(rows: Tensor, key_blocks: Tensor, value_blocks: Tensor, tile: PrefillTile, scoring: Scoring) -> Tensor:
    """Scaled query rows [n, Hkv, G, D] of one tile: [n, Hq, Dv] float32."""
    count, kv_heads, group, size = rows.shape
    keys, values = _gather(key_blocks, tile), _gather(value_blocks, tile)
    query_at = torch.arange(tile.first_position, tile.first_position + count)[:, None]
    key_at = torch.arange(tile.key_start, tile.key_end)
    seen = key_at <= query_at
    if scoring.window is not None:
        seen &= key_at > query_at - scoring.window
    if scoring.softcap is None and scoring.sinks is None and value_blocks.shape[3] == size:
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
