"""What `deepseek-benchmark` shows on a terminal: progress, the table of one row, the table of a comparison.

It does not know how rows come about. Invariant: tables go to stdout, progress to stderr and only when that is a terminal.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bar
from rich.table import Table

from service.loadgen.compare import Difference, Side
from service.loadgen.drive import Progress
from service.loadgen.watch import Watch

_COLOURS = {"better": "green", "worse": "red", "within spread": "dim"}


@contextlib.contextmanager
def progress_bar(total: int) -> Iterator[Progress]:
    """A bar that moves with every measured request."""
    if not sys.stderr.isatty():
        yield lambda watch: None
        return
    columns = (TextColumn("requests"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Bar(*columns, console=Console(stderr=True), refresh_per_second=4) as bar:
        task = bar.add_task("requests", total=total)

        def advance(watch: Watch) -> None:
            if watch.due_s:
                bar.advance(task)

        yield advance


def print_row(row: dict[str, Any]) -> None:
    """The table of one row."""
    load = row["scenario"] or (f"{row['rate']} requests/s" if row["rate"] else f"{row['concurrency']} clients")
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
    for kind, numbers in row["kinds"].items():
        first = numbers["ttft_ms"]
        wait = f"first token p50 {first['p50']:.2f}, p99 {first['p99']:.2f} ms" if first else "no first token"
        console.print(f"{kind}: {numbers['completed']} of {numbers['requests']} requests, {numbers['met']} met every target, {wait}")
    console.print(
        f"{row['completed']} of {row['requests']} requests in {row['duration_s']:.2f} s: {row['requests_per_s']:.2f} requests/s, "
        f"{row['output_tokens_per_s']:.1f} output tokens/s, {row['total_tokens_per_s']:.1f} tokens/s, counted from {row['token_counts']}."
    )
    console.print(
        f"goodput {row['goodput_requests_per_s']:.2f} requests/s ({row['goodput_share']:.1%}); aborted {row['aborted']}; errors "
        f"{row['errors'] or 'none'}; sender used {row['sender']['cpu_share']:.0%} of a core."
    )


def print_comparison(differences: Sequence[Difference]) -> None:
    """Both sides with their spread, and the ratio of the medians."""
    table = Table(title="before and after: median (smallest to largest), ratio of the medians", title_justify="left")
    for column in ("scenario", "measure", "before", "after", "ratio", ""):
        table.add_column(column, justify="left" if column in ("scenario", "measure", "") else "right")
    for one in differences:
        colour = _COLOURS[one.verdict]
        cells = (one.scenario, one.measure, _shown(one.before), _shown(one.after), f"{one.ratio:.3f}")
        table.add_row(*cells, f"[{colour}]{one.verdict}[/{colour}]")
    Console(width=None if sys.stdout.isatty() else 140).print(table)


def print_servers(row: Mapping[str, Any]) -> None:
    """A line for each measure and server: its spread over the rounds, its ratio to the first server with that spread, and the verdict."""
    servers = row["servers"]
    first = servers[0]["name"]
    table = Table(title=f"{row['scenario']} · {row['rounds']} alternating rounds · ratios to {first}", title_justify="left")
    for column in ("measure", "server", "median (smallest to largest)", "ratio (smallest to largest)", ""):
        table.add_column(column, justify="right" if "(" in column else "left")
    for measure in servers[0]["measures"]:
        for server in servers:
            side, ratio = server["measures"].get(measure), server.get("ratios", {}).get(measure)
            verdict = ratio["verdict"] if ratio else ""
            colour = _COLOURS.get(verdict, "dim")
            shown = _spread(side, 2) if side else "-"
            table.add_row(
                measure if server is servers[0] else "",
                server["name"],
                shown,
                _spread(ratio, 3) if ratio else "",
                f"[{colour}]{verdict}[/{colour}]" if verdict else "",
                end_section=server is servers[-1],
            )
    console = Console(width=None if sys.stdout.isatty() else 140)
    console.print(table)
    for server in servers:
        console.print(
            f"{server['name']}: {server['model']}, {server['completed']} of {server['requests']} requests, {server['output_tokens']} "
            f"output tokens counted from {server['token_counts']}; errors {server['errors'] or 'none'}.",
            highlight=False,
        )
    if len({server["output_tokens"] for server in servers}) > 1:
        console.print("The servers made different numbers of tokens: compare tokens/s and TPOT, or give --ignore_eos.")


def _spread(side: Mapping[str, float], digits: int) -> str:
    return f"{side['median']:.{digits}f} ({side['least']:.{digits}f} to {side['most']:.{digits}f})"


def _shown(side: Side) -> str:
    return f"{side.median:.2f} ({side.least:.2f} to {side.most:.2f}; {side.rows})"
