"""How much of full attention's mass lies in the blocks that a query reads: sinks and window, chosen far blocks, the best choice there is.

One text is read in one pass with full attention, and for every query with more candidates than it may choose the blocks that serving would
read, by the stores and kernels that serve, are weighed with the softmax weights themselves. It serves nobody. Invariant: keys, queries and
weights are those of one forward pass, and a query is measured by its position's rule alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from service.checkpoints.load import load
from service.checkpoints.long_context import adapt, dense_by_choice
from service.checkpoints.manifest import read_manifest
from service.engine.kv_pool import KvPool
from service.kernels.dispatch import resolve
from service.models.attention import DenseAttend
from service.types.kv_layout import BLOCK_TOKENS, FarSpec
from service.types.model_spec import GroupedQueryAttention, ModelSpec
from service.types.settings import AttentionSettings

# Queries whose weights exist at once: 8 MiB for a head at 8192 tokens.
TILE_ROWS = 256


class Choice(NamedTuple):
    """What the positions 0 … T − 1 read of one layer's blocks: `start` [T], the first near block behind the sinks; `budget` [T]; and
    `indices` [T, Hkv, most] int64, the chosen far blocks, −1 where there are fewer."""

    start: Tensor
    budget: Tensor
    indices: Tensor


class MeasuringAttend:
    """Full attention over `tokens` tokens of one sequence, measured on the way; `shares` has (read, best, without far) of each layer.

    Each is the mean over K/V heads and over the `rows` positions with more candidates than they may choose; layers that read everything,
    and those whose choices cover every candidate, have none.
    """

    def __init__(self, spec: ModelSpec, tokens: int) -> None:
        self._dense = DenseAttend(1, tokens, spec.layers)
        self._layers = spec.layers
        layout = spec.kv_layout()
        blocks = tokens // BLOCK_TOKENS
        self._pool = KvPool(layout, (blocks,) * len(layout.groups), torch.float32, torch.device("cpu"))
        self.shares: dict[int, tuple[float, float, float]] = {}
        self.rows = 0

    def __call__(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """query [T, Hq, D], key and value [T, Hkv, D] -> [T, Hq, D]."""
        spec = self._layers[layer].attention
        if spec.far is not None and spec.window is not None:
            self._measure(layer, spec, spec.far, (query, key, value))
        return self._dense(layer, query, key, value)

    def _measure(self, layer: int, spec: GroupedQueryAttention, far: FarSpec, heads: tuple[Tensor, Tensor, Tensor]) -> None:
        query, key, _ = heads
        choice = self._choose(layer, spec, far, heads)
        deciding = choice.start - far.sink_blocks > choice.budget
        found = torch.zeros(3, dtype=torch.float64)
        for first in range(0, len(query), TILE_ROWS):
            rows = torch.arange(first, min(first + TILE_ROWS, len(query)))[deciding[first : first + TILE_ROWS]]
            if len(rows):
                mass = _mass_by_block(query[rows], key, rows, spec)
                found += _weigh(mass, Choice(*(part[rows] for part in choice)), far.sink_blocks)
        count = int(deciding.sum())
        if count:
            read, best, near = (found / (count * spec.kv_heads)).tolist()
            self.shares[layer], self.rows = (read, best, near), count

    def _choose(self, layer: int, spec: GroupedQueryAttention, far: FarSpec, heads: tuple[Tensor, Tensor, Tensor]) -> Choice:
        query, key, value = heads
        anchors = torch.arange(0, len(query), far.refresh)
        ends = (anchors - (spec.window or 0) + 1).clamp(min=0) // BLOCK_TOKENS
        budgets = torch.tensor([far.budget(anchor) for anchor in anchors.tolist()])
        of_tokens = torch.arange(len(query)) // far.refresh
        most = int(budgets.max())
        indices = torch.full((len(anchors), spec.kv_heads, most), -1)
        if most and self._pool.far_group_of(layer) is not None:
            blocks = len(key) // BLOCK_TOKENS
            ids = torch.arange(1, blocks + 1)
            keys, values = self._pool.blocks_of(layer)
            for store, tokens in ((keys, key), (values, value)):
                store[1:] = tokens.view(blocks, BLOCK_TOKENS, *tokens.shape[1:]).transpose(1, 2)
            store_of, device = self._pool.far_of(layer), query.device
            resolve("demote", device, keys.dtype)(keys, values, store_of, ids, ids)
            where = ids[None].to(torch.int32), torch.zeros(len(anchors), dtype=torch.int64), ends.to(torch.int32), budgets.to(torch.int32)
            choose = resolve("choose_far", device, keys.dtype)
            indices = choose(query[anchors], store_of, *where, sink_blocks=far.sink_blocks, most=most)[0].long()
        return Choice(ends[of_tokens], budgets[of_tokens], indices[of_tokens])


def _mass_by_block(query: Tensor, key: Tensor, positions: Tensor, spec: GroupedQueryAttention) -> Tensor:
    """Softmax weights of query [R, Hq, D] at positions [R] on all keys [T, Hkv, D] up to theirs, summed over blocks and averaged over the
    heads of a K/V head: [R, Hkv, blocks]."""
    scale = spec.head_dim**-0.5 if spec.scale is None else spec.scale
    grouped = query.view(len(query), spec.kv_heads, -1, query.shape[2]).permute(1, 2, 0, 3)
    scores = torch.matmul(grouped, key.permute(1, 2, 0).unsqueeze(1)) * scale  # [Hkv, G, R, T]
    if spec.softcap is not None:
        scores = spec.softcap * torch.tanh(scores / spec.softcap)
    later = torch.arange(len(key)) > positions[:, None]
    weights = scores.masked_fill_(later, float("-inf")).softmax(-1).mean(1)
    return weights.view(spec.kv_heads, len(query), -1, BLOCK_TOKENS).sum(-1).transpose(0, 1)


def _weigh(mass: Tensor, choice: Choice, sinks: int) -> Tensor:
    """(mass read, the most that a choice could read, mass of sinks and window), summed over rows and heads of mass [R, Hkv, blocks]."""
    at = torch.arange(mass.shape[2])
    candidate = ((at >= sinks) & (at < choice.start[:, None]))[:, None]
    near = (mass * ~candidate).sum(-1)
    read = near + (mass.gather(2, choice.indices.clamp(min=0)) * (choice.indices >= 0)).sum(-1)
    most = choice.indices.shape[2]
    ranked = (mass * candidate).topk(most, dim=-1).values * (torch.arange(most) < choice.budget[:, None])[:, None]
    return torch.stack([part.sum() for part in (read, near + ranked.sum(-1), near)]).double()


@torch.inference_mode()
def measure_mass(directory: Path, asked: AttentionSettings, text: Sequence[int]) -> dict[str, Any]:
    """Shares of the mass for a text of whole blocks (what is left over is cut off) and a model served as `asked`, as a row keeps them.

    Layers that read all far blocks of a prompt are measured as generated tokens would read. `read_by_layer` also has the layers that are
    dense by choice, as they would read with far blocks; the means leave them out. Raises CheckpointError.
    """
    manifest = read_manifest(directory)
    spec = adapt(manifest.spec, asked)
    tokens = len(text) // BLOCK_TOKENS * BLOCK_TOKENS
    dense = dense_by_choice(spec)
    measuring = MeasuringAttend(adapt(manifest.spec, replace(asked, dense_layers=())) if dense else spec, tokens)
    decoder = load(replace(manifest, spec=spec), torch.device("cpu"), torch.float32)
    decoder.hidden(torch.tensor(text[:tokens]), torch.arange(tokens), measuring)
    shares = [share for layer, share in measuring.shares.items() if layer not in dense]
    means = [round(sum(part) / len(shares), 4) for part in zip(*shares, strict=True)] if shares else [None] * 3
    by_layer = {str(layer): round(read, 4) for layer, (read, _, _) in measuring.shares.items()}
    names = ("read", "best_possible", "without_far")
    return {"tokens": tokens, "rows": measuring.rows, **dict(zip(names, means, strict=True)), "read_by_layer": by_layer}
