"""How much of full attention's mass lies in the blocks that are read: sinks, window and chosen far blocks, against the best choice.

`python -m loadtests.page_recall DIR [--tokens 2048] [--window 256] [--far_blocks 4] [--refresh 1 16 64] [--keep]` reads one text with full
attention and, for every query with more candidates than it may choose, compares the blocks that the service would read with the softmax
weights themselves. It does not serve. Invariant: keys, queries and weights are those of the same forward pass.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor

from loadtests.rows import keep, surroundings
from service.checkpoints.load import load
from service.checkpoints.manifest import read_manifest
from service.cli.quality import library_lines, scored_text
from service.inputs.tokens import TokenCodec
from service.kernels.far_store import choose_far, demote
from service.kernels.reference_sparse import FarBlocks, near_start
from service.models.attention import DenseAttend
from service.types.kv_layout import BLOCK_TOKENS
from service.types.model_spec import ModelSpec

SINKS, PARTS = 1, 4


class Measuring:
    """Full attention that also sums, for each refresh, the mass that would be read, and the most that so many blocks could hold."""

    def __init__(self, spec: ModelSpec, tokens: int, window: int, budget: int, refreshes: list[int]) -> None:
        self._dense = DenseAttend(1, tokens, spec.layers)
        self._layers = spec.layers
        self._window, self._budget = window, budget
        self.mass = {refresh: torch.zeros(len(spec.layers), 3, dtype=torch.float64) for refresh in refreshes}
        self.rows = 0

    def __call__(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Full attention of the layer, measured on the way."""
        spec = self._layers[layer].attention
        by_block = _mass_by_block(query, key, spec.head_dim**-0.5 if spec.scale is None else spec.scale)
        far = _stored(key, value)
        for refresh, found in self.mass.items():
            found[layer] = self._read(query, far, by_block, refresh)
        return self._dense(layer, query, key, value)

    def _read(self, query: Tensor, far: FarBlocks, by_block: Tensor, refresh: int) -> Tensor:
        """(mass read, the most that could be, mass of sinks and window) of by_block [Hkv, T, blocks], means over rows that must choose."""
        tokens, blocks = query.shape[0], by_block.shape[2]
        anchors = torch.arange(0, tokens, refresh)
        ends = torch.tensor([near_start(int(anchor), self._window, refresh, BLOCK_TOKENS) for anchor in anchors], dtype=torch.int32)
        table, sequences = torch.arange(blocks, dtype=torch.int32)[None], torch.zeros(len(anchors), dtype=torch.int64)
        budgets = torch.full((len(anchors),), self._budget, dtype=torch.int32)
        choices, _ = choose_far(query[anchors], far, table, sequences, ends, budgets, sink_blocks=SINKS, most=self._budget)
        of_tokens = torch.arange(tokens) // refresh
        start = ends[of_tokens].long()
        deciding = start - SINKS > self._budget
        at = torch.arange(blocks)
        candidate = (at >= SINKS) & (at < start[:, None])
        near = (by_block * ~candidate).sum(-1)
        chosen = choices[of_tokens].permute(1, 0, 2).long()
        read = near + (by_block.gather(2, chosen.clamp(min=0)) * (chosen >= 0)).sum(-1)
        best = near + (by_block * candidate).topk(self._budget, dim=-1).values.sum(-1)
        self.rows = int(deciding.sum())
        return torch.stack([found[:, deciding].mean() for found in (read, best, near)]).double()


def _mass_by_block(query: Tensor, key: Tensor, scale: float) -> Tensor:
    """Softmax weights of full attention summed over blocks and averaged over the heads of a K/V head: [Hkv, T, blocks]."""
    tokens, kv_heads = query.shape[0], key.shape[1]
    group = query.shape[1] // kv_heads
    visible = torch.ones(tokens, tokens, dtype=torch.bool).tril()
    found = []
    for head in range(kv_heads):
        mass = torch.zeros(tokens, tokens)
        for member in range(group):
            scores = query[:, head * group + member].float() @ key[:, head].float().T * scale
            mass += scores.masked_fill(~visible, float("-inf")).softmax(-1) / group
        found.append(mass.view(tokens, -1, BLOCK_TOKENS).sum(-1))
    return torch.stack(found)


def _stored(key: Tensor, value: Tensor) -> FarBlocks:
    """All blocks of a sequence, demoted to int8."""
    keys, values = (x.float().view(-1, BLOCK_TOKENS, *x.shape[1:]).transpose(1, 2).contiguous() for x in (key, value))
    count, heads, _, size = keys.shape
    integers = [torch.empty(x.shape, dtype=torch.int8) for x in (keys, values)]
    scales = [torch.empty(count, heads, BLOCK_TOKENS, dtype=torch.float16) for _ in range(2)]
    bounds = torch.empty(count, heads, 1 + PARTS, 2, size, dtype=torch.int8)
    far = FarBlocks(*integers, *scales, bounds, torch.empty(count, heads, dtype=torch.float16))
    demote(keys, values, far, torch.arange(count), torch.arange(count))
    return far


def main() -> None:
    """Measure and print; with --keep also keep the row."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--window", type=int, default=256)
    parser.add_argument("--far_blocks", type=int, default=4)
    parser.add_argument("--refresh", type=int, nargs="*", default=[1, 16, 64])
    parser.add_argument("--keep", action="store_true")
    asked = parser.parse_args()
    manifest = read_manifest(asked.directory)
    tokens = asked.tokens // BLOCK_TOKENS * BLOCK_TOKENS
    text = scored_text(TokenCodec.load(asked.directory), library_lines(), tokens)
    decoder = load(manifest, torch.device("cpu"), torch.float32)
    measuring = Measuring(manifest.spec, tokens, asked.window, asked.far_blocks, asked.refresh)
    with torch.inference_mode():
        decoder.hidden(torch.tensor(text), torch.arange(tokens), measuring)
    shares = {
        str(refresh): {
            "read": round(float(found[:, 0].mean()), 4),
            "best_possible": round(float(found[:, 1].mean()), 4),
            "without_far": round(float(found[:, 2].mean()), 4),
            "read_by_layer": [round(float(share), 4) for share in found[:, 0]],
        }
        for refresh, found in measuring.mass.items()
    }
    settings = {"tokens": tokens, "window": asked.window, "far_blocks": asked.far_blocks, "rows": measuring.rows}
    row = {"what": "page_recall", "model": manifest.digest[:12], **settings, "mass_by_refresh": shares, **surroundings()}
    print(row)
    if asked.keep:
        keep("page_recall", row)


if __name__ == "__main__":
    main()
