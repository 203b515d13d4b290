"""Decode steps of a whole model far into a context, with full attention and with a window and far blocks, in one process.

`python -m loadtests.sparse_decode DIR [--contexts 16384 131072] [--quantize int8 --kv_cache_dtype bfloat16] [--keep]`: DIR is a checkpoint
directory (`loadtests.shapes` writes random ones). The context is not computed: blocks are filled with random keys and values, which take
the same time to read. It does not know HTTP or schedulers. Invariant: both sides of all contexts take turns, a step each, over weights that
each loads.
"""

from __future__ import annotations

import argparse
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from loadtests.rows import keep, spread, surroundings
from service.checkpoints.load import Quantisation, load
from service.checkpoints.long_context import adapt
from service.checkpoints.manifest import Manifest, read_manifest
from service.engine.batch import Tables
from service.engine.kv_pool import KvPool
from service.engine.sampler import Sampler
from service.engine.torch_backend import TorchBackend
from service.kernels.dispatch import chosen
from service.models.decoder import Decoder
from service.types.kv_layout import KvLayout
from service.types.plan import BatchPlan, BlockAppend, OpenSequence, Slice, Want
from service.types.request import Sampling, Stop
from service.types.settings import AttentionSettings


class Side:
    """One way to serve the weights, with one sequence of `context` tokens in its tables and a cache of type `kept`."""

    def __init__(self, decoder: Decoder, kept: torch.dtype, context: int, steps: int) -> None:
        spec = decoder.spec
        layout = spec.kv_layout()
        blocks = tuple(layout.entries(group, context + steps) + 1 for group in layout.groups)
        pool = KvPool(layout, blocks, kept, torch.device("cpu"), compute=torch.float32)
        idle = threading.Event()
        idle.set()
        pool.populate(idle).join()  # as served: blocks lie in pages of 2 MiB
        self.kv_bytes = layout.sequence_bytes(context, kept.itemsize)
        _fill(pool, layout)
        tables = Tables(layout, blocks, 1, context + steps + 1, spec.vocab_size)
        self.position = context - 1
        self._backend = TorchBackend(decoder, pool, tables, Sampler(1, spec.vocab_size))
        opening = OpenSequence(0, (1,) * context, context, Sampling(temperature=0.0), Stop(max_tokens=steps, ignore_eos=True))
        appends = []
        for index, group in enumerate(layout.groups):
            first = layout.first_read(group, 0)
            appends.append(BlockAppend(0, index, first, tuple(range(1 + first, 1 + layout.entries(group, context + steps)))))
        self._next = BatchPlan(0, open=(opening,), append=tuple(appends))

    def step_ms(self) -> float:
        """One decode step."""
        plan = replace(self._next, slices=(Slice(0, self.position, 1, int(Want.TOKEN)),))
        self.position += 1
        self._next = BatchPlan(0)
        return self._backend.execute(plan).execute_s * 1e3


def _fill(pool: KvPool, layout: KvLayout) -> None:
    """Random keys and values in every near block, and all far blocks made of some of them."""
    first = pool.blocks_of(0)[0]
    noise = torch.randn(first.shape[1:], generator=torch.Generator().manual_seed(0)).to(first.dtype)
    for index, group in enumerate(layout.groups):
        if group.source is None:
            for layer in group.layers:
                for blocks in pool.blocks_of(layer):
                    blocks.copy_(noise.expand_as(blocks))
                    blocks *= torch.rand(len(blocks), 1, 1, 1) + 0.5
            continue
        count = len(pool.far_of(group.layers[0]).keys) - 1
        near = len(pool.blocks_of(group.layers[0])[0]) - 1
        for start in range(0, count, 128):
            targets = torch.arange(start, min(start + 128, count)) + 1
            pool.demote(index, (targets - 1) % near + 1, targets)


def sides_of(asked: argparse.Namespace, manifest: Manifest, context: int) -> dict[str, Side]:
    """Window and far blocks, and full attention where it is asked for at that context."""
    positions = max(context + asked.steps + 2, manifest.spec.context_tokens)
    longer = "keep" if positions > manifest.spec.context_tokens else "auto"
    full = AttentionSettings(max_position_embeddings=positions, rope_scaling=longer)
    asks = {"sparse": replace(full, attention_window=2048)} | ({"dense": full} if context <= asked.dense_until else {})
    sides = {}
    for name, ask in asks.items():
        served = replace(manifest, spec=adapt(manifest.spec, ask))
        decoder = load(served, torch.device("cpu"), torch.float32, quantisation=Quantisation(asked.quantize))
        sides[name] = Side(decoder, getattr(torch, asked.kv_cache_dtype), context, asked.steps + 2)
    return sides


def measured(asked: argparse.Namespace, manifest: Manifest) -> list[dict[str, Any]]:
    """A row for each context; `of_shortest` is how fast a sparse step is there, the shortest context's being 1."""
    sides = {context: sides_of(asked, manifest, context) for context in sorted(asked.contexts)}
    every = [(context, name, side) for context, found in sides.items() for name, side in found.items()]
    for *_, side in every:
        side.step_ms()
    times: dict[tuple[int, str], list[float]] = {(context, name): [] for context, name, _ in every}
    for _ in range(asked.steps):
        for context, name, side in every:
            times[context, name].append(side.step_ms())
    shortest = times[min(sides), "sparse"]

    def ratio(ours: list[float], theirs: list[float]) -> dict[str, float]:
        return spread([other / mine for mine, other in zip(ours, theirs, strict=True)])

    return [
        {
            "what": "sparse_decode",
            "model": asked.directory.name,
            "quantize": asked.quantize,
            "kv_cache_dtype": asked.kv_cache_dtype,
            "context": context,
            "threads": asked.threads,
            **{f"{name}_ms": spread(times[context, name]) for name in found},
            **({"ratio": ratio(times[context, "sparse"], times[context, "dense"])} if "dense" in found else {}),
            "of_shortest": ratio(times[context, "sparse"], shortest),
            "kv_bytes": {name: side.kv_bytes for name, side in found.items()},
            "dispatch": chosen(),
            **surroundings(),
        }
        for context, found in sides.items()
    ]


def main() -> None:
    """Measure and print; with --keep also keep the rows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--contexts", type=int, nargs="*", default=[16_384, 131_072])
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--dense_until", type=int, default=131_072, help="longest context at which full attention is measured too")
    parser.add_argument("--quantize", choices=("none", "int8", "int4"), default="none")
    parser.add_argument("--kv_cache_dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--keep", action="store_true")
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    manifest = read_manifest(asked.directory)
    for row in measured(asked, manifest):
        print({key: value for key, value in row.items() if key not in ("dispatch",)}, flush=True)
        if asked.keep:
            keep("sparse_decode", row)


if __name__ == "__main__":
    main()
