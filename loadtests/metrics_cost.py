"""What observing costs: a scrape with one version and with ten, what it takes of the event loop, and the share of a step that counting is.

A scrape is measured as the endpoint does it: a snapshot on the event loop, its text in a thread; beside it a task ticks every millisecond
and notes how late it is. Counting is the time inside every function of the loop's accounting, in runs of the scheduler, and is put beside a
decode step of a real model (`--step_ms`: the mean of deepseek_step_seconds). One JSON row; `--keep` appends it to
results/metrics_cost.jsonl. Run from the repository's root:

    python -m loadtests.metrics_cost --step_ms 10 --keep
"""

from __future__ import annotations

import argparse
import asyncio
import json
import time
from collections.abc import Callable
from typing import Any

from loadtests import rows
from service.schedulers.accounting import Accounting
from service.telemetry import METRICS, Telemetry
from service.types.settings import SchedulerSettings
from tests.fakes import FakeBackend, FakeBehaviour, fake_router
from tests.schedulers.support import ask

COUNTERS = ("stepped", "generated", "opened", "prompt_read", "ended")


def filled(versions: int) -> Telemetry:
    """Metrics of so many versions, each with two routes and every histogram filled."""
    telemetry = Telemetry()
    for number in range(versions):
        metrics = telemetry.version(f"v2.{number}@abababababab", "cpu", "AMD EPYC")
        for metric in METRICS:
            values = {("route",): (("/v1/chat/completions",), ("/v1/completions",)), (): ((),)}.get(
                metric.labels, tuple((f"x{index}",) * len(metric.labels) for index in range(6))
            )
            for labels in values:
                if metric.kind != "histogram":
                    metrics.value(metric.name, *labels).add(123456)
                    continue
                for bound in metric.buckets:
                    metrics.distribution(metric.name, *labels).observe(bound, 37)
    return telemetry


async def scrape(telemetry: Telemetry, rounds: int) -> dict[str, Any]:
    """Milliseconds of whole scrapes, of their part on the event loop, and the worst lateness of a task that ticks meanwhile."""
    whole, on_loop, late = [], [], [0.0]
    stop = asyncio.Event()

    async def tick() -> None:
        while not stop.is_set():
            due_s = time.perf_counter() + 0.001
            await asyncio.sleep(0.001)
            late.append(time.perf_counter() - due_s)

    ticking = asyncio.create_task(tick())
    size = 0
    for openmetrics in (False, True) * rounds:
        began_s = time.perf_counter()
        snapshot = telemetry.snapshot()
        on_loop.append((time.perf_counter() - began_s) * 1000)
        size = len((await asyncio.to_thread(snapshot.render, openmetrics))[0])
        whole.append((time.perf_counter() - began_s) * 1000)
        await asyncio.sleep(0.005)
    stop.set()
    await ticking
    late.sort()
    ticks = {"p50": round(late[len(late) // 2] * 1000, 3), "max": round(late[-1] * 1000, 3)}
    return {"scrape_ms": rows.spread(whole), "on_loop_ms": rows.spread(on_loop), "tick_late_ms": ticks, "bytes": size}


class Stopwatch:
    """Wraps a function and adds up the seconds inside it; its own cost is in them, so the sum is an upper bound."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def around(self, function: Callable[..., None]) -> Callable[..., None]:
        """The function, timed."""

        def timed(*arguments: Any) -> None:
            began_s = time.perf_counter()
            function(*arguments)
            self.seconds += time.perf_counter() - began_s

        return timed


async def counted_us_a_step(sequences: int, tokens: int, watch: Stopwatch) -> float:
    """Microseconds of counting in a step of so many sequences, their beginnings and ends included."""
    backend = FakeBackend(max_rows=sequences, max_step_tokens=sequences * 8, behaviour=FakeBehaviour(start_s=0.0))
    router = fake_router(backend, SchedulerSettings(batch_size=sequences, step_tokens=sequences * 8, queue_requests=sequences))
    await router.start()
    began_s, steps = watch.seconds, backend.steps_executed
    streams = router.submit([ask("hello", tokens, seed=index, ignore_eos=True) for index in range(sequences)])

    async def drain(stream: Any) -> None:
        async for _ in stream:
            pass

    await asyncio.gather(*(drain(stream) for stream in streams))
    spent_us = (watch.seconds - began_s) * 1e6 / (backend.steps_executed - steps)
    await router.close()
    return spent_us


def counting(sequences: int, tokens: int, rounds: int) -> dict[str, float]:
    """Microseconds of a step that every counting function of the loop takes together."""
    real = {name: getattr(Accounting, name) for name in COUNTERS}
    watch = Stopwatch()
    try:
        for name, function in real.items():
            setattr(Accounting, name, watch.around(function))
        return rows.spread([asyncio.run(counted_us_a_step(sequences, tokens, watch)) for _ in range(rounds)])
    finally:
        for name, function in real.items():
            setattr(Accounting, name, function)


def main() -> None:
    """Measure and print one row."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sequences", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=120)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--step_ms", type=float, required=True, help="a decode step of so many sequences of some model")
    parser.add_argument("--keep", action="store_true")
    given = parser.parse_args()
    scrapes = {f"versions_{count}": asyncio.run(scrape(filled(count), 10)) for count in (1, 10)}
    counted = counting(given.sequences, given.tokens, given.rounds)
    share = {"counting_us": counted, "step_ms": given.step_ms, "share": round(counted["median"] / (given.step_ms * 1000), 5)}
    row = {**rows.surroundings(), **scrapes, "sequences": given.sequences, **share}
    print(json.dumps(row))
    if given.keep:
        rows.keep("metrics_cost", row)


if __name__ == "__main__":
    main()
