"""Micro-benchmark of the CPU kernels: prints a table and, with --keep, appends one row a measurement to results/kernels_cpu.jsonl.

    python -m loadtests.kernels_cpu [--seconds 0.5] [--threads N] [--keep]

Shapes are those of a llama of 385 million parameters: hidden 1280, 20 heads, 4 K/V heads, head_dim 64, MLP 3456, vocabulary 32000. Inputs
are random and rotate through several copies, so that weights come from memory and not from a cache. A row's `limit` is what the machine
itself gave in the same run: bytes over read bandwidth, or operations over the speed of a large float32 matrix product, whichever takes
longer. `--clock cpu` counts the thread's processor time instead of the wall's, which is what can be compared on a busy machine; it needs
`--threads 1`. It does not know models or engines.
"""

from __future__ import annotations

import argparse
import itertools
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from loadtests.rows import keep, surroundings
from service.kernels import elementwise, kv_store, linear
from service.kernels.paged_attention import paged_attention, plan_attention

HEADS, KV_HEADS, HEAD_DIM, BLOCK, DIM = 20, 4, 64, 64, 1280
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Case:
    """One measurement: what runs, and the bytes it must read and operations it must do."""

    op: str
    shape: dict[str, int]
    dtype: str
    run: Callable[[], object]
    read_bytes: float
    flops: float


Clock = Callable[[], float]


def quantiles_us(run: Callable[[], object], seconds: float, clock: Clock) -> tuple[float, float, float]:
    """10th, 50th and 90th percentile of the time of one call, in microseconds, over `seconds` (at least 5 calls) after 2 to warm up."""
    run(), run()
    times: list[float] = []
    end = time.perf_counter() + seconds
    while len(times) < 5 or time.perf_counter() < end:
        start = clock()
        run()
        times.append((clock() - start) * 1e6)
    times.sort()
    return times[len(times) // 10], times[len(times) // 2], times[len(times) * 9 // 10]


def machine_limits(seconds: float, clock: Clock) -> tuple[float, float]:
    """(bytes read per microsecond, float32 operations per microsecond), the best of the quickest tenth."""
    large, a, b = torch.ones(32 << 20), torch.randn(1024, 1024), torch.randn(1024, 1024)
    reading = quantiles_us(large.sum, seconds, clock)[0]
    return large.nbytes / reading, 2 * 1024**3 / quantiles_us(lambda: linear.torch_linear(a, b), seconds, clock)[0]


def rotating(copies: list[Any]) -> Callable[[], Any]:
    """A function that gives the copies in turn."""
    turns = itertools.cycle(copies)
    return lambda: next(turns)


def linear_cases(rows: list[int], dtype: str) -> Iterator[Case]:
    """The fused gate and up projection (6912 x 1280) by each path."""
    weights = [torch.randn(6912, DIM).to(DTYPES[dtype]) for _ in range(4)]
    paths: dict[str, Callable[[torch.Tensor], object]] = {}
    plain = rotating(weights)
    paths["linear/torch"] = lambda x: linear.torch_linear(x, plain())
    if dtype == "float32" and linear.onednn_available():
        packed = rotating([linear.PackedLinear(weight) for weight in weights])
        paths["linear/onednn"] = lambda x: linear.onednn_linear(x, plain())
        paths["pack_linear/onednn"] = lambda x: packed().apply(x)
    if dtype != "float32" and linear.onednn_available():
        paths["linear/widened"] = lambda x: linear.widened_linear(x, plain())
    for count in rows:
        x = torch.randn(count, DIM).to(DTYPES[dtype])
        for op, path in paths.items():
            shape = {"rows": count, "outputs": 6912, "inputs": DIM}
            yield Case(op, shape, dtype, lambda path=path, x=x: path(x), weights[0].nbytes, 2.0 * count * 6912 * DIM)


def attention_case(sequences: int, context: int, queries: int, window: int | None, dtype: str) -> Case:
    """`queries` rows for each of `sequences`, over scattered blocks."""
    kind, blocks = DTYPES[dtype], -(-context // BLOCK)
    pool = [torch.randn(sequences * blocks + 1, KV_HEADS, BLOCK, HEAD_DIM).to(kind) for _ in range(2)]
    tables = (torch.randperm(sequences * blocks) + 1).view(sequences, blocks).to(torch.int32)
    starts = torch.arange(sequences + 1, dtype=torch.int32) * queries
    lengths = torch.full((sequences,), context, dtype=torch.int32)
    query = torch.randn(sequences * queries, HEADS, HEAD_DIM).to(kind)
    plan = plan_attention(tables, starts, lengths, block_tokens=BLOCK, window=window)
    seen = min(context, context if window is None else window + queries - 1)
    pairs = sum(min(p + 1, window or context) for p in range(context - queries, context))
    return Case(
        "paged_attention/cpu",
        {"sequences": sequences, "context": context, "queries": queries, "window": window or 0},
        dtype,
        lambda: paged_attention(query, *pool, tables, starts, lengths, scale=0.125, window=window, plan=plan),
        2.0 * sequences * seen * KV_HEADS * HEAD_DIM * kind.itemsize,
        4.0 * sequences * pairs * HEADS * HEAD_DIM,
    )


def pointwise_cases(rows: int) -> Iterator[Case]:
    """Norm, rotation, activation and the KV store of one layer."""
    x, weight, mlp, heads = torch.randn(rows, DIM), torch.randn(DIM), torch.randn(rows, 6912), torch.randn(rows, HEADS + KV_HEADS, HEAD_DIM)
    cos, sin, kv = torch.randn(rows, 32), torch.randn(rows, 32), torch.randn(rows, KV_HEADS, HEAD_DIM)
    pool = [torch.zeros(rows // BLOCK + 2, KV_HEADS, BLOCK, HEAD_DIM) for _ in range(2)]
    ids, offsets = torch.arange(rows) // BLOCK + 1, torch.arange(rows) % BLOCK
    shape = {"rows": rows}
    yield Case("rms_norm/torch", shape, "float32", lambda: elementwise.rms_norm(x, weight, 1e-6), x.nbytes, 0.0)
    yield Case("rotate/torch", shape, "float32", lambda: elementwise.rotate(heads, cos, sin), heads.nbytes, 0.0)
    yield Case("swiglu/torch", shape, "float32", lambda: elementwise.swiglu(mlp), mlp.nbytes, 0.0)
    yield Case("write_kv/torch", shape, "float32", lambda: kv_store.write_kv(kv, kv, *pool, ids, offsets), 2.0 * kv.nbytes, 0.0)


def cases() -> Iterator[Case]:
    """Everything measured, one set of tensors alive at a time."""
    yield from linear_cases([1, 4, 16, 32, 64, 128, 256], "float32")
    yield from linear_cases([1, 8, 32], "bfloat16")
    yield from linear_cases([1, 8, 32], "float16")
    for sequences, context in ((1, 176), (8, 176), (32, 176), (1, 2048), (8, 2048), (1, 8192), (8, 8192)):
        yield attention_case(sequences, context, 1, None, "float32")
    yield attention_case(32, 176, 1, None, "bfloat16")
    yield attention_case(8, 8192, 1, 1024, "float32")
    for queries, context, window in ((128, 128, None), (512, 512, None), (512, 2048, None), (512, 8192, None), (512, 8192, 1024)):
        yield attention_case(1, context, queries, window, "float32")
    for rows in (1, 32, 512):
        yield from pointwise_cases(rows)


def main() -> None:
    """Measure every case, print the table, append the rows if asked."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--keep", action="store_true", help="append the rows to the results")
    parser.add_argument("--seconds", type=float, default=0.5, help="time spent on each case")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall")
    options = parser.parse_args()
    if options.clock == "cpu" and options.threads != 1:
        parser.error("--clock cpu needs --threads 1")
    clock = time.perf_counter if options.clock == "wall" else time.thread_time
    torch.set_num_threads(options.threads)
    common = surroundings() | {"threads": options.threads, "torch": torch.__version__}
    with torch.inference_mode():
        bandwidth, speed = machine_limits(options.seconds, clock)
        print(f"{common['cpu']}, {options.threads} threads: reads {bandwidth / 1e3:.1f} GB/s, float32 product {speed / 1e3:.0f} GFLOP/s")
        for case in cases():
            low, median, high = quantiles_us(case.run, options.seconds, clock)
            share = max(case.read_bytes / bandwidth, case.flops / speed) / median
            shape = " ".join(f"{name}={value}" for name, value in case.shape.items())
            print(
                f"{case.op:20} {case.dtype:9} {shape:52} {median:10.0f} us  ({low:.0f} to {high:.0f})  {share:6.1%} of the limit",
                flush=True,
            )
            row = {"op": case.op, "shape": case.shape, "dtype": case.dtype, "median_us": round(median, 1), "p10_us": round(low, 1)}
            row |= {"p90_us": round(high, 1), "limit_share": round(share, 4), "read_gb_s": round(bandwidth / 1e3, 1)}
            row |= {"product_gflop_s": round(speed / 1e3), "clock": options.clock} | common
            if options.keep:
                keep("kernels_cpu", row)


if __name__ == "__main__":
    main()
