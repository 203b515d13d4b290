"""Speed of the GPU's kernels and of whole serving on this machine's GPU, each beside its limit and its peers; --keep appends rows.

    python -m loadtests.gpu_bench [--cases attention sparse far linear elementwise write images sample serving] [--rounds 30] [--keep]
        [--serving FLAGS]

It needs torch, triton and numpy; the last case, whole serving (see `gpu_serving`), also msgspec and prometheus_client. Limits are
measured first: bytes of a device-to-device copy, operations of a large bfloat16 product. A time is the median of many rounds between CUDA
events around a replayed graph of one call, as an engine's decode step has it, the second-level cache overwritten before each; launches from
Python stand beside it as `eager_us`, and for both where no graph can be recorded. Inputs are random, not zeros. What a peer needs is
imported where it is there (torch's attention and flex_attention always). What fails, ours or a peer's, is a row with its reason, and the
others go on. Dense attention is checked against torch's before it is timed; for all else run `make gpu-check` first.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch

from loadtests import gpu_attention_cases, gpu_cases
from loadtests.gpu_cases import Case
from loadtests.rows import keep, spread, surroundings

FLUSH_BYTES = 256 << 20
SERVING = "serving"
CASES = gpu_attention_cases.CASES | gpu_cases.CASES


class Clock:
    """Times of single calls on the device, in microseconds: of a graph's replays, or launched from Python each time."""

    def __init__(self, rounds: int) -> None:
        self._rounds = rounds
        self._flush = torch.empty(FLUSH_BYTES // 4, dtype=torch.int32, device="cuda")

    def times(self, run: Callable[[], Any]) -> list[float]:
        """Each round's time of a replay, or of a launch where nothing can be recorded."""
        return self.eager(recorded(run))

    def eager(self, run: Callable[[], Any]) -> list[float]:
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


def recorded(run: Callable[[], Any]) -> Callable[[], Any]:
    """The same call as a graph to replay, which launches at once what Python launches one by one; itself where it waits for the device."""
    for _ in range(3):
        run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            run()
    except RuntimeError:
        torch.cuda.synchronize()
        return run
    return graph.replay


def limits(clock: Clock) -> dict[str, float]:
    """Bytes a microsecond of a copy (read and written), and operations a microsecond of products of 8192, in bfloat16 and in int8."""
    source = torch.randn(256 << 20, device="cuda")
    target = torch.empty_like(source)
    copied = 2 * source.nbytes / min(clock.times(lambda: target.copy_(source)))
    matrix = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    eight = torch.randint(-127, 128, (8192, 8192), dtype=torch.int8, device="cuda")
    products = {"flops_us": lambda: matrix @ matrix, "int8_us": lambda: torch._int_mm(eight, eight.t())}
    return {"bytes_us": copied, **{name: 2 * 8192**3 / min(clock.times(run)) for name, run in products.items()}}


def row_of(case: Case, clock: Clock, machine: dict[str, float]) -> dict[str, Any]:
    """Times of ours and of its peers, and the share of the limit that ours reaches.

    Of what fails, whatever a compiler or a driver raises, the reason.
    """
    limit = max(case.moved_bytes / machine["bytes_us"], case.flops / machine[case.rate])
    row: dict[str, Any] = {"op": case.op, **case.shape, "limit_us": round(limit, 3)}
    try:
        case.check()
        row["us"] = spread(clock.times(case.run))
        row["share_of_limit"] = round(limit / row["us"]["median"], 4)
        row["eager_us"] = spread(clock.eager(case.run))
    except Exception as error:
        row["failed"] = reason(error)
    for name, make in case.peers.items():
        try:
            row[name] = spread(clock.times(make()))
        except Exception as error:
            row[name] = reason(error)
    return row


def reason(error: BaseException) -> str:
    """Why something failed, in a line."""
    return (str(error).splitlines() or [type(error).__name__])[0][:200]


def kernels(cases: list[str], rounds: int, kept: bool) -> None:
    """Measure and print, row by row, and keep each where asked."""
    import triton

    clock = Clock(rounds)
    machine = limits(clock)
    versions = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "triton": triton.__version__}
    print({**versions, **{name: round(value) for name, value in machine.items()}})
    for name in cases:
        for row in rows_of(name, clock, machine):
            print(row, flush=True)
            if kept:
                keep("gpu", {**surroundings(), **versions, **machine, **row})


def rows_of(name: str, clock: Clock, machine: dict[str, float]) -> Iterator[dict[str, Any]]:
    """Rows of one kind of cases; a case that cannot be made ends them with its reason."""
    try:
        for case in CASES[name]():
            yield row_of(case, clock, machine)
    except Exception as error:
        yield {"op": name, "failed": reason(error)}


def main() -> int:
    """Measure kernels, then serving, which has rows of its own; the exit code is 2 where serving lacks something."""
    parser = argparse.ArgumentParser(description="Speed of the GPU's kernels and of serving beside their limits and peers.")
    parser.add_argument("--cases", nargs="+", choices=(*CASES, SERVING), default=(*CASES, SERVING))
    parser.add_argument("--rounds", type=int, default=30, help="of the kernels")
    parser.add_argument("--keep", action="store_true", help="append rows to loadtests/results (see loadtests/rows.py)")
    parser.add_argument("--serving", metavar="FLAGS", default="--batches 1 32 --rounds 1", help="of gpu_serving (default %(default)s)")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("gpu_bench: no CUDA device is usable here")
    asked = [name for name in options.cases if name != SERVING]
    if asked:
        kernels(asked, options.rounds, options.keep)
    if SERVING not in options.cases:
        return 0
    from loadtests import gpu_serving

    return gpu_serving.main([*shlex.split(options.serving), *(["--keep"] if options.keep else [])])


if __name__ == "__main__":
    sys.exit(main())
