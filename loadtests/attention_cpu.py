"""Attention of one layer on a CPU: compiled and torch, dense and window + far, in alternating rounds, with the share of the read bandwidth.

    python -m loadtests.attention_cpu [--rounds 5] [--calls 20] [--dtype float32 bfloat16] [--keep]

Shapes are those of the 385 M llama: 20 query heads, 4 K/V heads, head_dim 64; window 2048, 16 far blocks (32 from 32768 on). A sparse
call chooses its far blocks anew, which serving does once for each `refresh` tokens. Each case has several layers' blocks and goes round
them, so that keys and values come from memory. It does not know engines. Invariant: all cases of a group run in every round.
"""

from __future__ import annotations

import argparse
import ctypes
import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from loadtests.rows import keep, spread, surroundings
from service.kernels import far_store, paged_attention, window_sparse
from service.kernels.native import attention as native
from service.kernels.native import binding
from service.kernels.native import window_sparse as native_sparse
from service.kernels.reference_sparse import ChosenFar, FarBlocks

HEADS, KV_HEADS, SIZE, BLOCK, WINDOW, SINKS, REFRESH = 20, 4, 64, 64, 2048, 1, 16
CONTEXT_BYTES = 96 << 20
_MADV_HUGEPAGE = 14


@dataclass(frozen=True)
class Case:
    """One thing to time: a name, what it runs, and the bytes of keys, values and bounds that it reads."""

    name: str
    run: Callable[[], object]
    read_bytes: float


def large(*shape: int, dtype: torch.dtype) -> Tensor:
    """Random blocks in huge pages, as the serving pool has them."""
    tensor = torch.empty(shape, dtype=dtype)
    first = -(-tensor.data_ptr() // 4096) * 4096
    size = tensor.data_ptr() + tensor.nbytes - first
    ctypes.CDLL(None).madvise(ctypes.c_void_p(first), ctypes.c_size_t(size), _MADV_HUGEPAGE)
    whole = dtype in (torch.int8, torch.uint8)
    sample = torch.randint(0, 100, shape[-3:], dtype=dtype) if whole else torch.randn(shape[-3:]).to(dtype)
    return tensor.copy_(sample)


class Layers:
    """As many layers' blocks of one context as come from memory, and a query of `rows` tokens at its end."""

    def __init__(self, context: int, rows: int, dtype: torch.dtype, sequences: int = 1) -> None:
        blocks = -(-context // BLOCK)
        each = sequences * blocks * KV_HEADS * BLOCK * SIZE * dtype.itemsize * 2
        self.count = max(1, min(20, math.ceil(CONTEXT_BYTES / each)))
        shape = (self.count, sequences * blocks + 1, KV_HEADS, BLOCK, SIZE)
        self.keys, self.values = large(*shape, dtype=dtype), large(*shape, dtype=dtype)
        self.tables = (torch.randperm(sequences * blocks) + 1).view(sequences, blocks).to(torch.int32)
        self.starts = torch.arange(sequences + 1, dtype=torch.int32) * rows
        self.lengths = torch.full((sequences,), context, dtype=torch.int32)
        self.query = torch.randn(sequences * rows, HEADS, SIZE).to(dtype)
        self.bytes = each
        self._at = 0

    def next(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Arguments of the next layer's call."""
        self._at = (self._at + 1) % self.count
        return self.query, self.keys[self._at], self.values[self._at], self.tables, self.starts, self.lengths


def dense_cases(layers: Layers) -> list[Case]:
    """Full attention by both paths."""
    plan = paged_attention.plan_attention(layers.tables, layers.starts, layers.lengths, block_tokens=BLOCK, window=None)
    options = {"scale": SIZE**-0.5, "window": None}
    return [
        Case("dense/native", lambda: native.paged_attention(*layers.next(), **options), layers.bytes),
        Case("dense/torch", lambda: paged_attention.paged_attention(*layers.next(), **options, plan=plan), layers.bytes),
    ]


def sparse_cases(layers: Layers, context: int, store: str) -> list[Case]:
    """Window + far attention of a decode row by both paths, its choice included."""
    blocks, per_byte = context // BLOCK, 2 if store == "int4" else 1
    stored = torch.uint8 if store == "int4" else torch.int8
    kept = [large(blocks + 1, KV_HEADS, BLOCK, SIZE // per_byte, dtype=stored) for _ in range(2)]
    scales = [torch.rand(blocks + 1, KV_HEADS, BLOCK).mul_(0.02).half() for _ in range(2)]
    bounds = large(KV_HEADS, blocks + 1, 2, SIZE, dtype=torch.int8).transpose(0, 1)
    parts = large(blocks + 1, KV_HEADS, BLOCK // 16, 2, SIZE, dtype=torch.int8)
    far = FarBlocks(*kept, *scales, bounds, parts, torch.rand(KV_HEADS, blocks + 1).half().T)
    most = 16 if context < 32768 else 32
    anchor = (context - 1) // REFRESH * REFRESH
    ends = torch.tensor([(anchor - WINDOW + 1) // BLOCK], dtype=torch.int32)
    asked = torch.zeros(1, dtype=torch.int64), ends, torch.tensor([most], dtype=torch.int32)
    rule = {"scale": SIZE**-0.5, "window": WINDOW, "refresh": REFRESH, "sink_blocks": SINKS}
    near = context // BLOCK - int(ends) + SINKS
    read = layers.bytes / blocks * near + KV_HEADS * (most * (BLOCK * SIZE * 2 / per_byte + BLOCK * 4) + blocks * 2 * SIZE)

    def step(choose: Callable[..., tuple[Tensor, Tensor]], attend: Callable[..., Tensor]) -> Tensor:
        choices, counts = choose(layers.query, far, layers.tables, *asked, sink_blocks=SINKS, most=most)
        chosen = ChosenFar(far, layers.tables, choices, counts, torch.zeros(1, dtype=torch.int64), 16)
        return attend(*layers.next(), far=chosen, **rule)

    return [
        Case(f"{store}/native", lambda: step(native_sparse.choose_far, native_sparse.window_sparse_attention), read),
        Case(f"{store}/torch", lambda: step(far_store.choose_far, window_sparse.window_sparse_attention), read),
    ]


def alternate(cases: list[Case], rounds: int, calls: int) -> list[list[float]]:
    """Microseconds a call of each case in each round."""
    times: list[list[float]] = [[] for _ in cases]
    for case in cases:
        case.run()
    for _ in range(rounds):
        for case, taken in zip(cases, times, strict=True):
            begin = time.perf_counter()
            for _ in range(calls):
                case.run()
            taken.append((time.perf_counter() - begin) / calls * 1e6)
    return times


def bandwidth() -> float:
    """Bytes read a microsecond, best of 10."""
    whole = torch.ones(64 << 20)
    best = math.inf
    for _ in range(10):
        begin = time.perf_counter()
        whole.sum()
        best = min(best, time.perf_counter() - begin)
    return whole.nbytes / best / 1e6


def main() -> None:
    """Measure, print, keep."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--calls", type=int, default=20)
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--keep", action="store_true", help="append the rows to results/attention_cpu.jsonl")
    options = parser.parse_args()
    common = surroundings() | {"threads": torch.get_num_threads(), "torch": torch.__version__, "kernels": binding.describe()}
    with torch.inference_mode():
        for name in options.dtype:
            dtype = getattr(torch, name)
            groups: list[tuple[str, int, int, Callable[[], list[Case]]]] = [
                ("decode", 32, 176, lambda dtype=dtype: dense_cases(Layers(176, 1, dtype, 32))),
                ("prefill of 512", 1, 8192, lambda dtype=dtype: dense_cases(Layers(8192, 512, dtype))),
            ]
            for context in (2048, 16384, 131072):
                groups.append(("decode", 1, context, lambda context=context, dtype=dtype: long_cases(context, dtype)))
            for what, sequences, context, make in groups:
                cases, read = make(), bandwidth()
                for case, taken in zip(cases, alternate(cases, options.rounds, options.calls), strict=True):
                    found = spread(taken)
                    share = case.read_bytes / read / found["median"]
                    label = f"{name:9} {what:15} {sequences:3} x {context:6}  {case.name:13}"
                    print(f"{label} {found['median']:9.0f} us  {share:6.1%} of {read / 1e3:.0f} GB/s", flush=True)
                    row = {"case": case.name, "what": what, "sequences": sequences, "context": context, "dtype": name, "us": found}
                    row |= {"bandwidth_share": round(share, 4), "read_gb_s": round(read / 1e3, 1)} | common
                    if options.keep:
                        keep("attention_cpu", row)


def long_cases(context: int, dtype: torch.dtype) -> list[Case]:
    """A decode row alone: dense, and over both kinds of far store where there is something far."""
    layers = Layers(context, 1, dtype)
    cases = dense_cases(layers)
    for store in ("int8", "int4") if context > WINDOW else ():
        cases += sparse_cases(layers, context, store)
    return cases


if __name__ == "__main__":
    main()
