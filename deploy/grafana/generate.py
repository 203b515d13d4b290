"""Writes the dashboards of this directory: one line a panel here, Grafana's many lines in dashboards/*.json.

Run `python deploy/grafana/generate.py`; with `--check` it only says whether the files are current. It knows metrics by name only.
Invariant: every panel filters by the variables tier and version, and reads recorded series (deepseek:…) where there is one.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any, NamedTuple

DASHBOARDS = Path(__file__).parent / "dashboards"
SOURCE = {"type": "prometheus", "uid": "prometheus"}
WHO = 'tier=~"$tier",version=~"$version"'
WIDTH, SHORT, TALL = 24, 4, 8


class Query(NamedTuple):
    """One line of a panel: an expression and the name of its series."""

    expression: str
    legend: str


class Panel(NamedTuple):
    """One panel: `kind` is Grafana's, `unit` too (short, s, percentunit, bytes, reqps, none)."""

    title: str
    kind: str
    unit: str
    queries: tuple[Query, ...]
    about: str = ""


def stat(title: str, unit: str, expression: str, about: str = "") -> Panel:
    """A number."""
    return Panel(title, "stat", unit, (Query(expression, ""),), about)


def lines(title: str, unit: str, *queries: tuple[str, str], about: str = "") -> Panel:
    """Curves over time."""
    return Panel(title, "timeseries", unit, tuple(Query(*query) for query in queries), about)


def percentiles(title: str, series: str, *points: str) -> Panel:
    """Recorded percentiles of one latency."""
    return lines(title, "s", *((f"deepseek:{series}:{point}{{{WHO}}}", "{{version}} " + point) for point in points))


def quantiles(title: str, unit: str, metric: str, by: str = "") -> Panel:
    """Percentiles of a histogram that has no recorded series."""
    labels = ", ".join(filter(None, ("version", by, "le")))
    legend = "{{version}} " + (f"{{{{{by}}}}} " if by else "")
    return lines(
        title,
        unit,
        *(
            (
                f"histogram_quantile({share}, sum by ({labels}) (rate(deepseek_{metric}_bucket{{{WHO}}}[$__rate_interval])))",
                f"{legend}p{share[2:]:0<2}",
            )
            for share in ("0.5", "0.99")
        ),
    )


def rate(metric: str, by: str) -> str:
    """The summed rate of a counter."""
    return f"sum by ({by}) (rate(deepseek_{metric}{{{WHO}}}[$__rate_interval]))"


def gauge(metric: str, by: str) -> str:
    """The summed value of a gauge."""
    return f"sum by ({by}) (deepseek_{metric}{{{WHO}}})"


RESTARTS = f"({gauge('worker_restarts_total', 'version')} or 0 * {gauge('model_loaded', 'version')})"

SERVICE = (
    stat("Versions ready", "none", f"sum(deepseek_model_loaded{{{WHO}}})"),
    stat("Generated tokens/s", "none", f"sum(deepseek:generation_tokens:rate1m{{{WHO}}})"),
    stat("Requests that meet their levels", "percentunit", f'1 - avg(deepseek:slo_missed:ratio5m{{{WHO},slo="all"}})'),
    stat("Running", "none", f"sum(deepseek_requests_running{{{WHO}}})"),
    stat("Waiting", "none", f"sum(deepseek_requests_waiting{{{WHO}}})"),
    stat("Worker's longest silence", "s", f"max(deepseek_worker_silent_seconds{{{WHO}}})"),
    lines(
        "Tokens/s",
        "none",
        (f"deepseek:generation_tokens:rate1m{{{WHO}}}", "{{version}} generated"),
        (f"deepseek:prompt_tokens:rate1m{{{WHO}}}", "{{version}} read"),
    ),
    lines("Requests/s by outcome", "reqps", (f"deepseek:requests:rate1m{{{WHO}}}", "{{version}} {{outcome}}")),
    lines(
        "Goodput, requests/s",
        "reqps",
        (f"deepseek:goodput_requests:rate1m{{{WHO}}}", "{{version}} good"),
        (f"sum by (version) (deepseek:requests:rate1m{{{WHO}}})", "{{version}} all"),
        about="Good requests met --slo_ttft_ms and --slo_tpot_ms.",
    ),
    percentiles("Time to first token", "time_to_first_token_seconds", "p50", "p90", "p99"),
    percentiles("Time per output token", "time_per_output_token_seconds", "p50", "p90", "p99"),
    lines(
        "Queue and pauses, p99",
        "s",
        (f"deepseek:queue_seconds:p99{{{WHO}}}", "{{version}} in the queue"),
        (f"deepseek:inter_token_latency_seconds:p99{{{WHO}}}", "{{version}} between tokens"),
    ),
    lines("Missed levels, share of requests", "percentunit", (f"deepseek:slo_missed:ratio5m{{{WHO}}}", "{{version}} {{slo}}")),
    lines("Refused sequences/s by reason", "reqps", ('sum by (reason) (deepseek:rejections:rate1m{tier=~"$tier|none"})', "{{reason}}")),
    lines(
        "Running and waiting",
        "none",
        (gauge("requests_running", "version"), "{{version}} running"),
        (gauge("requests_waiting", "version"), "{{version}} waiting"),
    ),
    lines("KV cache in use", "percentunit", (f"max by (version, group) (deepseek_kv_cache_usage_ratio{{{WHO}}})", "{{version}} {{group}}")),
    lines(
        "Preemptions/s and worker restarts",
        "none",
        (rate("preemptions_total", "version"), "{{version}} preemptions"),
        (RESTARTS, "{{version}} restarts"),
    ),
    quantiles("Step in the worker", "s", "step_seconds", "kind"),
    lines(
        "Found in the prefix cache, share of prompt tokens", "percentunit", (f"deepseek:prefix_cache_hit:ratio5m{{{WHO}}}", "{{version}}")
    ),
    Panel(
        "Last start by phase",
        "bargauge",
        "s",
        (Query(f"max by (version, phase) (deepseek_startup_seconds{{{WHO}}})", "{{version}} {{phase}}"),),
    ),
    lines("Kernel calls/s", "none", (rate("kernel_dispatch_total", "op, implementation"), "{{op}} {{implementation}}")),
)

TIERS = (
    lines("Generated tokens/s", "none", (f"sum by (tier) (deepseek:generation_tokens:rate1m{{{WHO}}})", "{{tier}}")),
    lines("Goodput, requests/s", "reqps", (f"sum by (tier) (deepseek:goodput_requests:rate1m{{{WHO}}})", "{{tier}}")),
    lines(
        "Share of the memory's limit",
        "percentunit",
        ('deepseek:tier_machine_bytes_share:rate1m{tier=~"$tier"}', "{{tier}}"),
        about="Bytes that the steps had to read by the model's own cost, over what the machine can read.",
    ),
    lines(
        "Share of the arithmetic's limit",
        "percentunit",
        ('deepseek:tier_machine_flops_share:rate1m{tier=~"$tier"}', "{{tier}}"),
        about="Operations by the model's own cost, over what the machine can compute.",
    ),
    lines(
        "Share of the memory's limit by version", "percentunit", (f"deepseek:machine_bytes_share:rate1m{{{WHO}}}", "{{tier}} {{version}}")
    ),
    lines(
        "Share of the arithmetic's limit by version",
        "percentunit",
        (f"deepseek:machine_flops_share:rate1m{{{WHO}}}", "{{tier}} {{version}}"),
    ),
    lines(
        "Time to first token, p99",
        "s",
        (f"max by (tier, version) (deepseek:time_to_first_token_seconds:p99{{{WHO}}})", "{{tier}} {{version}}"),
    ),
    lines(
        "Time per output token, p99",
        "s",
        (f"max by (tier, version) (deepseek:time_per_output_token_seconds:p99{{{WHO}}})", "{{tier}} {{version}}"),
    ),
    lines(
        "Missed levels, share of requests", "percentunit", (f'avg by (tier) (deepseek:slo_missed:ratio5m{{{WHO},slo="all"}})', "{{tier}}")
    ),
    Panel(
        "What the machines can do",
        "bargauge",
        "none",
        (Query('max by (tier, device, kind) (deepseek_machine_limit{tier=~"$tier"})', "{{tier}} {{device}} {{kind}}/s"),),
    ),
    Panel(
        "What runs where", "table", "none", (Query(f"max by (tier, version, device, dtype, program) (deepseek_build_info{{{WHO}}})", ""),)
    ),
)

LONG_CONTEXT = (
    quantiles("Prompt length, tokens", "none", "request_prompt_tokens"),
    quantiles("Generated length, tokens", "none", "request_generation_tokens"),
    quantiles("Reading a prompt", "s", "prefill_seconds"),
    lines("Prompt tokens read/s", "none", (f"deepseek:prompt_tokens:rate1m{{{WHO}}}", "{{version}}")),
    percentiles("Time to first token", "time_to_first_token_seconds", "p50", "p99"),
    lines(
        "Between tokens, p99",
        "s",
        (f"deepseek:inter_token_latency_seconds:p99{{{WHO}}}", "{{version}}"),
        about="Long prompts that are read between decode steps show here.",
    ),
    lines(
        "KV cache in use by group",
        "percentunit",
        (f"max by (version, group) (deepseek_kv_cache_usage_ratio{{{WHO}}})", "{{version}} {{group}}"),
    ),
    lines("KV cache by group", "bytes", (gauge("kv_cache_bytes", "version, group"), "{{version}} {{group}}")),
    lines("Tokens that a later prompt can find", "none", (gauge("prefix_cache_tokens", "version"), "{{version}}")),
    lines(
        "Found in the prefix cache, share of prompt tokens", "percentunit", (f"deepseek:prefix_cache_hit:ratio5m{{{WHO}}}", "{{version}}")
    ),
    quantiles("Positions in a step", "none", "step_tokens"),
    quantiles("Step in the worker", "s", "step_seconds", "kind"),
    lines("Preemptions/s", "none", (rate("preemptions_total", "version"), "{{version}}")),
)

BOARDS = {"service": ("Service", SERVICE), "tiers": ("Hardware tiers", TIERS), "long_context": ("Long context", LONG_CONTEXT)}


def board(name: str) -> dict[str, Any]:
    """One dashboard as Grafana reads it."""
    title, panels = BOARDS[name]
    return {
        "uid": f"deepseek-{name.replace('_', '-')}",
        "title": f"deepseek-service: {title}",
        "tags": ["deepseek-service"],
        "schemaVersion": 39,
        "editable": False,
        "refresh": "10s",
        "time": {"from": "now-30m", "to": "now"},
        "templating": {"list": [_variable("tier", ""), _variable("version", '{tier=~"$tier"}')]},
        "panels": _placed(panels),
    }


def _variable(name: str, of: str) -> dict[str, Any]:
    query = f"label_values(deepseek_model_loaded{of}, {name})"
    shown = {"includeAll": True, "multi": True, "allValue": ".*", "current": {"text": "All", "value": "$__all"}}
    return {"name": name, "type": "query", "datasource": SOURCE, "query": {"query": query, "refId": name}, "refresh": 2, **shown}


def _placed(panels: tuple[Panel, ...]) -> list[dict[str, Any]]:
    """Numbers in one row, curves two in a row."""
    placed, x, y = [], 0, 0
    stats = sum(panel.kind == "stat" for panel in panels) or 1
    for number, panel in enumerate(panels, 1):
        width, height = (WIDTH // stats, SHORT) if panel.kind == "stat" else (WIDTH // 2, TALL)
        if x + width > WIDTH:
            x, y = 0, y + (SHORT if panels[number - 2].kind == "stat" else TALL)
        placed.append(_panel(number, panel, {"x": x, "y": y, "w": width, "h": height}))
        x += width
    return placed


def _panel(number: int, panel: Panel, place: dict[str, int]) -> dict[str, Any]:
    instant = panel.kind != "timeseries"
    targets = [
        {
            "refId": chr(65 + index),
            "datasource": SOURCE,
            "expr": query.expression,
            "legendFormat": query.legend or "__auto",
            "instant": instant,
            "range": not instant,
        }
        for index, query in enumerate(panel.queries)
    ]
    for target in targets if panel.kind == "table" else ():
        target["format"] = "table"
    return {
        "id": number,
        "title": panel.title,
        "description": panel.about,
        "type": panel.kind,
        "datasource": SOURCE,
        "gridPos": place,
        "fieldConfig": {"defaults": {"unit": panel.unit, "min": 0}, "overrides": []},
        "options": {"legend": {"displayMode": "list", "placement": "bottom", "showLegend": True, "calcs": []}}
        if panel.kind == "timeseries"
        else {},
        "targets": targets,
    }


def texts() -> dict[Path, str]:
    """Every file and what it holds."""
    return {DASHBOARDS / f"{name}.json": json.dumps(board(name), indent=1, ensure_ascii=False) + "\n" for name in BOARDS}


def main() -> int:
    """Write or check; the exit code."""
    stale = [path for path, text in texts().items() if not path.is_file() or path.read_text("utf-8") != text]
    if "--check" in sys.argv[1:]:
        print(f"out of date: {', '.join(path.name for path in stale)}" if stale else "current")
        return 1 if stale else 0
    for path, text in texts().items():
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
