"""Attention over two stores on a CPU in torch: sinks, chosen far blocks and the window.

Near and far parts are computed apart and joined by their softmax sums. Near: decode rows together over (sequence, block) pairs, slices in
tiles, as in `paged_attention`. Far: rows that share a choice are packed, so that a far block is read once for refresh × G rows; scales are
folded into scores and weights. There is no loop over tokens, and none over decoding sequences. It does not know layers or who owns a block.
Invariant: what no row sees never reaches the output; rows that read nothing far are computed exactly as dense attention computes them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from service.kernels import paged_attention as paged
from service.kernels.kv_store import row_size, widened
from service.kernels.paged_attention import AttentionPlan, Partial, Scoring
from service.kernels.reference_sparse import ChosenFar, unpack_nibbles

# Far keys or values widened to float32 at once: bounds the temporaries of a step.
GATHER_BYTES = 16 << 20


@dataclass(frozen=True, slots=True)
class NearTile:
    """Consecutive query rows of one sequence and the near keys they see.

    Rows first_row … last_row − 1; `ids` [n] are blocks, of which the first `tokens` entries count; `seen` [rows, tokens] says which of them
    each row sees.
    """

    first_row: int
    last_row: int
    ids: Tensor
    tokens: int
    seen: Tensor


@dataclass(frozen=True, slots=True)
class FarRows:
    """Query rows that share choices: rows [N, r] with those of one anchor, the last repeated where there are fewer than r.

    `anchors` and `sequences` [N]; `valid` [N, r] marks rows that are no repetition.
    """

    rows: Tensor
    anchors: Tensor
    sequences: Tensor
    valid: Tensor


@dataclass(frozen=True, slots=True)
class SparsePlan:
    """What one step reads, the same for all layers of a KV group: decode rows, tiles of slices, and who reads far blocks.

    `reads_far` [T] marks the rows that read any.
    """

    decode: AttentionPlan
    tiles: tuple[NearTile, ...]
    far: tuple[FarRows, ...]
    reads_far: Tensor


def plan_sparse(
    near_tables: Tensor,
    query_starts: Tensor,
    context_lengths: Tensor,
    *,
    far: ChosenFar | None,
    block_tokens: int,
    window: int,
    refresh: int,
    sink_blocks: int,
) -> SparsePlan:
    """Find what every row of a step reads; arguments as in `window_sparse_attention`, of `far` only what layers share."""
    starts, contexts = query_starts.to(torch.int64), context_lengths.to(torch.int64)
    counts = starts[1:] - starts[:-1]
    decoding = ((counts == 1) & (contexts > 0)).nonzero().squeeze(1)
    together = len(decoding) > 1
    decoding = decoding if together else decoding[:0]
    lengths = contexts[decoding]
    first_seen = _near_starts(lengths - 1, window, refresh, block_tokens) * block_tokens
    pairs = paged.plan_pairs(near_tables[decoding], lengths, first_seen, sink_blocks=sink_blocks, block_tokens=block_tokens)
    rows = starts[:-1][decoding]
    decode = AttentionPlan(rows, pairs.sequences, pairs.ids, pairs.hidden, pairs.bias, pairs.offsets, pairs.run, ())
    tiles: list[NearTile] = []
    for sequence in (counts > (1 if together else 0)).nonzero().squeeze(1).tolist():
        first, last, shift = int(starts[sequence]), int(starts[sequence + 1]), int(contexts[sequence] - starts[sequence + 1])
        for row in range(max(first, -shift), last, paged.TILE_ROWS):
            end = min(row + paged.TILE_ROWS, last)
            positions = torch.arange(row + shift, end + shift)
            tiles.append(_near_tile(near_tables[sequence], row, positions, (window, refresh, block_tokens, sink_blocks)))
    reads_far = torch.zeros(int(starts[-1]), dtype=torch.bool)
    groups: tuple[FarRows, ...] = ()
    if far is not None and len(far.counts):
        reads_far = (far.anchors >= 0) & (far.counts[far.anchors.clamp(min=0)] > 0)
        groups = _far_rows(reads_far, far.anchors, torch.repeat_interleave(torch.arange(len(counts)), counts))
    return SparsePlan(decode, tuple(tiles), groups, reads_far)


def _near_starts(positions: Tensor, window: int, refresh: int, block_tokens: int) -> Tensor:
    """`reference_sparse.near_start` of many positions."""
    anchors = positions // refresh * refresh
    return (anchors - window + 1).clamp_(min=0) // block_tokens


def _near_tile(table: Tensor, row: int, positions: Tensor, rule: tuple[int, int, int, int]) -> NearTile:
    """The tile of the rows from `row` on that stand at `positions`."""
    window, refresh, block_tokens, sink_blocks = rule
    starts = _near_starts(positions, window, refresh, block_tokens)
    end = int(positions[-1]) + 1
    first, last = int(starts[0]), -(-end // block_tokens)
    blocks = torch.cat((torch.arange(min(sink_blocks, first)), torch.arange(first, last)))
    tokens = len(blocks) * block_tokens - (last * block_tokens - end)
    key_at = (blocks[:, None] * block_tokens + torch.arange(block_tokens)).view(-1)[:tokens]
    seen = (key_at >= starts[:, None] * block_tokens) | (key_at < sink_blocks * block_tokens)
    seen &= key_at <= positions[:, None]
    return NearTile(row, row + len(positions), table[blocks].to(torch.int64), tokens, seen)


def _far_rows(reads_far: Tensor, anchors: Tensor, sequences: Tensor) -> tuple[FarRows, ...]:
    """Rows by anchor: those that are alone, and the others padded to the longest."""
    rows = reads_far.nonzero().squeeze(1)
    if not len(rows):
        return ()
    owners, sizes = torch.unique_consecutive(anchors[rows], return_counts=True)
    firsts = rows[torch.cumsum(sizes, 0) - sizes]
    groups = []
    for these in ((sizes == 1).nonzero().squeeze(1), (sizes > 1).nonzero().squeeze(1)):
        if len(these):
            places, limit = torch.arange(int(sizes[these].max())), sizes[these, None]
            picked = firsts[these, None] + torch.minimum(places, limit - 1)
            groups.append(FarRows(picked, owners[these], sequences[firsts[these]], places < limit))
    return tuple(groups)


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
    plan: SparsePlan | None = None,
) -> Tensor:
    """See `reference_sparse.window_sparse_attention`; a `plan` made by `plan_sparse` may serve all layers of a KV group."""
    if plan is None:
        rule = {"block_tokens": key_blocks.shape[2], "window": window, "refresh": refresh, "sink_blocks": sink_blocks}
        plan = plan_sparse(near_tables, query_starts, context_lengths, far=far, **rule)
    (count, heads, size), kv_heads = query.shape, key_blocks.shape[1]
    group = heads // kv_heads
    scoring = Scoring(scale, None, softcap, None if sink_logits is None else sink_logits.float().view(kv_heads, group))
    packed = (query.float() * scale).view(count, kv_heads, group, size)
    shape = (count, kv_heads, group)
    near = Partial(packed.new_zeros(*shape, row_size(value_blocks)), packed.new_ones(shape), packed.new_zeros(shape))
    if len(plan.decode.rows):
        _put(near, plan.decode.rows, paged.attend_pairs(packed[plan.decode.rows], key_blocks, value_blocks, plan.decode, scoring))
    for tile in plan.tiles:
        rows = slice(tile.first_row, tile.last_row)
        exact = not bool(plan.reads_far[rows].any())
        _put(near, rows, _near_part(packed[rows], key_blocks, value_blocks, tile, scoring, whole=exact))
    if far is not None:
        for sharing in plan.far:
            _join(near, sharing, _far_part(packed, far, sharing, scoring))
    return (near.total / near.sums.unsqueeze(-1)).view(count, heads, row_size(value_blocks)).to(query.dtype)


def _put(parts: Partial, rows: Tensor | slice, found: Partial) -> None:
    for whole, part in zip(parts, found, strict=True):
        whole[rows] = part


def _near_part(query: Tensor, key_blocks: Tensor, value_blocks: Tensor, tile: NearTile, scoring: Scoring, *, whole: bool) -> Partial:
    """Scaled rows [n, Hkv, G, D] over the tile's near keys. `whole`: nothing will be joined, so the sums need not be known."""
    count, kv_heads, group, size = query.shape
    keys, values = (_in_order(blocks, tile) for blocks in (key_blocks, value_blocks))
    if whole and scoring.softcap is None and scoring.sinks is None and values.shape[2] == size:
        if count == 1:
            total = paged.lone_row(query, keys, values).view(1, kv_heads, group, -1)
        else:
            rows = query.permute(1, 2, 0, 3).reshape(1, kv_heads * group, count, size)
            mixed = scaled_dot_product_attention(rows, keys[None], values[None], attn_mask=tile.seen, scale=1.0, enable_gqa=True)
            total = mixed[0].view(kv_heads, group, count, -1).permute(2, 0, 1, 3)
        return Partial(total, total.new_ones(total.shape[:3]), total.new_zeros(total.shape[:3]))
    scores = torch.matmul(query.permute(1, 2, 0, 3).reshape(kv_heads, group * count, size), keys.transpose(1, 2))
    scores = _capped(scores, scoring).view(kv_heads, group, count, -1).masked_fill_(~tile.seen, float("-inf"))
    highest = scores.amax(dim=-1)
    if scoring.sinks is not None:
        highest = torch.maximum(highest, scoring.sinks.unsqueeze(-1))
    weights = scores.sub_(highest.unsqueeze(-1)).exp_()
    sums = weights.sum(dim=-1)
    if scoring.sinks is not None:
        sums = sums + torch.exp(scoring.sinks.unsqueeze(-1) - highest)
    total = torch.matmul(weights.view(kv_heads, group * count, -1), values).view(kv_heads, group, count, -1)
    return Partial(total.permute(2, 0, 1, 3), sums.permute(2, 0, 1), highest.permute(2, 0, 1))


def _in_order(blocks: Tensor, tile: NearTile) -> Tensor:
    """The tile's keys or values [Hkv, tokens, D] float32."""
    picked = blocks.index_select(0, tile.ids).transpose(0, 1).flatten(1, 2)
    return widened(picked[:, : tile.tokens])


def _capped(scores: Tensor, scoring: Scoring) -> Tensor:
    return scores if scoring.softcap is None else scores.div_(scoring.softcap).tanh_().mul_(scoring.softcap)


def _far_part(query: Tensor, far: ChosenFar, rows: FarRows, scoring: Scoring) -> Partial:
    """Scaled rows [T, Hkv, G, D] over their chosen far blocks: the parts are [N, r, Hkv, G, …]."""
    kv_heads, group, size = query.shape[1:]
    store, (count, packed) = far.blocks, rows.rows.shape
    tokens, value_size = store.keys.shape[2], store.values.shape[3] * (2 if store.values.dtype == torch.uint8 else 1)
    most = int(far.counts[rows.anchors].max())
    step = max(1, GATHER_BYTES // (kv_heads * most * tokens * max(size, value_size) * 4))
    found = []
    for start in range(0, count, step):
        these, anchors = rows.rows[start : start + step], rows.anchors[start : start + step]
        counts, number = far.counts[anchors].long(), len(anchors)
        width = int(counts.max())
        unused = torch.arange(width) >= counts[:, None]
        indices = far.choices[anchors, :, :width].long()
        indices = torch.where(unused[:, None], indices[:, :, :1], indices)
        ids = far.tables[rows.sequences[start : start + step, None, None], indices].long()
        flat = (ids * kv_heads + torch.arange(kv_heads)[:, None]).view(-1)
        asked = query[these].permute(0, 2, 1, 3, 4).reshape(number * kv_heads, packed * group, size)
        keys, key_scales = _widened(store.keys, store.key_scales, flat, (number * kv_heads, width * tokens))
        scores = torch.bmm(asked, keys.transpose(1, 2))
        if key_scales is not None:
            scores *= key_scales.unsqueeze(1)
        scores = _capped(scores, scoring).view(number, kv_heads, packed * group, width, tokens)
        scores.masked_fill_(unused[:, None, None, :, None], float("-inf"))
        scores = scores.view(number * kv_heads, packed * group, width * tokens)
        highest = scores.amax(dim=-1)
        weights = scores.sub_(highest.unsqueeze(-1)).exp_()
        sums = weights.sum(dim=-1)
        values, value_scales = _widened(store.values, store.value_scales, flat, (number * kv_heads, width * tokens))
        if value_scales is not None:
            weights *= value_scales.unsqueeze(1)
        total = torch.bmm(weights, values)
        heads = (number, kv_heads, packed, group)
        parts = total.view(*heads, value_size), sums.view(heads), highest.view(heads)
        found.append(Partial(*(part.transpose(1, 2) for part in parts)))
    return Partial(*(torch.cat(parts) for parts in zip(*found, strict=True)))


def _widened(stored: Tensor, scales: Tensor | None, flat: Tensor, shape: tuple[int, int]) -> tuple[Tensor, Tensor | None]:
    """Far keys or values of (block, head) pairs `flat` as float32 [n, tokens, D] without their scales, and the scales [n, tokens]."""
    picked = stored.flatten(0, 1).index_select(0, flat)
    units = unpack_nibbles(picked) if stored.dtype == torch.uint8 else picked
    found = units.float().view(*shape, -1)
    return found, None if scales is None else scales.flatten(0, 1).index_select(0, flat).float().view(shape)


def _join(near: Partial, rows: FarRows, far: Partial) -> None:
    """Add what rows read of the far store to their near parts, in place."""
    at = rows.rows[rows.valid]
    theirs, mine = (Partial(*(part[index] for part in parts)) for parts, index in ((far, rows.valid), (near, at)))
    highest = torch.maximum(mine.highest, theirs.highest)
    ours, new = torch.exp(mine.highest - highest), torch.exp(theirs.highest - highest)
    total = mine.total * ours.unsqueeze(-1) + theirs.total * new.unsqueeze(-1)
    _put(near, at, Partial(total, mine.sums * ours + theirs.sums * new, highest))
