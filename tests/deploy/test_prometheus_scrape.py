"""A real Prometheus reads the real service: every metric that is counted arrives, with its labels, and the rules give series."""

from __future__ import annotations

import httpx

from service.telemetry import METRICS, NAMESPACE, VLLM_NAMES, VLLM_NAMESPACE
from tests.deploy.test_prometheus_rules import RECORDED
from tests.deploy.watched import Watched

# Nothing dies here, nobody asks for `auto`, and the tiny model has neither images nor far blocks.
NOT_SEEN = {
    "worker_restarts_total",
    "version_choices_total",
    "images_total",
    "image_tokens_total",
    "fusion_rows_total",
    "fusion_gate_total",
    "far_blocks_read_total",
}


def sample_name(name: str, kind: str) -> str:
    return f"{name}_bucket" if kind == "histogram" else name


async def test_every_metric_arrives_with_its_labels(watched: Watched) -> None:
    names = {sample_name(NAMESPACE + metric.name, metric.kind): metric for metric in METRICS if metric.name not in NOT_SEEN}
    found = await watched.until_answered(names)
    for name, metric in names.items():
        for row in found[name]:
            assert {"job", "instance", "version", "tier", "device", *metric.labels} <= set(row["metric"]), name
    assert found["deepseek_model_loaded"][0]["metric"]["version"].startswith("tiny@")
    assert float(found["deepseek_model_loaded"][0]["value"][1]) == 1


async def test_vllms_names_arrive(watched: Watched) -> None:
    kinds = {metric.name: metric.kind for metric in METRICS}
    names = [sample_name(VLLM_NAMESPACE + theirs, kinds[ours]) for ours, theirs in VLLM_NAMES.items()]
    found = await watched.until_answered(names)
    assert all(row["metric"]["model_name"].startswith("tiny@") for rows in found.values() for row in rows)


async def test_every_recorded_series_gets_values(watched: Watched) -> None:
    found = await watched.until_answered(RECORDED)
    shares = [float(row["value"][1]) for name, rows in found.items() if "share" in name for row in rows]
    assert len(shares) >= 4 and all(0 < share < 1 for share in shares)
    assert 0 < float(found["deepseek:prefix_cache_hit:ratio5m"][0]["value"][1]) < 1


async def test_no_alert_fires_on_a_healthy_service(watched: Watched) -> None:
    await watched.until_answered(["deepseek:requests:rate1m"])
    async with httpx.AsyncClient(trust_env=False) as client:
        rules = (await client.get(f"{watched.prometheus}/api/v1/rules")).json()["data"]["groups"]
        assert await watched.query(client, 'ALERTS{alertstate="firing"}') == []
    health = [(rule["name"], rule["health"]) for group in rules for rule in group["rules"]]
    assert len(health) > 25 and [entry for entry in health if entry[1] == "err"] == []
