"""Time to the first token of 64 and time a token of line v4.8 on one CPU core, over HTTP: an eighth of v5.2's shape, and the bundled one.

    python -m loadtests.light_latency [--requests 30] [--generate 64] [--keep]

The whole service (parent, worker and their threads) is bound to one core and serves int8 as line v4.8 does by itself; the client is on
another where there is one. Requests follow one another; every prompt is new. The larger model has random weights: line v4.8 at its
reference shape, which is an eighth of v5.2's.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from loadtests.first_token import TIMEOUT_S, free_port, wait_ready
from loadtests.rows import keep, surroundings
from loadtests.shapes import write_tokenizer
from service.checkpoints.bundled import bundled_directory, complete_lines
from service.checkpoints.manifest import read_manifest
from service.checkpoints.store import save
from service.models.build import build, init_weights
from service.types.catalog import V4_8

PROMPT_TOKENS = 64


def reference_model(directory: Path) -> Path:
    """Line v4.8 at its reference shape with random weights and filler words."""
    spec = V4_8.spec(dict(V4_8.shapes)["reference"], end_ids=(1,))
    decoder = build(spec, "cpu", torch.float32)
    init_weights(decoder, 0)
    with tempfile.TemporaryDirectory() as words:
        write_tokenizer(Path(words), spec.vocab_size)
        save(directory, spec, decoder.state_dict(), {path.name: path.read_bytes() for path in Path(words).iterdir()})
    return directory


def ask(port: int, prompt: list[int], generate: int) -> list[float]:
    """Seconds from sending one streaming request to each of its tokens."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    asked = {"prompt": prompt, "max_tokens": generate, "min_tokens": generate, "stream": True, "temperature": 0, "ignore_eos": True}
    began_s = time.perf_counter()
    connection.request("POST", "/v1/completions", json.dumps(asked), {"content-type": "application/json"})
    answer = connection.getresponse()
    if answer.status != 200:
        raise RuntimeError(answer.read().decode())
    times = []
    while line := answer.readline():
        if line.startswith(b"data: {"):
            times.append(time.perf_counter() - began_s)
    connection.close()
    return times


def measure(directory: Path, requests: int, generate: int) -> dict[str, Any]:
    """Percentiles in ms of one model, served from one core."""
    port = free_port()
    command = ["taskset", "-c", "0", sys.executable, "-m", "service.cli.serve", "--port", str(port), "--model", f"light={directory}"]
    draw = np.random.default_rng(0)
    with subprocess.Popen([*command, "--threads", "1"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            wait_ready(port, time.perf_counter() + TIMEOUT_S)
            runs = [ask(port, draw.integers(300, 4000, PROMPT_TOKENS).tolist(), generate) for _ in range(requests + 2)][2:]
        finally:
            process.terminate()
            process.wait(60)
    first = np.array([times[0] for times in runs]) * 1000
    gaps = np.concatenate([np.diff(times) for times in runs]) * 1000
    return {
        "parameters": read_manifest(directory).spec.parameters,
        "ttft_ms": {f"p{share}": round(float(np.percentile(first, share)), 2) for share in (50, 99)},
        "token_ms": {f"p{share}": round(float(np.percentile(gaps, share)), 2) for share in (50, 99)},
        "tokens": sum(len(times) for times in runs),
    }


def main() -> None:
    """Measure both models and print a line for each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=30)
    parser.add_argument("--generate", type=int, default=64)
    parser.add_argument("--keep", action="store_true", help="append the rows to results/light_latency.jsonl")
    given = parser.parse_args()
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[-1]})
    with tempfile.TemporaryDirectory() as scratch:
        models = {"v4.8 reference": reference_model(Path(scratch) / "light")}
        if V4_8 in complete_lines():
            models["bundled v4.8"] = bundled_directory(V4_8)
        else:
            print("v4.8 is not bundled here: only random weights are measured")
        for name, directory in models.items():
            row = {"what": name, "prompt_tokens": PROMPT_TOKENS, **measure(directory, given.requests, given.generate), **surroundings()}
            row["server_cores"] = 1
            print(json.dumps(row))
            if given.keep:
                keep("light_latency", row)


if __name__ == "__main__":
    main()
