"""What `--deterministic` costs: prefill and decode of one model with it and without, in alternating rounds of two workers, without HTTP.

    python -m loadtests.deterministic_price --cache DIR [--shape llama-60m] [--dtype float32 bfloat16] [--batches 1 8 32] [--rounds 5]
        [--prompt 128] [--attention_window N] [--keep]

With a window its layers read it and far blocks, as v5.2's do.

A round is `--prompt` random tokens for each of B sequences and `--generate` greedy ones. The price is the ratio of times (deterministic
over plain) in rounds that follow each other, so that whatever else the machine does meets both.
"""

from __future__ import annotations

import argparse
import asyncio
from pathlib import Path
from typing import Any

import numpy as np

from loadtests.rows import keep, spread, surroundings
from loadtests.shapes import SHAPES, write_shape
from service.cli.local_engine import LocalEngine, Round
from service.types.settings import AttentionSettings, EngineSettings, SchedulerSettings


def prompts(count: int, length: int, vocabulary: int, seed: int) -> list[tuple[int, ...]]:
    """Different random prompts, so that no prefix is shared."""
    draw = np.random.default_rng(seed)
    return [tuple(int(token) for token in draw.integers(2, vocabulary, length)) for _ in range(count)]


async def measure(asked: argparse.Namespace, directory: Path, dtype: str) -> dict[str, Any]:
    """Speeds of both sides and the price of one dtype, for every batch size."""
    scheduler = SchedulerSettings(batch_size=max(asked.batches))
    context = max(2048, asked.prompt + asked.generate)
    sides = {
        name: EngineSettings(dtype=dtype, device="cpu", context_tokens=context, deterministic=name == "deterministic") for name in SIDES
    }
    attention = AttentionSettings(attention_window=asked.attention_window)
    found: dict[str, Any] = {}
    async with (
        LocalEngine(directory, sides["plain"], scheduler, attention) as plain,
        LocalEngine(directory, sides["deterministic"], scheduler, attention) as other,
    ):
        engines = {"plain": plain, "deterministic": other}
        for batch in asked.batches:
            texts = prompts(batch, asked.prompt, SHAPES[asked.shape]["vocab"], batch)
            rounds: dict[str, list[Round]] = {name: [] for name in SIDES}
            for number in range(asked.rounds + 1):
                for name, engine in engines.items():
                    made = await engine.generate(texts, asked.generate)
                    if number:
                        rounds[name].append(made)
            found[str(batch)] = {
                kind: {
                    **{name: spread([getattr(made, kind) for made in rounds[name]]) for name in SIDES},
                    "price": spread([getattr(a, kind) / getattr(b, kind) for a, b in zip(*rounds.values(), strict=True)]),
                }
                for kind in ("prefill", "decode")
            }
    return found


SIDES = ("plain", "deterministic")


def main() -> None:
    """Measure and print; with --keep also keep the row."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cache", type=Path, required=True)
    parser.add_argument("--shape", default="llama-60m", choices=tuple(SHAPES))
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--generate", type=int, default=32)
    parser.add_argument("--attention_window", type=int, default=0)
    parser.add_argument("--keep", action="store_true", help="append the row to results/deterministic_price.jsonl")
    asked = parser.parse_args()
    directory = write_shape(asked.shape, asked.cache / asked.shape)
    for dtype in asked.dtype:
        found = asyncio.run(measure(asked, directory, dtype))
        settings = {"shape": asked.shape, "dtype": dtype, "prompt": asked.prompt, "generate": asked.generate}
        settings |= {"attention_window": asked.attention_window}
        row = {"what": "deterministic_price", **settings, "batches": found, **surroundings()}
        for batch, kinds in found.items():
            for kind, speeds in kinds.items():
                values = "  ".join(f"{name} {speeds[name]['median']:.1f}" for name in SIDES)
                print(f"{dtype} B={batch} {kind}: {values} tokens/s, price {speeds['price']}", flush=True)
        if asked.keep:
            keep("deterministic_price", row)


if __name__ == "__main__":
    main()
