"""Tokens per second of the loop and a worker without HTTP, beside another engine on the same weights, in alternating rounds.

    python -m loadtests.engine_speed --shape llama-385m --cache DIR [--quantize int8|int4] [--dtype float32] [--rounds 3] [--batches 1 8 32]
        [--kv_cache_dtype bfloat16] [--attention_window 2048 [--far_blocks 16] [--far_refresh 16]]
        [--peer transformers|served|none] [--peer openvino|llamacpp|vllm --peer_python PYTHON --peer_model EXPORTED] [--keep]

Each round asks for B sequences of `--prompt` random tokens and `--generate` greedy ones (ends ignored). Prefill is prompt tokens over the
time to the last first token, in which sequences that were read before decode too; decode is the tokens that came after that over the
time from there to the end. Rows of before 2026-11-29 17:00 counted all tokens but the first of each sequence over that time: 3 % too
many at 8 sequences, 10 % at 32. The machine's limits (memory read, float32 and int8 product rate) are measured before the first and
after the last round.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from loadtests.peers import ChildPeer, Peer, Speed, TransformersPeer
from loadtests.rows import keep, spread, surroundings
from loadtests.served_peer import ServedPeer
from loadtests.shapes import write_shape
from service.checkpoints.long_context import adapt
from service.checkpoints.manifest import read_manifest
from service.checkpoints.quantisation import weight_bytes
from service.cli.local_engine import arrivals, round_of
from service.engine.supervisor import WorkerBackend
from service.inputs.tokens import TokenCodec
from service.kernels.dispatch import resolve
from service.kernels.quantised import quantise_weight
from service.schedulers.router import Model, Router
from service.telemetry import Telemetry
from service.types.model_spec import ELEMENT_BYTES, ModelSpec
from service.types.plan import LoadRequest
from service.types.request import GenerationRequest, Sampling, Stop
from service.types.settings import AttentionSettings, EngineSettings, SchedulerSettings

# Between the sides of a round: threads of some runtimes go on looking for work for 0.2 s, and would take the other side's first step.
REST_S = 0.5


def prompts(count: int, length: int, vocabulary: int, seed: int) -> list[tuple[int, ...]]:
    """Different random prompts, so that no prefix is shared."""
    draw = np.random.default_rng(seed)
    return [tuple(int(token) for token in draw.integers(2, vocabulary, length)) for _ in range(count)]


async def run_ours(router: Router, texts: list[tuple[int, ...]], generate: int) -> Speed:
    """One round through the router, after a rest."""
    await asyncio.sleep(REST_S)
    began = time.perf_counter()
    sampling = Sampling(temperature=0.0)
    requests = [GenerationRequest("bench", "bench", text, Stop(generate, ignore_eos=True), sampling) for text in texts]
    found = await asyncio.gather(*(arrivals(stream) for stream in router.submit(requests)))
    spent = round_of(began, sum(len(text) for text in texts), found)
    return Speed(spent.prefill, spent.decode)


def machine_limits() -> dict[str, float]:
    """Best of some rounds: a memory read (GB/s) and products of 2048, float32 by oneDNN (GFLOP/s) and int8 as served (GOP/s)."""
    data, matrix = torch.empty(64 << 20).fill_(1.0), torch.randn(2048, 2048)
    packed = resolve("pack_linear", "cpu", torch.float32)(matrix)
    quantised = resolve("pack_quantised", "cpu", torch.float32)(quantise_weight(matrix, "int8"))

    def best(work: Any, rounds: int = 8) -> float:
        times = []
        for _ in range(rounds):
            began = time.perf_counter()
            work()
            times.append(time.perf_counter() - began)
        return min(times)

    return {
        "read_gb_s": round(data.numel() * 4 / best(data.sum) / 1e9, 2),
        "product_gflop_s": round(2 * 2048**3 / best(lambda: packed.apply(matrix)) / 1e9, 1),
        "int8_gop_s": round(2 * 2048**3 / best(lambda: quantised.apply(matrix)) / 1e9, 1),
    }


async def measure(options: argparse.Namespace) -> dict[str, Any]:
    """All rounds of all batches; the row."""
    directory = write_shape(options.shape, options.cache / options.shape)
    attention = AttentionSettings(options.attention_window, far_blocks=options.far_blocks, far_refresh=options.far_refresh)
    read = read_manifest(directory)
    manifest = replace(read, spec=adapt(read.spec, attention))
    limits = machine_limits()
    largest = max(options.batches)
    load = LoadRequest(
        str(directory),
        options.dtype,
        threads=options.threads,
        max_rows=largest,
        max_step_tokens=options.step_tokens,
        context_tokens=options.context,
        quantize=options.quantize,
        quantize_cache=str(options.cache),
        quantize_cache_bytes=1 << 40,
        kv_cache_dtype=options.kv_cache_dtype,
        attention=attention,
    )
    settings = SchedulerSettings(batch_size=largest, step_tokens=options.step_tokens, prefix_cache=False, run_ahead=options.run_ahead)
    backend = WorkerBackend(load, EngineSettings(threads=options.threads, step_deadline_s=600.0))
    router = Router([Model("bench", manifest, TokenCodec.load(directory), backend)], settings, Telemetry())
    await router.start()
    info = router.versions()[0].info
    peer = start_peer(options, directory)
    rows: dict[str, Any] = {}
    for batch in options.batches:
        ours: list[Speed] = []
        theirs: list[Speed] = []
        for number in range(options.rounds + 1):
            texts = prompts(batch, options.prompt, manifest.spec.vocab_size, seed=number)
            ours.append(await run_ours(router, texts, options.generate))
            if peer is not None:
                await asyncio.sleep(REST_S)
                theirs.append(peer.run(texts, options.generate))
        rows[str(batch)] = summary(ours[1:], theirs[1:], options.peer)
        print(f"B={batch}: {json.dumps(rows[str(batch)])}", flush=True)
    await router.close()
    if peer is not None:
        peer.close()
    after = machine_limits()
    best = {key: max(limits[key], after[key]) for key in limits}
    return {
        "what": "engine_speed",
        "shape": options.shape,
        "dtype": info.dtype if info else "",
        "quantize": options.quantize,
        "kv_cache_dtype": info.kv_cache_dtype if info else "",
        "attention": {name: getattr(options, name) for name in ("attention_window", "far_blocks", "far_refresh")},
        "peer": options.peer,
        "peer_about": peer.about if peer is not None else {},
        "memory_bytes": dict(info.memory_bytes) if info else {},
        "phases_s": {name: round(seconds, 2) for name, seconds in info.phases_s} if info else {},
        "dispatch": dict(info.dispatch) if info else {},
        "prompt": options.prompt,
        "generate": options.generate,
        "step_tokens": options.step_tokens,
        "run_ahead": options.run_ahead,
        **surroundings(),
        "torch": torch.__version__,
        "machine": best,
        "limit_tokens_per_s": limits_of(manifest.spec, options, best, ELEMENT_BYTES.get(info.kv_cache_dtype if info else "", 4)),
        "batches": rows,
    }


def start_peer(options: argparse.Namespace, directory: Path) -> Peer | None:
    """The engine to run beside ours, or None."""
    if options.peer == "transformers":
        return TransformersPeer(directory)
    if options.peer == "served":
        return ServedPeer(directory, options.cache, served_flags(options))
    if options.peer in ("openvino", "llamacpp", "vllm"):
        threads = options.threads or len(os.sched_getaffinity(0))
        script = Path(__file__).with_name(f"{options.peer}_peer.py")
        return ChildPeer(script, options.peer_python, options.peer_model, threads, options.step_tokens)
    return None


def served_flags(options: argparse.Namespace) -> list[str]:
    """What makes the service do what the bare engine here does."""
    same = ("dtype", "threads", "quantize", "kv_cache_dtype", "step_tokens", "run_ahead", "attention_window", "far_blocks", "far_refresh")
    flags = {name: getattr(options, name) for name in same} | {"context_tokens": options.context, "batch_size": max(options.batches)}
    fixed = {"backend": "torch", "prefix_cache": "false", "registry": "none", "access_log": "false"}
    return [word for name, value in (flags | fixed).items() for word in (f"--{name}", str(value))]


def limits_of(spec: ModelSpec, options: argparse.Namespace, machine: dict[str, float], kept_bytes: int) -> dict[str, float]:
    """Tokens a second that the machine's memory and products allow: one decoding sequence, many, and a prompt.

    `kept_bytes` is the size of a cached element.
    """
    context = options.prompt + options.generate / 2
    plain = options.quantize == "none"
    read = spec.bytes_read(1, context, 4, kept_bytes) + weight_bytes(spec, 4, options.quantize) - 4 * spec.parameters
    rate = machine["product_gflop_s" if plain else "int8_gop_s"] * 1e9
    return {
        "decode_1_of_read": round(machine["read_gb_s"] * 1e9 / read, 1),
        "decode_of_product": round(rate / spec.flops(1, context), 1),
        "prefill_of_product": round(rate / spec.flops(options.prompt, options.prompt / 2, 1) * options.prompt, 1),
    }


def summary(ours: list[Speed], theirs: list[Speed], peer: str) -> dict[str, Any]:
    """Medians and spreads of both sides, and the ratio of pairs."""
    row: dict[str, Any] = {
        "prefill": spread([speed.prefill for speed in ours]),
        "decode": spread([speed.decode for speed in ours]),
    }
    if theirs:
        row[f"{peer}_prefill"] = spread([speed.prefill for speed in theirs])
        row[f"{peer}_decode"] = spread([speed.decode for speed in theirs])
        row["prefill_ratio"] = spread([mine.prefill / other.prefill for mine, other in zip(ours, theirs, strict=True)])
        row["decode_ratio"] = spread([mine.decode / other.decode for mine, other in zip(ours, theirs, strict=True)])
    return row


def main() -> None:
    """Parse, measure, print the row, keep it when asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="llama-385m")
    parser.add_argument("--cache", type=Path, required=True, help="directory for the random checkpoint (1.5 GB for llama-385m)")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--generate", type=int, default=48)
    parser.add_argument("--step_tokens", type=int, default=512)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--run_ahead", default="auto", choices=("auto", "always", "never"))
    parser.add_argument("--context", type=int, default=0, help="longest sequence, 0 for the shape's own")
    parser.add_argument("--quantize", choices=("none", "int8", "int4"), default="none")
    parser.add_argument("--kv_cache_dtype", default="auto", help="as of deepseek-serve")
    parser.add_argument("--attention_window", type=int, default=0, help="as of deepseek-serve, like the next two")
    parser.add_argument("--far_blocks", type=int, default=0)
    parser.add_argument("--far_refresh", type=int, default=0)
    parser.add_argument("--peer", choices=("transformers", "served", "openvino", "llamacpp", "vllm", "none"), default="transformers")
    parser.add_argument("--peer_python", default="", help="the Python of the environment that the peer is installed in")
    parser.add_argument("--peer_model", default="", help="the model exported for it: a directory, or for llamacpp a GGUF file")
    parser.add_argument("--keep", action="store_true", help="append the row to results/engine_speed.jsonl")
    options = parser.parse_args()
    row = asyncio.run(measure(options))
    print(json.dumps(row))
    if options.keep:
        keep("engine_speed", row)


if __name__ == "__main__":
    main()
