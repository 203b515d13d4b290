"""Whether `deepseek-benchmark` and guidellm measure the same: both on one server, in alternating rounds, with the same load.

The server is the one at `--url`, or the null server with a wait before the first token and between tokens, so that what is right is
known. guidellm is another project's program; `--guidellm` names its executable, in an environment of its own. It knows our row and
guidellm's report by the names of their fields. One JSON row; `--keep` appends it to results/agreement.jsonl; the exit code is 1 where
a ratio is further from 1 than `BOUND`. Run from the repository's root:

    python -m loadtests.agreement --guidellm PATH --tokenizer DIR --keep
    python -m loadtests.agreement --guidellm PATH --tokenizer DIR --url http://127.0.0.1:8000 --model v2.3 --keep
"""

from __future__ import annotations

import argparse
import contextlib
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from loadtests import rows

BOUND = 0.05


class Measure(NamedTuple):
    """One quantity in milliseconds: the place in our row, that in guidellm's report, and what turns the latter into milliseconds."""

    ours: tuple[str, str]
    theirs: tuple[str, str]
    factor: float = 1.0


# guidellm's inter-token latency is the mean of a request, weighted by its tokens: its median is our TPOT's, its mean our ITL's.
MEASURES = {
    "ttft_ms": Measure(("ttft_ms", "p50"), ("time_to_first_token_ms", "median")),
    "tpot_ms": Measure(("tpot_ms", "p50"), ("inter_token_latency_ms", "median")),
    "itl_ms": Measure(("itl_ms", "mean"), ("inter_token_latency_ms", "mean")),
    "latency_ms": Measure(("latency_ms", "p50"), ("request_latency", "median"), 1000.0),
}


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


def ours(url: str, given: argparse.Namespace, number: int) -> dict[str, float]:
    """Our row of round `number`, in milliseconds, and the tokens that the server counted in a prompt. Raises RuntimeError on a failure."""
    load = ["--concurrency", str(given.concurrency)] if given.concurrency else ["--rate", str(given.rate)]
    flags = ["--requests", str(given.requests), "--endpoint", "chat", "--model", given.model, "--ignore_eos", "--seed", str(number)]
    lengths = ["--prompt_tokens", str(given.prompt_tokens), "--output_tokens", str(given.tokens)]
    command = [sys.executable, "-m", "service.cli.benchmark", "--url", url, *load, *flags, *lengths]
    done = _run(command)
    row = json.loads(done.splitlines()[-1])
    if row["completed"] != given.requests:
        raise RuntimeError(f"our generator completed {row['completed']} of {given.requests} requests: {row['failures']}")
    counted = round(row["prompt_tokens"] / given.requests)
    return {**{name: row[measure.ours[0]][measure.ours[1]] for name, measure in MEASURES.items()}, "prompt_tokens": counted}


def theirs(url: str, given: argparse.Namespace, number: int, prompt_tokens: float) -> dict[str, float]:
    """guidellm's report of round `number`, in milliseconds, of prompts of so many tokens. Raises RuntimeError where a request failed."""
    with tempfile.TemporaryDirectory() as directory:
        report = Path(directory) / "report.json"
        settings = {
            "--backend": f"kind=openai_http,target={url},model={given.model}",
            "--profile": f"kind=concurrent,streams={given.concurrency}" if given.concurrency else f"kind=poisson,rate={given.rate}",
            "--constraint": f"kind=max_requests,count={given.requests}",
            "--tokenizer": f"kind=huggingface_auto,model={given.tokenizer}",
            "--data": f"kind=synthetic_text,prompt_tokens={prompt_tokens:.0f},output_tokens={given.tokens}",
            "--output": f"kind=json,path={report}",
            "--seed": f"kind=static,value={number}",
        }
        _run([given.guidellm, "run", "--disable-console", *(word for pair in settings.items() for word in pair)])
        metrics = json.loads(report.read_text("utf-8"))["benchmarks"][0]["metrics"]
    completed = metrics["request_totals"]["successful"]
    if completed != given.requests:
        raise RuntimeError(f"guidellm completed {completed} of {given.requests} requests: look at the server's log")
    found = {name: metrics[measure.theirs[0]]["successful"][measure.theirs[1]] * measure.factor for name, measure in MEASURES.items()}
    return {name: round(value, 3) for name, value in found.items()}


def agreement(found: Mapping[str, Sequence[Mapping[str, float]]]) -> dict[str, Any]:
    """Both sides' spreads over their rounds, the ratio of their medians, and whether all ratios lie within BOUND of 1."""
    sides = {side: {name: rows.spread([one[name] for one in each]) for name in MEASURES} for side, each in found.items()}
    ratios = {name: round(sides["ours"][name]["median"] / sides["guidellm"][name]["median"], 4) for name in MEASURES}
    agrees = all(abs(ratio - 1) <= BOUND for ratio in ratios.values())
    return {**sides, "ours_over_guidellm": ratios, "bound": BOUND, "agrees": agrees}


def _run(command: Sequence[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command[:4])} … ended with code {done.returncode}: {done.stderr.strip()[-500:]}")
    return done.stdout


def _flags() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--guidellm", default="guidellm")
    parser.add_argument("--tokenizer", required=True, help="directory of the tokenizer by which guidellm counts a prompt's tokens")
    parser.add_argument("--url", default="", help="a running server; the null server when left out")
    parser.add_argument("--model", default="fake", help="the model to ask it for")
    parser.add_argument("--label", default="", help="words kept in the row: which model, which flags")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--requests", type=int, default=60)
    parser.add_argument("--rate", type=float, default=10.0, help="open loop; guidellm's processes draw their arrivals from one seed each")
    parser.add_argument("--concurrency", type=int, default=0, help="clients of a closed loop in place of the rate")
    parser.add_argument("--prompt_tokens", type=int, default=64, help="words of our prompts; guidellm's have as many tokens as these")
    parser.add_argument("--tokens", type=int, default=40, help="tokens of each answer")
    parser.add_argument("--first_ms", type=float, default=100.0, help="of the null server")
    parser.add_argument("--gap_ms", type=float, default=10.0, help="of the null server")
    parser.add_argument("--keep", action="store_true")
    return parser.parse_args()


def main() -> int:
    """Measure in turn and print one row."""
    given = _flags()
    found: dict[str, list[dict[str, float]]] = {"ours": [], "guidellm": []}
    with contextlib.nullcontext(given.url) if given.url else null_server(given) as url:
        for number in range(given.rounds):
            found["ours"].append(ours(url, given, number))
            found["guidellm"].append(theirs(url, given, number, found["ours"][-1]["prompt_tokens"]))
    clock = () if given.url else ("first_ms", "gap_ms")
    asked = {name: getattr(given, name) for name in ("requests", "concurrency" if given.concurrency else "rate", "tokens", *clock)}
    asked["prompt_tokens"] = round(found["ours"][0]["prompt_tokens"])
    named = {"server": "running" if given.url else "null", "model": given.model, "label": given.label}
    version = _run([given.guidellm, "--version"]).strip().removeprefix("guidellm version: ")
    row: dict[str, Any] = {**rows.surroundings(), **named, **asked, "guidellm_version": version, **agreement(found)}
    print(json.dumps(row))
    if given.keep:
        rows.keep("agreement", row)
    return 0 if row["agrees"] else 1


if __name__ == "__main__":
    sys.exit(main())
