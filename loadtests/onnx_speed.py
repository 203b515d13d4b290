"""Tokens per second of the exported graph called directly, beside the torch engine on the same checkpoint, in alternating rounds.

    python -m loadtests.onnx_speed --cache DIR [--shape llama-385m] [--quantize int8] [--batches 1 8] [--rounds 3] [--keep]

The torch side runs through router and worker, the graph in a bare loop without a scheduler, which flatters the graph a little. Both compute
greedy tokens of B random prompts; the graph takes all prompts as one rectangle. Export is not timed, opening the graph is.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import time
from pathlib import Path
from typing import Any

import numpy as np

from loadtests.engine_speed import Speed, prompts, run_ours, summary
from loadtests.rows import keep, surroundings
from loadtests.shapes import write_shape
from service.checkpoints.manifest import Manifest, read_manifest
from service.checkpoints.onnx_export import find_or_export
from service.checkpoints.onnx_graph import OnnxGraph, Rectangle
from service.engine.supervisor import WorkerBackend
from service.inputs.tokens import TokenCodec
from service.schedulers.router import Model, Router
from service.telemetry import Telemetry
from service.types.plan import LoadRequest
from service.types.settings import EngineSettings, SchedulerSettings


def run_graph(graph: OnnxGraph, manifest: Manifest, texts: list[tuple[int, ...]], generate: int) -> Speed:
    """One round: prompts at once, then one token each at a time."""
    layout = manifest.spec.kv_layout()
    batch, length = len(texts), len(texts[0])
    blocks = -(-(length + generate) // layout.block_tokens)
    tables = (1 + np.arange(batch * blocks).reshape(batch, blocks),) * len(layout.groups)
    began = time.perf_counter()
    ends = np.arange(1, batch + 1) * length - 1
    tokens = graph.logits(Rectangle(np.array(texts), np.zeros(batch, np.int64), tables, ends)).argmax(1)
    first = time.perf_counter()
    for step in range(generate - 1):
        starts = np.full(batch, length + step)
        tokens = graph.logits(Rectangle(tokens[:, None], starts, tables, np.arange(batch))).argmax(1)
    ended = time.perf_counter()
    return Speed(batch * length / (first - began), batch * (generate - 1) / (ended - first))


async def measure(options: argparse.Namespace) -> dict[str, Any]:
    """All rounds; the row."""
    directory = write_shape(options.shape, options.cache / options.shape)
    manifest = read_manifest(directory)
    exported = find_or_export(manifest, options.cache, options.quantize)
    began = time.perf_counter()
    largest = max(options.batches)
    layout = manifest.spec.kv_layout()
    blocks = largest * -(-(options.prompt + options.generate) // layout.block_tokens)
    graph = OnnxGraph(exported, layout, [blocks] * len(layout.groups))
    opened_s = time.perf_counter() - began
    load = LoadRequest(
        str(directory),
        "float32",
        max_rows=largest,
        quantize=options.quantize,
        quantize_cache=str(options.cache),
        quantize_cache_bytes=1 << 40,
    )
    settings = SchedulerSettings(batch_size=largest, prefix_cache=False)
    router = Router([Model("bench", manifest, TokenCodec.load(directory), WorkerBackend(load, EngineSettings()))], settings, Telemetry())
    await router.start()
    rows: dict[str, Any] = {}
    for batch in options.batches:
        graphs, torches = [], []
        for number in range(options.rounds + 1):
            texts = prompts(batch, options.prompt, manifest.spec.vocab_size, seed=number)
            graphs.append(run_graph(graph, manifest, texts, options.generate))
            torches.append(await run_ours(router, texts, options.generate))
        rows[str(batch)] = summary(graphs[1:], torches[1:], "torch_engine")
        print(f"B={batch}: {json.dumps(rows[str(batch)])}", flush=True)
    await router.close()
    kept = ("shape", "quantize", "prompt", "generate")
    return {
        "what": "onnx_speed",
        **{name: getattr(options, name) for name in kept},
        "open_s": round(opened_s, 2),
        **surroundings(),
        "batches": rows,
    }


def main() -> None:
    """Parse, measure, print the row, keep it when asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, required=True, help="directory for the random checkpoint and its exports")
    parser.add_argument("--shape", default="llama-385m")
    parser.add_argument("--quantize", choices=("none", "int8"), default="int8")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--generate", type=int, default=48)
    parser.add_argument("--keep", action="store_true", help="append the row to results/onnx_speed.jsonl")
    options = parser.parse_args()
    row = asyncio.run(measure(options))
    print(json.dumps(row))
    if options.keep:
        keep("onnx_speed", row)


if __name__ == "__main__":
    main()
