"""What a step costs in the parent: plan, encode, decode, apply and publish for many running sequences, in milliseconds.

    python -m loadtests.scheduler_overhead [--sequences 256] [--steps 2000] [--keep]

No worker runs: results are made up and handed back at once, so nothing but the scheduler is on the clock. Readers wait on every stream, as
HTTP responses do; their own work is not counted here. The gate is on `all` (plan, encode, decode, apply); publishing is reported beside.
With --keep the row printed last is appended to results/scheduler_overhead.jsonl.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import time
from collections.abc import Callable

import msgspec
import uvloop

from loadtests.rows import keep, surroundings
from service.schedulers.accounting import Accounting
from service.schedulers.apply import Application
from service.schedulers.blocks import BlockSpace
from service.schedulers.planner import Planner, Step
from service.schedulers.prefix_cache import PrefixCache
from service.schedulers.sequence import Sequence, State
from service.schedulers.streams import Stream
from service.telemetry import Telemetry
from service.types.catalog import V2_3, Shape
from service.types.plan import SampledToken, StepResult, Want
from service.types.request import GenerationRequest, Sampling, Stop
from service.types.settings import SchedulerSettings

CLOCKS = {"wall": time.perf_counter, "cpu": time.thread_time}
GATE_MS = 2.0
PROMPT_TOKENS, STEP_TOKENS, BLOCK_TOKENS = 500, 4096, 64


class Letters:
    """A decoder that costs what a table of token texts costs."""

    def push(self, token: int) -> str:
        """Some text."""
        return "abcdefgh"[token & 7]

    def flush(self) -> str:
        """Nothing is left."""
        return ""


class SilentStream(Stream):
    """A stream that nobody reads: what is left of apply without publishing."""

    __slots__ = ()

    def push(self, token: int, logprob: object = None, stops_count: bool = True) -> None:
        """Nothing is published."""
        return None


class Bench:
    """A planner with many running sequences and the times of its steps."""

    def __init__(self, sequences: int, steps: int, publish: bool, clock: Callable[[], float]) -> None:
        self.clock = clock
        shape = Shape(vocab_size=32_000, dim=2048, layers=20, heads=16, kv_heads=8, mlp_hidden=5504, context_tokens=8192)
        spec = V2_3.spec(shape)
        layout = spec.kv_layout(BLOCK_TOKENS)
        space = BlockSpace(layout, tuple(40_000 for _ in layout.groups))
        self.planner = Planner(space, PrefixCache(space, "0" * 64), sequences, max(STEP_TOKENS, sequences))
        metrics = Telemetry().version("v", "cpu", "none")
        self.accounting = Accounting(metrics, spec, "float32", SchedulerSettings())
        self.application = Application(self.planner, self.accounting, self._end)
        self.streams: list[Stream] = []
        for index in range(sequences):
            prompt = tuple((index * 7919 + position) % 32_000 for position in range(PROMPT_TOKENS + index % BLOCK_TOKENS))
            request = GenerationRequest(str(index), "v", prompt, Stop(max_tokens=steps + 5000), Sampling(), tenant=str(index % 4))
            stream = (Stream if publish else SilentStream)(str(index), Letters(), (), 1024)
            self.streams.append(stream)
            share = self.planner.waiting.enrol(request.tenant)
            self.planner.waiting.add(Sequence(request, index, share, stream, metrics.latencies("/v1/completions")))

    def _end(self, sequence: Sequence, *_: object, **__: object) -> None:
        self.planner.leave(sequence, State.FINISHED)

    def step(self) -> tuple[Step, list[float]]:
        """One step: seconds of plan, encode, decode, apply."""
        started = self.clock()
        step = self.planner.plan()
        planned = self.clock()
        if step is None:
            raise SystemExit("nothing to plan")
        ENCODER.encode(step.plan)
        encoded = self.clock()
        number = step.plan.step
        tokens = tuple(SampledToken(piece.row, (number + piece.row) % 32_000) for piece in step.plan.slices if piece.want & Want.TOKEN)
        answer = ENCODER.encode(StepResult(number, tokens, (), 0.01))
        before = self.clock()
        result = DECODER.decode(answer)
        decoded = self.clock()
        self.application.apply(step, result, decoded)
        self.accounting.stepped(step, result, 0)
        applied = self.clock()
        return step, [planned - started, encoded - planned, decoded - before, applied - decoded]


ENCODER = msgspec.msgpack.Encoder()
DECODER = msgspec.msgpack.Decoder(StepResult)


async def measure(sequences: int, steps: int, publish: bool, clock: Callable[[], float]) -> dict[str, list[float]]:
    """Milliseconds of each part, by step."""
    bench = Bench(sequences, steps, publish, clock)

    async def read(stream: Stream) -> None:
        async for _ in stream:
            pass

    readers = [asyncio.create_task(read(stream)) for stream in bench.streams] if publish else []
    while True:
        step, _ = bench.step()
        await asyncio.sleep(0)
        if step.tokens == sequences:
            break
    rows = []
    for _ in range(steps):
        rows.append(bench.step()[1])
        await asyncio.sleep(0)
        await asyncio.sleep(0)
    for reader in readers:
        reader.cancel()
    await asyncio.gather(*readers, return_exceptions=True)
    names = ("plan", "encode", "decode", "apply")
    parts = {name: [row[index] * 1e3 for row in rows] for index, name in enumerate(names)}
    parts["plan_apply"] = [(row[0] + row[3]) * 1e3 for row in rows]
    parts["all"] = [sum(row) * 1e3 for row in rows]
    return parts


def summarise(values: list[float]) -> dict[str, float]:
    """Median and 99th percentile."""
    return {"median_ms": round(statistics.median(values), 4), "p99_ms": round(statistics.quantiles(values, n=100)[98], 4)}


def main() -> None:
    """Measure, print, and keep the row if asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sequences", type=int, default=256)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="wall, or the thread's CPU time (for a busy machine)")
    parser.add_argument("--keep", action="store_true", help="append the row to the results")
    arguments = parser.parse_args()
    row: dict[str, object] = {
        **surroundings(),
        "clock": arguments.clock,
        "sequences": arguments.sequences,
        "steps": arguments.steps,
        "block_tokens": BLOCK_TOKENS,
    }
    silent = uvloop.run(measure(arguments.sequences, arguments.steps, False, CLOCKS[arguments.clock]))
    published = uvloop.run(measure(arguments.sequences, arguments.steps, True, CLOCKS[arguments.clock]))
    for name, values in silent.items():
        row[name] = summarise(values)
    row["apply_with_publish"] = summarise(published["apply"])
    row["plan_apply_with_publish"] = summarise(published["plan_apply"])
    row["all_with_publish"] = summarise(published["all"])
    row["gate_ms"] = GATE_MS
    row["passed"] = row["all"]["p99_ms"] <= GATE_MS  # type: ignore[index]
    if arguments.keep:
        keep("scheduler_overhead", row)
    print(json.dumps(row))


if __name__ == "__main__":
    main()
