"""Speed of the GPU's kernels and of whole serving on this machine's GPU, each beside its limit and its peers; --keep appends rows.

    python -m loadtests.gpu_bench [--cases attention sparse linear elementwise write serving] [--rounds 30] [--keep]

It needs torch, triton and numpy; the last case, whole serving (see `gpu_serving`), also msgspec and prometheus_client. Limits are
measured first: bytes of a device-to-device copy, operations of a large bfloat16 product. A time is the median of many rounds between CUDA
events, the second-level cache overwritten before each; inputs are random, not zeros. What a peer needs is imported where it is there
(torch's attention and flex_attention always); a peer that fails is a row with its reason. Results are checked against torch's attention
before they are timed: no speed is reported on a red test.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from loadtests.rows import keep, spread, surroundings

BLOCK, DIM, HEADS, KV_HEADS = 64, 128, 32, 8
FLUSH_BYTES = 256 << 20
SERVING = "serving"


@dataclass(frozen=True)
class Case:
    """One measurement: what runs, the bytes it must move and the operations it must do, and who else computes the same."""

    op: str
    shape: dict[str, Any]
    run: Callable[[], Any]
    moved_bytes: float
    flops: float
    peers: dict[str, Callable[[], Any]] = field(default_factory=dict)


class Clock:
    """Times of single calls on the device, in microseconds."""

    def __init__(self, rounds: int) -> None:
        self._rounds = rounds
        self._flush = torch.empty(FLUSH_BYTES // 4, dtype=torch.int32, device="cuda")

    def times(self, run: Callable[[], Any]) -> list[float]:
        """Each round's time after three to warm up; the cache is overwritten between rounds."""
        for _ in range(3):
            run()
        found = []
        for _ in range(self._rounds):
            self._flush.add_(1)
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            run()
            end.record()
            end.synchronize()
            found.append(begin.elapsed_time(end) * 1e3)
        return found


def limits(clock: Clock) -> dict[str, float]:
    """Bytes a microsecond of a copy (read and written) and bfloat16 operations a microsecond of a product of 8192."""
    source = torch.randn(256 << 20, device="cuda")
    target = torch.empty_like(source)
    copied = 2 * source.nbytes / min(clock.times(lambda: target.copy_(source)))
    matrix = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    return {"bytes_us": copied, "flops_us": 2 * 8192**3 / min(clock.times(lambda: matrix @ matrix))}


def paged(sequences: int, context: int, heads: int, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """(keys, values, tables) of sequences of `context` tokens in blocks scattered at random."""
    blocks = sequences * -(-context // BLOCK)
    shape = (blocks + 1, heads, BLOCK, size)
    keys, values = (torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    tables = (torch.randperm(blocks, device="cuda") + 1).to(torch.int32).view(sequences, -1)
    return keys, values, tables


def dense(query: Tensor, keys: Tensor, values: Tensor, tables: Tensor, context: int) -> tuple[Callable[[], Tensor], int]:
    """Our dense attention of query rows that are the last of each sequence, planned once as an engine's step plans it."""
    from service.kernels.gpu import paged_attention as ours

    sequences = tables.shape[0]
    rows = query.shape[0] // sequences
    starts = torch.arange(0, query.shape[0] + 1, rows, dtype=torch.int32)
    lengths = torch.full((sequences,), context, dtype=torch.int32)
    plan = ours.plan_attention(tables, starts, lengths, block_tokens=BLOCK, window=None)
    there = starts.cuda(), lengths.cuda()
    scale = query.shape[2] ** -0.5
    return lambda: ours.paged_attention(query, keys, values, tables, *there, scale=scale, window=None, plan=plan), rows


def attention_cases() -> Iterator[Case]:
    """Dense decode over batches and contexts, dense prefill, beside torch on keys and values that lie in order already."""
    from torch.nn.functional import scaled_dot_product_attention as sdpa

    for size, sequences, context, rows in (
        *((size, b, c, 1) for size in (64, 128) for b, c in ((1, 1024), (1, 16384), (1, 131072), (32, 16384), (256, 1024), (8, 131072))),
        *((size, 1, c, c) for size in (64, 128) for c in (2048, 16384)),
    ):
        kv_heads = KV_HEADS
        keys, values, tables = paged(sequences, context, kv_heads, size)
        query = torch.randn(sequences * rows, HEADS, size, device="cuda", dtype=torch.bfloat16)
        run, _ = dense(query, keys, values, tables, context)
        ordered = [
            blocks[tables.long()].transpose(1, 2).reshape(sequences, kv_heads, -1, size)[:, :, :context].contiguous()
            for blocks in (keys, values)
        ]
        asked = query.view(sequences, rows, HEADS, size).transpose(1, 2)

        def torch_run(asked: Tensor = asked, ordered: list[Tensor] = ordered, causal: bool = rows > 1) -> Tensor:
            return sdpa(asked, *ordered, is_causal=causal, enable_gqa=True)

        check(run(), torch_run().transpose(1, 2).reshape(query.shape))
        seen = sequences * (context if rows == 1 else rows * (context - rows) + rows * (rows + 1) / 2)
        read = 2 * sequences * kv_heads * context * size * 2
        shape = {"sequences": sequences, "context": context, "rows": rows, "head_dim": size, "heads": HEADS, "kv_heads": kv_heads}
        peers: dict[str, Callable[[], Any]] = {"torch_sdpa_in_order": torch_run}
        if rows > 1:
            peers["flex_attention_in_order"] = flex(asked, ordered)
        yield Case("decode" if rows == 1 else "prefill", shape, run, read, 4.0 * seen * HEADS * size, peers)


def flex(query: Tensor, ordered: list[Tensor]) -> Callable[[], Any]:
    """Causal flex_attention, compiled at its first call."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    compiled = torch.compile(flex_attention)

    def causal(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return q >= k

    mask = create_block_mask(causal, None, None, query.shape[2], ordered[0].shape[2], device="cuda")
    return lambda: compiled(query, *ordered, block_mask=mask, enable_gqa=True)


def sparse_cases() -> Iterator[Case]:
    """Choice and attention over two stores of one decode step, beside our own dense attention over everything."""
    from service.kernels.gpu import choose_far, far_store, window_sparse
    from service.kernels.reference_sparse import ChosenFar, FarBlocks

    window, refresh, sinks = 2048, 1, 1
    for size, kv_heads, (sequences, context) in (
        (size, kv, place) for size, kv in ((128, 8), (64, 16)) for place in ((1, 16384), (1, 131072), (32, 16384), (8, 131072))
    ):
        heads, budget = 2 * kv_heads, 16 if context <= 32768 else 32
        keys, values, tables = paged(sequences, context, kv_heads, size)
        query = torch.randn(sequences, heads, size, device="cuda", dtype=torch.bfloat16)
        store = empty_store(keys.shape, FarBlocks)
        ids = torch.arange(1, keys.shape[0], device="cuda")
        far_store.demote(keys, values, store, ids, ids)
        end = max(context - window, 0) // BLOCK
        per_row = [torch.full((sequences,), number, dtype=torch.int32, device="cuda") for number in (end, budget)]
        order = torch.arange(sequences, device="cuda")
        starts, lengths = torch.arange(sequences + 1, dtype=torch.int32), torch.full((sequences,), context, dtype=torch.int32)
        rule: dict[str, Any] = {"window": window, "refresh": refresh, "sink_blocks": sinks}
        plan = window_sparse.plan_sparse(tables, starts, lengths, far=None, block_tokens=BLOCK, **rule)
        there = starts.cuda(), lengths.cuda()

        def run(  # noqa: PLR0913, PLR0917
            query: Tensor = query, keys: Tensor = keys, values: Tensor = values, tables: Tensor = tables, store: Any = store,
            order: Tensor = order, per_row: list[Tensor] = per_row, plan: Any = plan, there: Any = there, budget: int = budget,
            rule: dict[str, Any] = rule,
        ) -> Tensor:  # fmt: skip
            chosen = choose_far.choose_far(query, store, tables, order, *per_row, sink_blocks=sinks, most=budget)
            far = ChosenFar(store, tables, *chosen, order)
            scale = query.shape[2] ** -0.5
            return window_sparse.window_sparse_attention(query, keys, values, tables, *there, far=far, scale=scale, **rule, plan=plan)

        near = sinks + -(-window // BLOCK) + 1
        candidates, kept = max(end - sinks, 0), min(4 * budget, max(end - sinks, 0))
        read = sequences * kv_heads * 2 * size * (near * BLOCK * 2 + min(budget, candidates) * BLOCK + candidates + 4 * kept)
        shape = {"sequences": sequences, "context": context, "head_dim": size, "kv_heads": kv_heads, "window": window, "far_blocks": budget}
        yield Case("sparse_decode", shape, run, read, 0.0, {"ours_dense": dense(query, keys, values, tables, context)[0]})


def empty_store(shape: torch.Size, kind: Any) -> Any:
    """An int8 far store of blocks of this shape."""
    blocks, heads, tokens, size = shape
    data = [torch.empty(shape, dtype=torch.int8, device="cuda") for _ in range(2)]
    scales = [torch.empty((blocks, heads, tokens), dtype=torch.float16, device="cuda") for _ in range(2)]
    bounds = torch.empty((blocks, heads, 1 + tokens // 16, 2, size), dtype=torch.int8, device="cuda")
    return kind(*data, *scales, bounds, torch.empty((blocks, heads), dtype=torch.float16, device="cuda"))


def linear_cases() -> Iterator[Case]:
    """int8 products beside torch's bfloat16 product of the same shape."""
    from service.kernels.gpu import int8_linear

    for outputs, inputs in ((14336, 4096), (4096, 14336)):
        weight = torch.randint(-127, 128, (outputs, inputs), dtype=torch.int8, device="cuda")
        scales, plain = torch.rand(outputs, device="cuda") / 127, torch.randn(outputs, inputs, device="cuda", dtype=torch.bfloat16)
        for rows in (1, 16, 256, 1024, 4096):
            x = torch.randn(rows, inputs, device="cuda", dtype=torch.bfloat16)
            shape, moved = {"rows": rows, "outputs": outputs, "inputs": inputs}, outputs * inputs + 2 * rows * (inputs + outputs)
            peers: dict[str, Callable[[], Any]] = {"torch_bf16": lambda x=x, plain=plain: x @ plain.t()}  # type: ignore[misc]
            for name in ("int8_linear", "weight_only_linear"):
                product = getattr(int8_linear, name)
                run = lambda product=product, x=x, weight=weight, scales=scales: product(x, weight, scales)  # noqa: E731
                yield Case(name, shape, run, moved, 2.0 * rows * outputs * inputs, peers)


def elementwise_cases() -> Iterator[Case]:
    """One pass over memory each, beside torch's."""
    from service.kernels import elementwise as plain
    from service.kernels.gpu import elementwise as ours

    weight = torch.randn(4096, device="cuda", dtype=torch.bfloat16)
    for rows in (32, 8192):
        x, residual = (torch.randn(rows, 4096, device="cuda", dtype=torch.bfloat16) for _ in range(2))
        wide, phase = torch.randn(rows, 2 * 14336, device="cuda", dtype=torch.bfloat16), torch.rand(rows, 64, device="cuda")
        calls: dict[str, tuple[tuple[Any, ...], float]] = {
            "rms_norm": ((x, weight, 1e-6), 2.0 * x.nbytes),
            "add_rms_norm": ((x, residual, weight, 1e-6), 4.0 * x.nbytes),
            "rotate": ((x.view(rows, 32, 128), phase.cos(), phase.sin()), 2.0 * x.nbytes),
            "swiglu": ((wide,), 1.5 * wide.nbytes),
        }
        for name, (arguments, moved) in calls.items():
            mine, theirs = getattr(ours, name), getattr(plain, name)
            peers: dict[str, Callable[[], Any]] = {"torch": lambda theirs=theirs, arguments=arguments: theirs(*arguments)}  # type: ignore[misc]
            yield Case(name, {"rows": rows}, lambda mine=mine, arguments=arguments: mine(*arguments), moved, 0.0, peers)  # type: ignore[misc]


def write_cases() -> Iterator[Case]:
    """Rotation of 32 query and 8 key heads and the write of keys and values, beside the same in two launches."""
    from service.kernels.gpu import elementwise, kv_store

    for rows in (32, 8192):
        heads = torch.randn(rows, 48, 128, device="cuda", dtype=torch.bfloat16)
        phase = torch.rand(rows, 64, device="cuda")
        angles, value = (phase.cos(), phase.sin()), heads[:, 40:]
        blocks = torch.zeros(2, rows // 64 + 2, 8, 64, 128, device="cuda", dtype=torch.bfloat16)
        places = *blocks, torch.arange(rows, device="cuda") // 64 + 1, torch.arange(rows, device="cuda") % 64

        def fused(heads: Tensor = heads, value: Tensor = value, angles: Any = angles, places: Any = places) -> Tensor:
            return kv_store.rotate_write(heads[:, :40], value, *angles, *places)

        def apart(heads: Tensor = heads, value: Tensor = value, angles: Any = angles, places: Any = places) -> Tensor:
            turned = elementwise.rotate(heads[:, :40], *angles)
            kv_store.write_kv(turned[:, 32:], value, *places)
            return turned[:, :32]

        yield Case("rotate_write", {"rows": rows}, fused, 2.0 * heads.nbytes, 0.0, {"two launches": apart})


def check(found: Tensor, expected: Tensor) -> None:
    """Refuse to time what is wrong."""
    error = (found.float() - expected.float()).abs().max().item()
    if not error <= 0.02 * expected.float().abs().max().item():
        raise SystemExit(f"gpu_bench: a result is off by {error:.3g}: run make gpu-check first")


CASES: dict[str, Callable[[], Iterator[Case]]] = {
    "attention": attention_cases,
    "sparse": sparse_cases,
    "linear": linear_cases,
    "elementwise": elementwise_cases,
    "write": write_cases,
}


def row_of(case: Case, clock: Clock, machine: dict[str, float]) -> dict[str, Any]:
    """Times of ours and of its peers, and the share of the limit that ours reaches."""
    ours = spread(clock.times(case.run))
    limit = max(case.moved_bytes / machine["bytes_us"], case.flops / machine["flops_us"])
    row: dict[str, Any] = {
        "op": case.op,
        **case.shape,
        "us": ours,
        "limit_us": round(limit, 3),
        "share_of_limit": round(limit / ours["median"], 4),
    }
    for name, run in case.peers.items():
        try:
            row[name] = spread(clock.times(run))
        except (RuntimeError, ValueError, NotImplementedError) as error:
            row[name] = str(error).splitlines()[0][:200]
    return row


def kernels(cases: list[str], rounds: int, kept: bool) -> None:
    """Measure and print, row by row, and keep each where asked."""
    import triton

    clock = Clock(rounds)
    machine = limits(clock)
    versions = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "triton": triton.__version__}
    print({**versions, **{name: round(value) for name, value in machine.items()}})
    for name in cases:
        for case in CASES[name]():
            row = row_of(case, clock, machine)
            print(row, flush=True)
            if kept:
                keep("gpu", {**surroundings(), **versions, **machine, **row})


def main() -> int:
    """Measure kernels, then serving, which has rows of its own; the exit code is 2 where serving lacks something."""
    parser = argparse.ArgumentParser(description="Speed of the GPU's kernels and of serving beside their limits and peers.")
    parser.add_argument("--cases", nargs="+", choices=(*CASES, SERVING), default=(*CASES, SERVING))
    parser.add_argument("--rounds", type=int, default=30, help="of the kernels")
    parser.add_argument("--keep", action="store_true")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("gpu_bench: no CUDA device is usable here")
    asked = [name for name in options.cases if name != SERVING]
    if asked:
        kernels(asked, options.rounds, options.keep)
    if SERVING not in options.cases:
        return 0
    from loadtests import gpu_serving

    return gpu_serving.main(["--keep"] if options.keep else [])


if __name__ == "__main__":
    sys.exit(main())
