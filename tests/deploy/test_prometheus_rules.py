"""The rules by promtool: each alert fires on its planted fault and on nothing else, recorded series are what they claim to be."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml

from service.telemetry import METRICS, NAMESPACE
from tests.deploy.programs import DEPLOY, program
from tests.pages import PAGES, code_spans, table_after

RULES = {name: DEPLOY / "prometheus" / f"{name}.rules.yml" for name in ("recording", "alerts")}
GROUPS = {name: yaml.safe_load(path.read_text("utf-8"))["groups"] for name, path in RULES.items()}
ALERTS = {rule["alert"]: rule for group in GROUPS["alerts"] for rule in group["rules"]}
RECORDED = {rule["record"]: rule for group in GROUPS["recording"] for rule in group["rules"]}
WHO = 'tier="cpu",version="v1",device="cpu",instance="a"'
MINUTES = 390


def promtool(tmp_path: Path, *tests: dict[str, Any]) -> None:
    """Run tests of promtool's own form over all rules."""
    files = [str(path) for path in RULES.values()]
    path = tmp_path / "rules.test.yml"
    path.write_text(yaml.safe_dump({"rule_files": files, "evaluation_interval": "1m", "tests": list(tests)}), "utf-8")
    done = subprocess.run([program("promtool"), "test", "rules", str(path)], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr


def series(name: str, **labels: str) -> str:
    pairs = [WHO, *(f'{key}="{value}"' for key, value in labels.items())]
    return NAMESPACE + name + "{" + ",".join(pairs) + "}"


def healthy() -> dict[str, str]:
    """A version under a load that it carries, a sample a minute."""
    still, count = f"x{MINUTES + 10}", f"x{MINUTES + 10}"
    return {
        'up{job="deepseek",instance="a"}': f"1{still}",
        series("model_loaded"): f"1{still}",
        series("worker_silent_seconds"): f"0.5{still}",
        series("requests_running"): f"4{still}",
        series("requests_waiting"): f"2{still}",
        series("step_tokens_count"): f"0+600{count}",
        series("kv_cache_usage_ratio", group="full"): f"0.6{still}",
        series("preemptions_total"): f"0{still}",
        series("requests_total", outcome="stop"): f"0+100{count}",
        series("slo_requests_total", slo="all", result="met"): f"0+100{count}",
        series("slo_requests_total", slo="all", result="missed"): f"0{still}",
        series("admission_rejections_total", reason="queue_full"): f"0{still}",
    }


class Fault(NamedTuple):
    """What differs from a healthy version, and the alerts that are firing in the last minute."""

    name: str
    differs: dict[str, str]
    fires: set[str]


MISSED = series("slo_requests_total", slo="all", result="missed")
RESTARTS = series("worker_restarts_total", reason="signal_9")
FAULTS = [
    Fault("healthy", {}, set()),
    Fault("target down", {'up{job="deepseek",instance="a"}': "1x385 0x15"}, {"DeepseekTargetDown"}),
    Fault("one scrape lost", {'up{job="deepseek",instance="a"}': "1x380 0 1x20"}, set()),
    Fault("no worker", {series("model_loaded"): "1x385 0x15", series("worker_silent_seconds"): "0.5x385 5+60x15"}, {"DeepseekVersionDown"}),
    Fault("silent worker", {series("worker_silent_seconds"): "0.5x387 20+60x15"}, {"DeepseekWorkerStalled"}),
    Fault("no steps", {series("step_tokens_count"): "0+600x380 228000x20"}, {"DeepseekWorkerStalled"}),
    Fault("idle", {series("step_tokens_count"): "0+600x380 228000x20", series("requests_running"): "4x380 0x20"}, set()),
    Fault("first restart", {RESTARTS: "_x382 1x20"}, {"DeepseekWorkerRestarts"}),
    Fault("another restart", {RESTARTS: "1x382 2x20"}, {"DeepseekWorkerRestarts"}),
    Fault("old restart", {RESTARTS: "_x360 1x40"}, set()),
    Fault("program started again", {RESTARTS: "3x385 _x20"}, set()),
    Fault("a quarter misses for an hour", {MISSED: "0x335 0+30x65"}, {"DeepseekSloBurnFast"}),
    Fault("one in twelve misses for hours", {MISSED: "0+9x400"}, {"DeepseekSloBurnSlow"}),
    Fault("half misses for five minutes", {MISSED: "0x384 0+100x16"}, set()),
    Fault("one in two hundred misses", {MISSED: "0+0.5x400"}, set()),
    Fault(
        "cache full",
        {series("kv_cache_usage_ratio", group="full"): "0.97x400", series("preemptions_total"): "0+6x400"},
        {"DeepseekKvPressure"},
    ),
    Fault("cache full and calm", {series("kv_cache_usage_ratio", group="full"): "0.97x400"}, set()),
    Fault("a preemption now and then", {series("preemptions_total"): "0+1x400"}, set()),
    Fault("queue grows", {series("requests_waiting"): "2x370 2+3x30"}, {"DeepseekQueueGrowing"}),
    Fault("queue stands", {series("requests_waiting"): "50x400"}, set()),
    Fault("queue shrinks", {series("requests_waiting"): "90x370 90-3x30"}, set()),
    Fault("refused for want of room", {series("admission_rejections_total", reason="queue_full"): "0+3x400"}, {"DeepseekRejecting"}),
    Fault("refused for bad input", {series("admission_rejections_total", reason="context_length_exceeded"): "0+90x400"}, set()),
]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_alerts_fire_on_their_fault_and_not_otherwise(fault: Fault, tmp_path: Path) -> None:
    assert set(fault.differs) <= set(healthy()) | {RESTARTS, series("admission_rejections_total", reason="context_length_exceeded")}
    shown = {**healthy(), **fault.differs}
    firing = [{"labels": f'{{alertname="{name}"}}', "value": 1} for name in sorted(fault.fires)]
    promtool(
        tmp_path,
        {
            "interval": "1m",
            "input_series": [{"series": name, "values": values} for name, values in shown.items()],
            "promql_expr_test": [
                {"expr": 'count by (alertname) (ALERTS{alertstate="firing"})', "eval_time": f"{MINUTES}m", "exp_samples": firing}
            ],
        },
    )


def test_every_alert_was_seen_firing_and_a_wrong_expectation_is_seen(tmp_path: Path) -> None:
    assert set().union(*(fault.fires for fault in FAULTS)) == set(ALERTS)
    with pytest.raises(AssertionError, match="DeepseekTargetDown"):
        test_alerts_fire_on_their_fault_and_not_otherwise(FAULTS[1]._replace(fires=set()), tmp_path)


def buckets(name: str, counts: dict[str, int]) -> list[dict[str, str]]:
    return [{"series": series(f"{name}_bucket", route="r", le=le), "values": f"0+{count}x60"} for le, count in counts.items()]


# A sample each 15 s: so many a sample are 1/15 of it a second. 30 of 40 first tokens within 1 s, all within 2.
INPUT = [
    {"series": series("generation_tokens_total"), "values": "0+1500x60"},
    {"series": series("prompt_tokens_total"), "values": "0+3000x60"},
    {"series": series("prompt_tokens_cached_total"), "values": "0+750x60"},
    {"series": series("requests_total", outcome="stop"), "values": "0+30x60"},
    {"series": series("admission_rejections_total", reason="queue_full"), "values": "0+15x60"},
    {"series": series("slo_requests_total", slo="all", result="met"), "values": "0+45x60"},
    {"series": series("slo_requests_total", slo="all", result="missed"), "values": "0+15x60"},
    {"series": series("model_bytes_read_total"), "values": "0+30e9x60"},
    {"series": series("model_flops_total"), "values": "0+15e9x60"},
    {"series": series("machine_limit", kind="bytes"), "values": "20e9x60"},
    {"series": series("machine_limit", kind="flops"), "values": "10e9x60"},
    # A second version in the same process, and the machine's limit once more.
    {"series": series("model_bytes_read_total").replace("v1", "v2"), "values": "0+30e9x60"},
    {"series": series("model_flops_total").replace("v1", "v2"), "values": "0+15e9x60"},
    {"series": series("machine_limit", kind="bytes").replace("v1", "v2"), "values": "20e9x60"},
    {"series": series("machine_limit", kind="flops").replace("v1", "v2"), "values": "10e9x60"},
    *(
        row
        for name in ("time_to_first_token_seconds", "time_per_output_token_seconds", "inter_token_latency_seconds", "queue_seconds")
        for row in buckets(name, {"1.0": 30, "2.0": 40, "+Inf": 40})
    ),
]
EXPECTED: dict[str, tuple[str, float]] = {
    "deepseek:generation_tokens:rate1m": ("", 100),
    "deepseek:prompt_tokens:rate1m": ("", 200),
    "deepseek:requests:rate1m": ('outcome="stop"', 2),
    "deepseek:rejections:rate1m": ('reason="queue_full"', 1),
    "deepseek:prefix_cache_hit:ratio5m": ("", 0.25),
    "deepseek:time_to_first_token_seconds:p50": ("", 20 / 30),
    "deepseek:time_to_first_token_seconds:p90": ("", 1.6),
    "deepseek:time_to_first_token_seconds:p99": ("", 1.96),
    "deepseek:time_per_output_token_seconds:p50": ("", 20 / 30),
    "deepseek:time_per_output_token_seconds:p90": ("", 1.6),
    "deepseek:time_per_output_token_seconds:p99": ("", 1.96),
    "deepseek:inter_token_latency_seconds:p99": ("", 1.96),
    "deepseek:queue_seconds:p99": ("", 1.96),
    "deepseek:goodput_requests:rate1m": ("", 3),
    "deepseek:slo_missed:ratio5m": ('slo="all"', 0.25),
    "deepseek:slo_missed:ratio30m": ('slo="all"', 0.25),
    "deepseek:slo_missed:ratio1h": ('slo="all"', 0.25),
    "deepseek:slo_missed:ratio6h": ('slo="all"', 0.25),
    "deepseek:machine_bytes_share:rate1m": ("", 0.1),
    "deepseek:machine_flops_share:rate1m": ("", 0.1),
    "deepseek:tier_machine_bytes_share:rate1m": ('tier="cpu"', 0.2),
    "deepseek:tier_machine_flops_share:rate1m": ('tier="cpu"', 0.2),
}


def test_recorded_series_are_what_they_claim(tmp_path: Path) -> None:
    assert set(EXPECTED) == set(RECORDED)
    checks = []
    for name, (labels, value) in EXPECTED.items():
        level = labels if ":tier_" in name else ",".join(filter(None, ('tier="cpu",version="v1"', labels)))
        only = "" if ":tier_" in name else '{version="v1"}'
        # In whole millionths, since the quotient of two rates is not exact.
        expression = f"floor({name}{only} * 1e6 + 0.5)"
        wanted = {"expr": expression, "eval_time": "10m", "exp_samples": [{"labels": f"{{{level}}}", "value": round(value * 1e6)}]}
        checks.append(wanted)
    promtool(tmp_path, {"interval": "15s", "input_series": INPUT, "promql_expr_test": checks})


def test_nothing_happened_is_absent_and_not_zero_or_nan(tmp_path: Path) -> None:
    still = [{**row, "values": "5x60"} for row in INPUT]
    ratios = [name for name in RECORDED if ":ratio" in name or name.endswith(("p50", "p90", "p99"))]
    checks = [{"expr": name, "eval_time": "10m", "exp_samples": []} for name in ratios]
    promtool(tmp_path, {"interval": "15s", "input_series": still, "promql_expr_test": checks})


def used_metrics(text: str) -> set[str]:
    return {re.sub(r"_(bucket|sum|count)$", "", name) for name in re.findall(r"\bdeepseek_\w+", text)}


def test_rules_ask_for_metrics_that_exist() -> None:
    known = {NAMESPACE + metric.name for metric in METRICS}
    asked = used_metrics("".join(path.read_text("utf-8") for path in RULES.values()))
    assert asked <= known and len(asked) > 15
    assert used_metrics("rate(deepseek_nothing_total[1m])") - known == {"deepseek_nothing_total"}


def test_alerts_name_only_labels_that_they_have() -> None:
    """A label that the expression sums away would be empty in the message."""
    for name, rule in ALERTS.items():
        asked = set(re.findall(r"\$labels\.(\w+)", rule["annotations"]["summary"]))
        kept = [set(re.split(r",\s*", by)) for by in re.findall(r"by \(([^)]*)\)", rule["expr"])]
        recorded = re.findall(r"deepseek:[\w:]+", rule["expr"])
        kept += [set(re.split(r",\s*", re.findall(r"by \(([^)]*)\)", RECORDED[one]["expr"])[0])) for one in recorded]
        assert asked <= (set.intersection(*kept) if kept else {"instance", "version"}), name


def test_every_alert_is_explained() -> None:
    listed = {code_spans(row[0])[0]: row for row in table_after("docs/operations.md", "alerts")}
    assert set(listed) == set(ALERTS)
    assert all(row[1] == ALERTS[name]["labels"]["severity"] for name, row in listed.items())
    assert "deploy/prometheus" in PAGES["docs/operations.md"]


def test_the_configuration_is_valid() -> None:
    done = subprocess.run(
        [program("promtool"), "check", "config", str(DEPLOY / "prometheus" / "prometheus.yml")],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{len(ALERTS)} rules found" in done.stdout and f"{len(RECORDED)} rules found" in done.stdout
