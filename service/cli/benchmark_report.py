"""One HTML page of benchmark rows: a table, and for each row its latencies by percentile and its course over time.

It does not know how rows come about. Invariants: the page is whole in one file, without scripts and without anything loaded from elsewhere;
every text of a row is escaped.
"""

from __future__ import annotations

import html
import io
from collections.abc import Sequence
from typing import Any

from service.loadgen.compare import scenario_of
from service.loadgen.summary import CURVE_POINTS
from service.types.errors import StartupError

_NAMES = {"ttft_ms": "first token", "tpot_ms": "output token, mean", "itl_ms": "between tokens", "latency_ms": "whole request"}
_COLOURS = {"ttft_ms": "#1f6fb4", "tpot_ms": "#2f8f4e", "itl_ms": "#b07a16", "latency_ms": "#7a5aa6"}
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1100px; margin: 2rem auto; padding: 0 1rem; color: #1b1f24; background: #fff }
h1 { font-size: 1.5rem } h2 { font-size: 1.15rem; margin-top: 2.2rem } p { margin: .4rem 0 } .about { color: #57606a }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; margin: 1rem 0 }
th, td { padding: .35rem .6rem; border-bottom: 1px solid #d8dee4; text-align: right } th:first-child, td:first-child { text-align: left }
th { background: #f6f8fa; font-weight: 600 } .plots { display: flex; flex-wrap: wrap; gap: 1rem } .plots svg { width: 520px; height: auto }
.bad { color: #b3261e; font-weight: 600 }
"""


def report(rows: Sequence[dict[str, Any]]) -> str:
    """The page. Raises StartupError where matplotlib is missing."""
    parts = [f"<h1>deepseek-benchmark: {len(rows)} {'row' if len(rows) == 1 else 'rows'}</h1>", _overview(rows)]
    parts += [_section(row) for row in rows]
    head = f"<meta charset='utf-8'><title>deepseek-benchmark</title><style>{_STYLE}</style>"
    return f"<!doctype html>\n<html lang='en'><head>{head}</head>\n<body>{''.join(parts)}</body></html>\n"


def _overview(rows: Sequence[dict[str, Any]]) -> str:
    heads = (
        "load",
        "label",
        "requests",
        "errors",
        "requests/s",
        "output tokens/s",
        "goodput",
        "TTFT p50 / p99 ms",
        "TPOT p50 / p99 ms",
        "date",
    )
    lines = ["".join(f"<th>{head}</th>" for head in heads)]
    for row in rows:
        errors = sum(row["errors"].values())
        cells = (
            scenario_of(row),
            row["label"],
            row["requests"],
            f"<span class='bad'>{errors}</span>" if errors else "0",
            f"{row['requests_per_s']:.2f}",
            f"{row['output_tokens_per_s']:.1f}",
            f"{row['goodput_share']:.1%}",
            _pair(row["ttft_ms"]),
            _pair(row["tpot_ms"]),
            row["date"][:16].replace("T", " "),
        )
        lines.append("".join(f"<td>{cell if index == 3 else html.escape(str(cell))}</td>" for index, cell in enumerate(cells)))
    return "<table>" + "".join(f"<tr>{line}</tr>" for line in lines) + "</table>"


def _pair(spread: dict[str, float] | None) -> str:
    return f"{spread['p50']:.1f} / {spread['p99']:.1f}" if spread else "-"


def _section(row: dict[str, Any]) -> str:
    sender, slo = row["sender"], row["slo"]
    targets = ", ".join(f"{name[:4].upper()} ≤ {limit:g} ms" for name, limit in slo.items() if limit) or "no targets"
    late = sender["lateness_ms"]
    notes = [
        f"{row['model']} at {row['url']}, {row['mode']} loop, seed {row['seed']}, {row['cores']} cores, load average {row['load_average']}",
        f"{row['completed']} completed, {row['aborted']} aborted, errors {row['errors'] or 'none'}; "
        f"{targets}: {row['goodput_share']:.1%} good",
        f"sender: {sender['cpu_share']:.0%} of a core, late by p99 {late['p99']:.2f} ms" if late else "sender: nothing was sent",
    ]
    plots = _latency_plot(row) + _time_plot(row) if row["curves"].get("ttft_ms") else ""
    text = "".join(f"<p class='about'>{html.escape(note)}</p>" for note in notes)
    return f"<h2>{html.escape(scenario_of(row))} {html.escape(row['label'])}</h2>{text}{_kinds(row)}<div class='plots'>{plots}</div>"


def _kinds(row: dict[str, Any]) -> str:
    if not row["kinds"]:
        return ""
    lines = ["<th>kind</th><th>requests</th><th>completed</th><th>met</th><th>TTFT p50 / p99 ms</th><th>TPOT p50 / p99 ms</th>"]
    for kind, numbers in row["kinds"].items():
        cells = (kind, numbers["requests"], numbers["completed"], numbers["met"], _pair(numbers["ttft_ms"]), _pair(numbers["tpot_ms"]))
        lines.append("".join(f"<td>{html.escape(str(cell))}</td>" for cell in cells))
    return "<table>" + "".join(f"<tr>{line}</tr>" for line in lines) + "</table>"


def _latency_plot(row: dict[str, Any]) -> str:
    figure, axes = _figure("percentile", "ms", "Latency by percentile")
    for name, curve in row["curves"].items():
        if curve:
            axes.plot(CURVE_POINTS, [max(value, 1e-2) for value in curve], color=_COLOURS[name], label=_NAMES[name])
    for limit in filter(None, (row["slo"]["ttft_ms"], row["slo"]["tpot_ms"])):
        axes.axhline(limit, color="#b3261e", linewidth=0.8, linestyle=":")
    axes.set_yscale("log")
    axes.set_xlim(0, 100)
    return _svg(figure, axes)


def _time_plot(row: dict[str, Any]) -> str:
    line = row["timeline"]
    width_s = line["width_s"]
    times = [index * width_s for index in range(len(line["due"]))]
    figure, axes = _figure("seconds", "requests/s", "The load over time")
    for name, colour in (("due", "#8c959f"), ("ended", "#2f8f4e"), ("failed", "#b3261e")):
        if any(line[name]):
            axes.step(times, [count / width_s for count in line[name]], where="post", color=colour, label=name)
    right = axes.twinx()
    right.plot(
        times, [float("nan") if value is None else value for value in line["ttft_p50_ms"]], ".", color=_COLOURS["ttft_ms"], markersize=4
    )
    right.set_ylabel("first token p50, ms", color=_COLOURS["ttft_ms"])
    right.set_ylim(bottom=0)
    axes.set_ylim(bottom=0)
    return _svg(figure, axes)


def _figure(x: str, y: str, title: str) -> tuple[Any, Any]:
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError:
        raise StartupError("--report needs matplotlib: pip install 'deepseek-service[train]', or leave --report out.") from None
    matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "report", "font.family": "sans-serif", "font.size": 9})
    figure = Figure(figsize=(5.6, 3.3), layout="constrained")
    axes = figure.add_subplot()
    axes.set(xlabel=x, ylabel=y, title=title)
    axes.grid(True, color="#d8dee4", linewidth=0.6)
    return figure, axes


def _svg(figure: Any, axes: Any) -> str:
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    text = io.StringIO()
    figure.savefig(text, format="svg", metadata={"Date": None})
    return text.getvalue()[text.getvalue().index("<svg") :]
