"""Attention over two stores against this service's own dense paged attention on a CPU: one layer, decode and prefill, longer and longer.

`python -m loadtests.sparse_speed [--threads N] [--keep]`. Both sides run turn by turn in one process on random tensors of a layer with 16
heads of 64 and 8 K/V heads; the choice of far blocks is part of the sparse side's time. Both sides are what the dispatch table chooses. It
does not know models. Invariant: every number is the median of rounds in which both sides ran after each other.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from loadtests.rows import keep, spread, surroundings
from service.kernels.dispatch import chosen, resolve
from service.kernels.paged_attention import plan_attention
from service.kernels.reference_sparse import ChosenFar, FarBlocks, near_start
from service.kernels.window_sparse import plan_sparse

BLOCK, SINKS, PARTS = 64, 1, 4


@dataclass(frozen=True)
class Layer:
    """One layer's stores for `sequences` contexts of `context` tokens, and the rule by which they are read."""

    heads: int
    kv_heads: int
    size: int
    sequences: int
    context: int
    window: int
    refresh: int
    dtype: torch.dtype

    @property
    def budget(self) -> int:
        """Far blocks that a query reads."""
        return 16 if self.context <= 32_768 else 32


class Sides:
    """The two ways to attend over the same contexts; `rows` query rows a sequence."""

    def __init__(self, layer: Layer, rows: int) -> None:
        self.layer, self.rows = layer, rows
        blocks = -(-layer.context // BLOCK)
        total = layer.sequences * blocks + 1
        generator = torch.Generator().manual_seed(1)
        shape = (total, layer.kv_heads, BLOCK, layer.size)
        self.keys, self.values = (torch.randn(shape, generator=generator).to(layer.dtype) for _ in range(2))
        order = torch.randperm(total - 1, generator=generator)[: layer.sequences * blocks] + 1
        self.tables = order.view(layer.sequences, blocks).to(torch.int32)
        self.query = torch.randn(layer.sequences * rows, layer.heads, layer.size, generator=generator).to(layer.dtype)
        self.starts = torch.arange(layer.sequences + 1, dtype=torch.int32) * rows
        self.lengths = torch.full((layer.sequences,), layer.context, dtype=torch.int32)
        self.far = self._store(total)
        ids = torch.arange(1, total)
        demote = resolve("demote", "cpu", layer.dtype)
        for start in range(0, total - 1, 256):
            demote(self.keys, self.values, self.far, ids[start : start + 256], ids[start : start + 256])
        self._dense, self._sparse, self._choose = (
            resolve(name, "cpu", layer.dtype) for name in ("paged_attention", "window_sparse_attention", "choose_far")
        )
        self._anchors()

    def _store(self, total: int) -> FarBlocks:
        layer = self.layer
        shape, scales = (total, layer.kv_heads, BLOCK, layer.size), (total, layer.kv_heads, BLOCK)
        integers = [torch.empty(shape, dtype=torch.int8) for _ in range(2)]
        units = [torch.empty(scales, dtype=torch.float16) for _ in range(2)]
        bounds = torch.empty(layer.kv_heads, total, 2, layer.size, dtype=torch.int8).transpose(0, 1)
        parts = torch.empty(total, layer.kv_heads, PARTS, 2, layer.size, dtype=torch.int8)
        return FarBlocks(*integers, *units, bounds, parts, torch.empty(layer.kv_heads, total, dtype=torch.float16).T)

    def _anchors(self) -> None:
        layer, first = self.layer, self.layer.context - self.rows
        anchors = sorted({position // layer.refresh * layer.refresh for position in range(first, layer.context)})
        ends = [near_start(anchor, layer.window, layer.refresh, BLOCK) for anchor in anchors] * layer.sequences
        at = {anchor: index for index, anchor in enumerate(anchors)}
        of_row = [at[position // layer.refresh * layer.refresh] for position in range(first, layer.context)]
        count = len(anchors)
        self.of_tokens = torch.tensor([index + count * sequence for sequence in range(layer.sequences) for index in of_row])
        rows = [max(anchor - first, 0) + sequence * self.rows for sequence in range(layer.sequences) for anchor in anchors]
        self.asking = torch.tensor(rows)
        sequences = torch.arange(layer.sequences).repeat_interleave(count)
        budgets = torch.full((len(ends),), layer.budget, dtype=torch.int32)
        self.asked = self.tables, sequences, torch.tensor(ends, dtype=torch.int32), budgets
        self.dense_plan = plan_attention(self.tables, self.starts, self.lengths, block_tokens=BLOCK, window=None)
        rule = {"window": layer.window, "refresh": layer.refresh, "sink_blocks": SINKS}
        self.sparse_plan = plan_sparse(self.tables, self.starts, self.lengths, far=self._chosen(), block_tokens=BLOCK, **rule)

    def _chosen(self) -> ChosenFar:
        choices, counts = self._choose(self.query[self.asking], self.far, *self.asked, sink_blocks=SINKS, most=self.layer.budget)
        return ChosenFar(self.far, self.tables, choices, counts, self.of_tokens, self.layer.budget)

    def dense(self) -> Tensor:
        """Plain attention over the whole context."""
        scale = self.layer.size**-0.5
        where = self.tables, self.starts, self.lengths
        out: Tensor = self._dense(self.query, self.keys, self.values, *where, scale=scale, window=None, plan=self.dense_plan)
        return out

    def sparse(self) -> Tensor:
        """Choosing, and attention over sinks, chosen blocks and the window."""
        rule = {"window": self.layer.window, "refresh": self.layer.refresh, "sink_blocks": SINKS}
        where = self.tables, self.starts, self.lengths
        scale, plan = self.layer.size**-0.5, self.sparse_plan
        out: Tensor = self._sparse(self.query, self.keys, self.values, *where, far=self._chosen(), scale=scale, plan=plan, **rule)
        return out


def timed_ms(call: Callable[[], Tensor], repeats: int) -> float:
    """Milliseconds of a call, over some repeats."""
    began = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - began) / repeats * 1e3


def compare(layer: Layer, rows: int, rounds: int) -> dict[str, object]:
    """Both sides in turn; medians and the ratio of each round."""
    sides = Sides(layer, rows)
    once = max(timed_ms(sides.dense, 1), timed_ms(sides.sparse, 1))
    repeats = max(1, int(100 / once))
    pairs = [(timed_ms(sides.dense, repeats), timed_ms(sides.sparse, repeats)) for _ in range(rounds)]
    return {
        "context": layer.context,
        "sequences": layer.sequences,
        "rows": rows,
        "refresh": layer.refresh,
        "dense_ms": spread([dense for dense, _ in pairs]),
        "sparse_ms": spread([sparse for _, sparse in pairs]),
        "ratio": spread([dense / sparse for dense, sparse in pairs]),
    }


def main() -> None:
    """Measure and print; with --keep also keep the rows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--contexts", type=int, nargs="*", default=[8192, 16_384, 131_072])
    parser.add_argument("--sequences", type=int, nargs="*", default=[1, 4])
    parser.add_argument("--slice", type=int, default=256, help="rows of the prefill slice that is measured at the first two contexts")
    parser.add_argument("--refresh", type=int, nargs="*", default=[1, 16])
    parser.add_argument("--keep", action="store_true")
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    dtype = getattr(torch, asked.dtype)
    for context in asked.contexts:
        cases = [(count, 1, 1) for count in asked.sequences if count * context <= 131_072]
        if context <= 32_768:
            cases += [(1, asked.slice, refresh) for refresh in asked.refresh]
        for sequences, rows, refresh in cases:
            layer = Layer(16, 8, 64, sequences, context, 2048, refresh, dtype)
            with torch.inference_mode():
                found = compare(layer, rows, asked.rounds)
            row = {"what": "sparse_speed", "dtype": asked.dtype, "threads": asked.threads, **found, "dispatch": chosen(), **surroundings()}
            print({key: row[key] for key in ("context", "sequences", "rows", "refresh", "dense_ms", "sparse_ms", "ratio")}, flush=True)
            if asked.keep:
                keep("sparse_speed", row)


if __name__ == "__main__":
    main()
