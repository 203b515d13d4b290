"""`deepseek-benchmark`: put load on any OpenAI-compatible server and print a table and, as the last line of stdout, one JSON row.

It joins loads and their rows (server_load.py) with flags and the terminal; it knows nothing of our server. Invariant: stdout ends with
the row (or the comparison) and nothing but the row is added to `--out`.
"""

from __future__ import annotations

import asyncio
import dataclasses
import importlib.util
import json
import sys
from argparse import ArgumentTypeError, Namespace
from collections.abc import Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any, TypeVar

import service
from service.cli.benchmark_modes import FAR, FILES, MACHINE, ROWS, SERVERS, check_mode
from service.cli.benchmark_results import check_file, tell_row
from service.cli.benchmark_tables import print_comparison, print_row, print_servers
from service.cli.ending import run_command, warn
from service.cli.far_quality import add_far_quality_flags, measure_far_quality, print_far_quality
from service.cli.machine_benchmark import add_machine_flags, check_machine, finish, measure_machine
from service.cli.server_comparison import comparison_row, contenders, measure_rounds
from service.cli.server_load import SHAPE, is_server, measure_server, plan_load
from service.config.flags import FlagParser, canonical
from service.config.machine import threads_note
from service.loadgen.compare import RowsError, compare, read_rows
from service.loadgen.scenario import Ready, ScenarioError
from service.types.errors import SettingsError

PROGRAM = "deepseek-benchmark"
Result = TypeVar("Result")
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
    result.add_argument("--report", metavar="FILE", default="", help="HTML page with plots of a load's row, or of the rows of --rows")
    result.add_argument("--rows", metavar="FILE", default="", help="file of rows for --report; nothing is measured then")
    result.add_argument(
        "--compare",
        metavar="X",
        nargs="+",
        default=None,
        help="two files of rows, before and after; or running servers, each [NAME=]URL[#MODEL], under the same load in alternating rounds",
    )
    add_far_quality_flags(parser, _count)
    result.add_argument("--client", choices=("raw", "httpx"), default="raw", help="HTTP client of the sender (default %(default)s)")
    return parser


def main() -> int:
    """Run the command; returns its exit code."""
    return run_command(PROGRAM, _benchmark, sys.argv[1:])


def _benchmark(arguments: Sequence[str]) -> int:
    given = Namespace(**benchmark_parser().read(arguments))
    named = [canonical(argument).partition("=")[0].removeprefix("--") for argument in arguments if argument.startswith("--")]
    mode = check_mode(given, named)
    _check(given, set(named))
    if note := threads_note(given.threads):
        warn(PROGRAM, note)
    if mode == FAR:
        return _tell(given, _run_loop(measure_far_quality(given)), print_far_quality)
    if mode in MACHINE:
        check_machine(given)
        return finish(given, _run_loop(measure_machine(given)))
    try:
        if mode == FILES:
            return _compare(given)
        if mode == ROWS:
            _write_report(given.report, read_rows(Path(given.rows)))
            return 0
        ready = plan_load(given, set(named))
    except (ScenarioError, RowsError) as error:
        raise SettingsError(str(error)) from None
    if mode == SERVERS:
        return _compare_servers(given, ready)
    row = _run_loop(measure_server(given, ready, given.url, given.model))
    code = _tell(given, row, print_row)
    if given.report:
        _write_report(given.report, [row])
    return code or (0 if row["completed"] else 1)


def _tell(given: Namespace, row: dict[str, Any], show: Callable[[dict[str, Any]], None]) -> int:
    """Print the row as a table and as JSON, and add it to --out."""
    show(row)
    tell_row(given.out, row)
    return 0


def _check(given: Namespace, named: set[str]) -> None:
    if not is_server(given.url):
        raise SettingsError("--url must look like http://127.0.0.1:8000, without a user name or a query.")
    if given.rate and given.concurrency:
        raise SettingsError("--rate is an open loop and --concurrency a closed one: give only one of them.")
    if given.shared_prefix_tokens > given.prompt_tokens:
        raise SettingsError("--shared_prefix_tokens must not exceed --prompt_tokens.")
    if given.rows and not given.report:
        raise SettingsError("--rows needs --report, the page to write.")
    if given.report and importlib.util.find_spec("matplotlib") is None:
        raise SettingsError("--report needs matplotlib: pip install 'deepseek-service[train]', or leave --report out.")
    if given.scenario and named & set(SHAPE):
        raise SettingsError(f"--{min(named & set(SHAPE))} is said by the scenario: change the file, or leave --scenario out.")
    for flag in ("out", "report", "keep_table"):
        check_file(flag, getattr(given, flag))


def _compare(given: Namespace) -> int:
    before, after = (read_rows(Path(path)) for path in given.compare)
    differences = compare(before, after)
    print_comparison(differences)
    print(json.dumps({"kind": "comparison", "differences": [dataclasses.asdict(one) for one in differences]}), flush=True)
    return 0


def _compare_servers(given: Namespace, ready: Ready) -> int:
    servers = contenders(given.compare, given.model)
    rounds = _run_loop(measure_rounds(given, ready, servers))
    code = _tell(given, comparison_row(given, servers, rounds), print_servers)
    if given.report:
        _write_report(given.report, [row for rows in rounds for row in rows])
    return code


def _write_report(path: str, rows: list[dict[str, Any]]) -> None:
    from service.cli.benchmark_report import report

    try:
        Path(path).write_text(report(rows), encoding="utf-8")
    except OSError as error:
        raise SettingsError(f"--report {path} cannot be written: {error.strerror}.") from None


def _run_loop(work: Coroutine[Any, Any, Result]) -> Result:
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
