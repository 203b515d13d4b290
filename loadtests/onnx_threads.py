"""Tokens per second of an exported graph by the number of its threads, called directly, in alternating rounds.

    python -m loadtests.onnx_threads --cache DIR [--shape llama-385m] [--quantize int8] [--batch 8] [--rounds 3] [--keep]

Threads run from 1 to the cores of this machine. Export and opening are not timed.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

from loadtests.engine_speed import prompts
from loadtests.onnx_speed import run_graph
from loadtests.rows import keep, spread, surroundings
from loadtests.shapes import write_shape
from service.checkpoints.manifest import read_manifest
from service.checkpoints.onnx_export import find_or_export
from service.checkpoints.onnx_graph import OnnxGraph


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """All rounds; the row."""
    manifest = read_manifest(write_shape(options.shape, options.cache / options.shape))
    exported = find_or_export(manifest, options.cache, options.quantize)
    layout = manifest.spec.kv_layout()
    blocks = options.batch * -(-(options.prompt + options.generate) // layout.block_tokens)
    counts = [blocks] * len(layout.groups)
    around = surroundings()
    graphs = {count: OnnxGraph(exported, layout, counts, count) for count in range(1, len(os.sched_getaffinity(0)) + 1)}
    found: dict[int, list[Any]] = {count: [] for count in graphs}
    for number in range(options.rounds + 1):
        texts = prompts(options.batch, options.prompt, manifest.spec.vocab_size, seed=number)
        for count, graph in graphs.items():
            found[count].append(run_graph(graph, manifest, texts, options.generate))
    threads = {
        str(count): {"prefill": spread([speed.prefill for speed in speeds[1:]]), "decode": spread([speed.decode for speed in speeds[1:]])}
        for count, speeds in found.items()
    }
    kept = ("shape", "quantize", "batch", "prompt", "generate")
    return {"what": "onnx_threads", **{name: getattr(options, name) for name in kept}, **around, "threads": threads}


def main() -> None:
    """Parse, measure, print the row, keep it when asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, required=True, help="directory for the random checkpoint and its export")
    parser.add_argument("--shape", default="llama-385m")
    parser.add_argument("--quantize", choices=("none", "int8"), default="int8")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--generate", type=int, default=16)
    parser.add_argument("--keep", action="store_true", help="append the row to results/onnx_threads.jsonl")
    options = parser.parse_args()
    row = measure(options)
    print(json.dumps(row))
    if options.keep:
        keep("onnx_threads", row)


if __name__ == "__main__":
    main()
