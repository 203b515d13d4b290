"""What a flag of deepseek-serve costs and gives: the same load on servers that differ in one flag, in alternating rounds.

Each experiment starts a server of the bundled model for every value and round, puts a closed load on it with `deepseek-benchmark` and notes
throughput, latencies, the worker's memory and the time from the command to ready. It knows flags by name only. One JSON row an experiment;
`--keep` appends it to results/tuning.jsonl. Run from the repository's root:

    python -m loadtests.tuning --only batch_size,prefix_cache --keep
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from loadtests import rows

MANY = ("--concurrency", "32", "--requests", "96", "--prompt_tokens", "24", "--output_tokens", "48", "--ignore_eos")
READING = ("--concurrency", "8", "--requests", "48", "--prompt_tokens", "150", "--output_tokens", "24", "--ignore_eos")
LONG = ("--concurrency", "4", "--requests", "16", "--prompt_tokens", "4000", "--output_tokens", "32", "--ignore_eos")
SHARED = (*READING[:4], "--prompt_tokens", "150", "--shared_prefix_tokens", "140", "--output_tokens", "8", "--ignore_eos")
MEASURES = ("output_tokens_per_s", "total_tokens_per_s", "ttft_ms", "tpot_ms", "itl_ms")


class Experiment(NamedTuple):
    """A flag, the values compared (the first is the one that others are divided by), and the load."""

    flag: str
    values: tuple[str, ...]
    load: tuple[str, ...]


EXPERIMENTS = (
    Experiment("batch_size", ("32", "8", "2"), MANY),
    Experiment("step_tokens", ("512", "128", "2048"), READING),
    Experiment("prefix_cache", ("true", "false"), SHARED),
    Experiment("run_ahead", ("auto", "never"), MANY),
    Experiment("threads", ("0", "1", "2"), MANY),
    Experiment("threads", ("0", "1", "2"), LONG),
    Experiment("dtype", ("float32", "bfloat16"), MANY),
    Experiment("access_log", ("true", "false"), MANY),
    Experiment("spare_worker", ("false", "true"), MANY),
)


@contextlib.contextmanager
def serving(flag: str, value: str) -> Iterator[tuple[str, float, subprocess.Popen[str]]]:
    """A server with that flag; gives its address, the seconds until it was ready, and its process."""
    command = [sys.executable, "-m", "service.cli.serve", "--port", "0", f"--{flag}", value]
    began_s = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        try:
            for line in process.stdout or ():
                if match := re.match(r"serving .* on (http://\S+)", line):
                    yield match[1], time.perf_counter() - began_s, process
                    break
            process.send_signal(signal.SIGINT)
            process.communicate(timeout=30)
        finally:
            process.kill()


def resident_mib(process: int) -> float:
    """MiB that a process and its children hold."""
    total = 0
    for status in Path("/proc").glob("[0-9]*/status"):
        with contextlib.suppress(OSError):
            fields = dict(line.split(":", 1) for line in status.read_text("utf-8").splitlines() if ":" in line)
            if process in (int(fields["Pid"]), int(fields["PPid"])):
                total += int(fields.get("VmRSS", "0 kB").split()[0])
    return total / 1024


def run(flag: str, value: str, load: tuple[str, ...]) -> dict[str, float]:
    """One round: a server, a load, its numbers."""
    with serving(flag, value) as (url, ready_s, process):
        command = [sys.executable, "-m", "service.cli.benchmark", "--url", url, *load]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        memory = resident_mib(process.pid)
    row = json.loads(done.stdout.splitlines()[-1])
    if row["errors"]:
        raise SystemExit(f"--{flag} {value}: {row['errors']}")
    found = {"ready_s": ready_s, "memory_mib": memory}
    for name in MEASURES:
        found |= {f"{name}_{point}": row[name][point] for point in ("p50", "p99")} if isinstance(row[name], dict) else {name: row[name]}
    return found


def measure(experiment: Experiment, rounds: int) -> dict[str, Any]:
    """All values of one flag, the rounds in turn, and each value's medians over those of the first."""
    found: dict[str, list[dict[str, float]]] = {value: [] for value in experiment.values}
    for _ in range(rounds):
        for value in experiment.values:
            found[value].append(run(experiment.flag, value, experiment.load))
    sides = {value: {name: rows.spread([one[name] for one in each]) for name in each[0]} for value, each in found.items()}
    first = sides[experiment.values[0]]
    ratios = {
        value: {name: round(side[name]["median"] / first[name]["median"], 3) for name in side if first[name]["median"]}
        for value, side in sides.items()
        if value != experiment.values[0]
    }
    return {**rows.surroundings(), "flag": experiment.flag, "load": " ".join(experiment.load), "values": sides, "ratios": ratios}


def main() -> None:
    """Measure the experiments and print a row for each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="flags to measure, separated by commas; all when left out")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--keep", action="store_true")
    given = parser.parse_args()
    os.environ.setdefault("PYTHONPATH", str(Path(__file__).parents[1]))
    for experiment in EXPERIMENTS:
        if not given.only or experiment.flag in given.only.split(","):
            row = measure(experiment, given.rounds)
            print(json.dumps(row), flush=True)
            if given.keep:
                rows.keep("tuning", row)


if __name__ == "__main__":
    main()
