"""`deepseek-benchmark`: put load on any OpenAI-compatible server and print a table and, as the last line of stdout, one JSON row.

It joins the load generator with flags and the terminal; it knows nothing of our server. Invariant: stdout ends with the row and nothing but
the row is added to `--out`.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import platform
import sys
from argparse import ArgumentTypeError, Namespace
from collections.abc import Callable, Coroutine, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import service
from service.cli.ending import run_command
from service.config.flags import FlagParser
from service.loadgen.arrivals import Load
from service.loadgen.drive import Drive, Measured, Progress
from service.loadgen.prompts import PromptPlan
from service.loadgen.senders import RawSender, Sender
from service.loadgen.summary import Targets, summarise
from service.loadgen.watch import SendFailure, Watch
from service.types.errors import SettingsError, StartupError

PROGRAM = "deepseek-benchmark"
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
    result = parser.add_argument_group("Result")
    result.add_argument("--slo_ttft_ms", metavar="MS", type=_positive, default=0.0, help="goodput: most time to the first token")
    result.add_argument("--slo_tpot_ms", metavar="MS", type=_positive, default=0.0, help="goodput: most time of an output token")
    result.add_argument("--out", metavar="FILE", default="", help="file to which the row is added")
    result.add_argument("--label", metavar="TEXT", default="", help="words kept in the row")
    result.add_argument("--client", choices=("raw", "httpx"), default="raw", help="HTTP client of the sender (default %(default)s)")
    return parser


def main() -> int:
    """Run the command; returns its exit code."""
    return run_command(PROGRAM, _benchmark, sys.argv[1:])


def _benchmark(arguments: Sequence[str]) -> int:
    given = Namespace(**benchmark_parser().read(arguments))
    _check(given)
    row = _run_loop(_measure(given))
    _print_table(row)
    line = json.dumps(row)
    if given.out:
        try:
            with Path(given.out).open("a", encoding="utf-8") as file:
                file.write(line + "\n")
        except OSError as error:
            raise SettingsError(f"--out {given.out} cannot be written: {error.strerror}.") from None
    print(line, flush=True)
    return 0 if row["completed"] else 1


def _check(given: Namespace) -> None:
    if not _is_server(given.url):
        raise SettingsError("--url must look like http://127.0.0.1:8000, without a user name or a query.")
    if given.rate and given.concurrency:
        raise SettingsError("--rate is an open loop and --concurrency a closed one: give only one of them.")
    if given.shared_prefix_tokens > given.prompt_tokens:
        raise SettingsError("--shared_prefix_tokens must not exceed --prompt_tokens.")
    if given.out and not Path(given.out).absolute().parent.is_dir():
        raise SettingsError(f"--out {given.out} lies in a directory that does not exist: make it first.")


def _is_server(url: str) -> bool:
    try:
        parts = urlsplit(url)
        valid_port = parts.port is None or parts.port > 0
    except ValueError:
        return False
    return parts.scheme in ("http", "https") and bool(parts.hostname) and valid_port and not (parts.username or parts.query)


async def _measure(given: Namespace) -> dict[str, Any]:
    sender = _sender(given)
    try:
        model = given.model or await _first_model(sender, given.url)
        plan = PromptPlan(
            endpoint=given.endpoint,
            model=model,
            prompt_tokens=given.prompt_tokens,
            shared_prefix_tokens=given.shared_prefix_tokens,
            output_tokens=given.output_tokens,
            temperature=given.temperature,
            ignore_eos=given.ignore_eos,
            seed=given.seed,
        )
        load = Load(
            requests=given.requests,
            concurrency=given.concurrency or 8,
            rate=given.rate,
            warmup=given.warmup,
            timeout_s=given.timeout_s,
            abort_share=given.abort_share,
            seed=given.seed,
        )
        with _progress(given.requests) as progress:
            measured = await Drive(sender, plan, load, progress).run()
    finally:
        await sender.close()
    return _row(given, plan, load, measured)


def _row(given: Namespace, plan: PromptPlan, load: Load, measured: Measured) -> dict[str, Any]:
    asked = {"prompt_tokens": plan.prompt_tokens, "shared_prefix_tokens": plan.shared_prefix_tokens, "output_tokens": plan.output_tokens}
    return {
        "kind": "benchmark",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "program": service.__version__,
        "python": platform.python_version(),
        "label": given.label,
        "url": given.url,
        "client": given.client,
        "endpoint": plan.endpoint,
        "model": plan.model,
        "mode": load.mode,
        "rate": load.rate or None,
        "concurrency": None if load.rate else load.concurrency,
        "warmup": load.warmup,
        "seed": load.seed,
        "asked": {**asked, "temperature": plan.temperature, "ignore_eos": plan.ignore_eos, "abort_share": load.abort_share},
        **summarise(measured, Targets(given.slo_ttft_ms, given.slo_tpot_ms)),
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


@contextlib.contextmanager
def _progress(total: int) -> Iterator[Progress]:
    if not sys.stderr.isatty():
        yield lambda watch: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bar

    columns = (TextColumn("requests"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Bar(*columns, console=Console(stderr=True), refresh_per_second=4) as bar:
        task = bar.add_task("requests", total=total)

        def advance(watch: Watch) -> None:
            if watch.due_s:
                bar.advance(task)

        yield advance


def _print_table(row: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    load = f"{row['rate']} requests/s" if row["rate"] else f"{row['concurrency']} clients"
    table = Table(title=f"{row['model']} · {row['endpoint']} · {load}", title_justify="left")
    for column in ("", "p50", "p90", "p99", "mean", "max"):
        table.add_column(column, justify="left" if not column else "right")
    late = row["sender"]["lateness_ms"]
    spreads = (
        ("time to first token, ms", row["ttft_ms"]),
        ("time per output token, ms", row["tpot_ms"]),
        ("between tokens, ms", row["itl_ms"]),
    )
    for name, spread in (*spreads, ("whole request, ms", row["latency_ms"]), ("sender's lateness, ms", late)):
        table.add_row(name, *(f"{spread[key]:.2f}" if spread else "-" for key in ("p50", "p90", "p99", "mean", "max")))
    console = Console(width=None if sys.stdout.isatty() else 110)
    console.print(table)
    console.print(
        f"{row['completed']} of {row['requests']} requests in {row['duration_s']:.2f} s: {row['requests_per_s']:.2f} requests/s, "
        f"{row['output_tokens_per_s']:.1f} output tokens/s, {row['total_tokens_per_s']:.1f} tokens/s, counted from {row['token_counts']}."
    )
    console.print(
        f"goodput {row['goodput_requests_per_s']:.2f} requests/s ({row['goodput_share']:.1%}); aborted {row['aborted']}; errors "
        f"{row['errors'] or 'none'}; sender used {row['sender']['cpu_share']:.0%} of a core."
    )


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
