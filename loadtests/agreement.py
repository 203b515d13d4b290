"""Whether `deepseek-benchmark` and guidellm measure the same: both on one server that answers by the clock, in alternating rounds.

The server is the null server, with a wait before the first token and between tokens, so that what is right is known. guidellm is another
project's program; `--guidellm` names its executable, in an environment of its own. It knows our row and guidellm's report by the names of
their fields. One JSON row; `--keep` appends it to results/agreement.jsonl. Run from the repository's root:

    python -m loadtests.agreement --guidellm PATH --tokenizer DIR --keep
"""

from __future__ import annotations

import argparse
import contextlib
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from loadtests import rows

MEASURES = ("ttft_ms", "itl_ms", "latency_ms")


@contextlib.contextmanager
def null_server(given: argparse.Namespace) -> Iterator[str]:
    """The server that answers by the clock; gives its address."""
    flags = ["--port", "0", "--tokens", str(given.tokens), "--first_ms", str(given.first_ms), "--gap_ms", str(given.gap_ms)]
    with subprocess.Popen([sys.executable, "loadtests/null_server.py", *flags], stdout=subprocess.PIPE, text=True) as process:
        try:
            line = process.stdout.readline() if process.stdout else ""
            yield "http://127.0.0.1:" + line.removeprefix("ready on ").strip()
        finally:
            process.terminate()


def ours(url: str, given: argparse.Namespace) -> dict[str, float]:
    """Medians of our row in milliseconds."""
    flags = ["--requests", str(given.requests), "--rate", str(given.rate), "--endpoint", "chat", "--model", "fake", "--prompt_tokens", "64"]
    command = [sys.executable, "-m", "service.cli.benchmark", "--url", url, *flags]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    row = json.loads(done.stdout.splitlines()[-1])
    return {name: row[name]["p50"] for name in MEASURES}


def theirs(url: str, given: argparse.Namespace) -> dict[str, float]:
    """Medians of guidellm's report in milliseconds."""
    with tempfile.TemporaryDirectory() as directory:
        report = Path(directory) / "report.json"
        settings = {
            "--backend": f"kind=openai_http,target={url},model=fake",
            "--profile": f"kind=poisson,rate={given.rate}",
            "--constraint": f"kind=max_requests,count={given.requests}",
            "--tokenizer": f"kind=huggingface_auto,model={given.tokenizer}",
            "--data": f"kind=synthetic_text,prompt_tokens=64,output_tokens={given.tokens}",
            "--output": f"kind=json,path={report}",
        }
        command = [given.guidellm, "run", "--disable-console", *(word for pair in settings.items() for word in pair)]
        subprocess.run(command, capture_output=True, text=True, check=True)
        metrics = json.loads(report.read_text("utf-8"))["benchmarks"][0]["metrics"]
    medians = {name: metrics[name]["successful"]["median"] for name in metrics if name.endswith(("_ms", "latency"))}
    return {
        "ttft_ms": medians["time_to_first_token_ms"],
        "itl_ms": medians["inter_token_latency_ms"],
        "latency_ms": medians["request_latency"] * 1000,
    }


def main() -> None:
    """Measure in turn and print one row."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--guidellm", default="guidellm")
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--requests", type=int, default=60)
    parser.add_argument("--rate", type=float, default=10.0)
    parser.add_argument("--tokens", type=int, default=40)
    parser.add_argument("--first_ms", type=float, default=100.0)
    parser.add_argument("--gap_ms", type=float, default=10.0)
    parser.add_argument("--keep", action="store_true")
    given = parser.parse_args()
    found: dict[str, list[dict[str, float]]] = {"ours": [], "guidellm": []}
    with null_server(given) as url:
        for _ in range(given.rounds):
            found["ours"].append(ours(url, given))
            found["guidellm"].append(theirs(url, given))
    sides = {side: {name: rows.spread([one[name] for one in each]) for name in MEASURES} for side, each in found.items()}
    ratios = {name: round(sides["ours"][name]["median"] / sides["guidellm"][name]["median"], 4) for name in MEASURES}
    asked = {name: getattr(given, name) for name in ("requests", "rate", "tokens", "first_ms", "gap_ms")}
    version = subprocess.run([given.guidellm, "--version"], capture_output=True, text=True, check=True).stdout.strip()
    row: dict[str, Any] = {**rows.surroundings(), **asked, "guidellm_version": version, **sides, "ours_over_guidellm": ratios}
    print(json.dumps(row))
    if given.keep:
        rows.keep("agreement", row)


if __name__ == "__main__":
    main()
