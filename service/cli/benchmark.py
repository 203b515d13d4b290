"""`deepseek-benchmark`: put load on any OpenAI-compatible server and print a table and, as the last line of stdout, one JSON row.

It joins the load generator with flags, scenario files and the terminal; it knows nothing of our server. Invariant: stdout ends with the row
(or the comparison) and nothing but the row is added to `--out`.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import os
import platform
import sys
from argparse import ArgumentTypeError, Namespace
from collections.abc import Callable, Coroutine, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import service
from service.cli.benchmark_tables import print_comparison, print_row, progress_bar
from service.cli.ending import run_command
from service.cli.far_quality import add_far_quality_flags, measure_far_quality, print_far_quality
from service.cli.machine_benchmark import add_machine_flags, check_machine, finish, measure_machine, measures_machine
from service.config.flags import FlagParser, canonical
from service.loadgen.arrivals import Load
from service.loadgen.compare import RowsError, compare, read_rows
from service.loadgen.drive import Drive, Measured
from service.loadgen.prompts import PromptPlan
from service.loadgen.scenario import Levels, Ready, Scenario, ScenarioError, read_scenario
from service.loadgen.senders import RawSender, Sender
from service.loadgen.summary import Targets, summarise
from service.loadgen.watch import SendFailure
from service.types.errors import SettingsError, StartupError

PROGRAM = "deepseek-benchmark"
# Flags that make the shape of a request, those of the load, and what of the shape a row repeats.
_SHAPE = ("endpoint", "prompt_tokens", "shared_prefix_tokens", "output_tokens", "temperature", "ignore_eos")
_LOAD = ("requests", "concurrency", "rate", "warmup", "timeout_s", "abort_share", "seed")
_ASKED = _SHAPE[1:]
DESCRIPTION = (
    "Measure an OpenAI-compatible server: latencies, throughput and goodput under an open (--rate) or closed (--concurrency) load."
)


def benchmark_parser() -> FlagParser:
    """The flags of `deepseek-benchmark`."""
    parser = FlagParser(PROGRAM, DESCRIPTION, service.__version__)
    server = parser.add_argument_group("Server")
    server.add_argument("--url", metavar="URL", default="http://127.0.0.1:8000", help="where the server listens (default %(default)s)")
    server.add_argument("--model", metavar="NAME", default="", help="model to ask for; the first that the server lists when left out")
    server.add_argument("--api_key", metavar="KEY", default="", help="key sent as a bearer token")
    server.add_argument("--endpoint", choices=("completions", "chat"), default="completions", help="protocol (default %(default)s)")
    load = parser.add_argument_group("Load")
    load.add_argument(
        "--scenario", metavar="FILE", default="", help="TOML file that says what is sent and when; flags that are given go before it"
    )
    load.add_argument("--rate", metavar="R", type=_positive, default=0.0, help="open loop: requests per second, Poisson arrivals")
    load.add_argument("--concurrency", metavar="N", type=_count, default=None, help="closed loop: clients at once (default 8)")
    load.add_argument("--requests", metavar="N", type=_count, default=100, help="measured requests (default %(default)s)")
    load.add_argument("--warmup", metavar="N", type=_whole, default=8, help="unmeasured requests before (default %(default)s)")
    load.add_argument("--timeout_s", metavar="S", type=_positive, default=120.0, help="longest time of a request (default %(default)s)")
    load.add_argument(
        "--abort_share", metavar="X", type=_share, default=0.0, help="share of requests left after the first token (default 0)"
    )
    load.add_argument("--seed", metavar="N", type=_whole, default=0, help="seed of arrivals and prompts (default 0)")
    text = parser.add_argument_group("Requests")
    text.add_argument(
        "--prompt_tokens", metavar="N", type=_count, default=128, help="length of prompts in short words (default %(default)s)"
    )
    text.add_argument("--shared_prefix_tokens", metavar="N", type=_whole, default=0, help="of which equal in all prompts (default 0)")
    text.add_argument("--output_tokens", metavar="N", type=_count, default=64, help="max_tokens of each request (default %(default)s)")
    text.add_argument("--temperature", metavar="T", type=_not_negative, default=0.0, help="sampling temperature (default 0)")
    text.add_argument("--ignore_eos", action="store_true", help="ask the server to go on past the end of the text")
    add_machine_flags(parser, _count, _whole)
    result = parser.add_argument_group("Result")
    result.add_argument("--slo_ttft_ms", metavar="MS", type=_positive, default=0.0, help="goodput: most time to the first token")
    result.add_argument("--slo_tpot_ms", metavar="MS", type=_positive, default=0.0, help="goodput: most time of an output token")
    result.add_argument("--out", metavar="FILE", default="", help="file to which the row is added")
    result.add_argument("--label", metavar="TEXT", default="", help="words kept in the row")
    result.add_argument("--report", metavar="FILE", default="", help="HTML page with plots of the row, or of the rows of --rows")
    result.add_argument("--rows", metavar="FILE", default="", help="file of rows for --report; nothing is measured then")
    result.add_argument(
        "--compare", metavar="FILE", nargs=2, default=None, help="two files of rows, before and after: print ratios and spread"
    )
    add_far_quality_flags(parser)
    result.add_argument("--client", choices=("raw", "httpx"), default="raw", help="HTTP client of the sender (default %(default)s)")
    return parser


def main() -> int:
    """Run the command; returns its exit code."""
    return run_command(PROGRAM, _benchmark, sys.argv[1:])


def _benchmark(arguments: Sequence[str]) -> int:
    given = Namespace(**benchmark_parser().read(arguments))
    if given.quality == "far":
        return _tell(given, _run_loop(measure_far_quality(given)), print_far_quality)
    named = {canonical(argument).partition("=")[0].removeprefix("--") for argument in arguments if argument.startswith("--")}
    _check(given, named)
    try:
        if given.compare:
            return _compare(given)
        if given.rows:
            _write_report(given.report, read_rows(Path(given.rows)))
            return 0
        if measures_machine(given):
            return finish(given, _run_loop(measure_machine(given)))
        ready = _plan(given, named)
    except (ScenarioError, RowsError) as error:
        raise SettingsError(str(error)) from None
    row = _run_loop(_measure(given, ready))
    code = _tell(given, row, print_row)
    if given.report:
        _write_report(given.report, [row])
    return code or (0 if row["completed"] else 1)


def _tell(given: Namespace, row: dict[str, Any], show: Callable[[dict[str, Any]], None]) -> int:
    """Print the row as a table and as JSON, and add it to --out."""
    show(row)
    line = json.dumps(row)
    if given.out:
        try:
            with Path(given.out).open("a", encoding="utf-8") as file:
                file.write(line + "\n")
        except OSError as error:
            raise SettingsError(f"--out {given.out} cannot be written: {error.strerror}.") from None
    print(line, flush=True)
    return 0


def _check(given: Namespace, named: set[str]) -> None:
    if not _is_server(given.url):
        raise SettingsError("--url must look like http://127.0.0.1:8000, without a user name or a query.")
    if given.rate and given.concurrency:
        raise SettingsError("--rate is an open loop and --concurrency a closed one: give only one of them.")
    if given.shared_prefix_tokens > given.prompt_tokens:
        raise SettingsError("--shared_prefix_tokens must not exceed --prompt_tokens.")
    check_machine(given)
    if given.rows and not given.report:
        raise SettingsError("--rows needs --report, the page to write.")
    if given.scenario and named & set(_SHAPE):
        raise SettingsError(f"--{min(named & set(_SHAPE))} is said by the scenario: change the file, or leave --scenario out.")
    for flag in ("out", "report"):
        path = getattr(given, flag)
        if path and not Path(path).absolute().parent.is_dir():
            raise SettingsError(f"--{flag} {path} lies in a directory that does not exist: make it first.")


def _compare(given: Namespace) -> int:
    before, after = (read_rows(Path(path)) for path in given.compare)
    differences = compare(before, after)
    print_comparison(differences)
    print(json.dumps({"kind": "comparison", "differences": [dataclasses.asdict(one) for one in differences]}), flush=True)
    return 0


def _write_report(path: str, rows: list[dict[str, Any]]) -> None:
    from service.cli.benchmark_report import report

    try:
        Path(path).write_text(report(rows), encoding="utf-8")
    except OSError as error:
        raise SettingsError(f"--report {path} cannot be written: {error.strerror}.") from None


def _is_server(url: str) -> bool:
    try:
        parts = urlsplit(url)
        valid_port = parts.port is None or parts.port > 0
    except ValueError:
        return False
    return parts.scheme in ("http", "https") and bool(parts.hostname) and valid_port and not (parts.username or parts.query)


def _plan(given: Namespace, named: set[str]) -> Ready:
    """The scenario, with the flags that were given in place of what it says; or one made of flags alone."""
    if not given.scenario:
        shape = PromptPlan(**{name: getattr(given, name) for name in _SHAPE})
        load = Load(**{name: getattr(given, name) for name in _LOAD if name != "concurrency"}, concurrency=given.concurrency or 8)
        return Ready(Scenario("", "", load, [shape], Levels(given.slo_ttft_ms, given.slo_tpot_ms)), load, [])
    ready = read_scenario(Path(given.scenario))
    changes: dict[str, Any] = {name: getattr(given, name) for name in _LOAD if name in named}
    levels = {name: getattr(given, f"slo_{name}") for name in ("ttft_ms", "tpot_ms") if f"slo_{name}" in named}
    return ready.changed(changes, levels)


async def _measure(given: Namespace, ready: Ready) -> dict[str, Any]:
    sender = _sender(given)
    try:
        nameless = any(not plan.model for plan in ready.scenario.requests)
        model = given.model or (await _first_model(sender, given.url) if nameless else "")
        with progress_bar(ready.load.requests) as progress:
            measured = await Drive(sender, ready.mix(model), ready.load, progress).run()
    finally:
        await sender.close()
    return _row(given, ready, model, measured)


def _row(given: Namespace, ready: Ready, model: str, measured: Measured) -> dict[str, Any]:
    scenario, load, shape = ready.scenario, ready.load, ready.scenario.requests[0]
    asked = {name: getattr(shape, name) for name in _ASKED}
    return {
        "kind": "benchmark",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "program": service.__version__,
        "python": platform.python_version(),
        "cores": len(os.sched_getaffinity(0)),
        "load_average": round(os.getloadavg()[0], 2),
        "label": given.label,
        "scenario": scenario.name,
        "changes": ready.changes,
        "url": given.url,
        "client": given.client,
        "endpoint": shape.endpoint,
        "model": model or ", ".join(sorted({plan.model for plan in scenario.requests})),
        "mode": load.mode,
        "rate": load.rate or None,
        "concurrency": None if load.mode == "open" else load.concurrency,
        "warmup": load.warmup,
        "seed": load.seed,
        "asked": {**asked, "abort_share": load.abort_share},
        **summarise(measured, Targets(scenario.slo.ttft_ms, scenario.slo.tpot_ms)),
        "failures": measured.failures,
    }


def _sender(given: Namespace) -> Sender:
    if given.client == "httpx":
        from service.loadgen.httpx_sender import HttpxSender

        return HttpxSender(given.url, given.api_key)
    return RawSender(given.url, given.api_key)


async def _first_model(sender: Sender, url: str) -> str:
    try:
        async with asyncio.timeout(10):
            status, body = await sender.fetch("/v1/models")
    except SendFailure as failure:
        raise StartupError(f"no server answers at {url} ({failure.detail or failure.kind}): start it or correct --url.") from None
    except TimeoutError:
        raise StartupError(f"the server at {url} does not answer within 10 s: see whether it is ready.") from None
    if status == 401:
        raise StartupError(f"the server at {url} asks for a key: give --api_key.")
    try:
        return str(json.loads(body)["data"][0]["id"])
    except (ValueError, LookupError, TypeError):
        raise StartupError(f"the server at {url} lists no models (status {status}): name one with --model.") from None


def _run_loop(work: Coroutine[Any, Any, dict[str, Any]]) -> dict[str, Any]:
    try:
        import uvloop
    except ImportError:
        return asyncio.run(work)
    return uvloop.run(work)


def _number(text: str, kind: Callable[[str], float], least: float, most: float, words: str) -> float:
    try:
        value = kind(text)
    except ValueError:
        value = float("nan")
    if not least <= value <= most:
        raise ArgumentTypeError(f"{text[:40]!r} is not {words}")
    return value


def _positive(text: str) -> float:
    return _number(text, float, 1e-9, 1e9, "a number above 0")


def _not_negative(text: str) -> float:
    return _number(text, float, 0, 1e9, "a number from 0 up")


def _share(text: str) -> float:
    return _number(text, float, 0, 1, "a share from 0 to 1")


def _count(text: str) -> int:
    return int(_number(text, int, 1, 1e9, "a whole number from 1 up"))


def _whole(text: str) -> int:
    return int(_number(text, int, 0, 1e9, "a whole number from 0 up"))


if __name__ == "__main__":
    sys.exit(main())
