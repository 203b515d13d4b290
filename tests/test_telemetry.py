from __future__ import annotations

import asyncio
import json
import re

import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse

from service.schedulers.accounting import StepCost
from service.schedulers.choice import Demand
from service.schedulers.router import Router
from service.telemetry import METRICS, VLLM_NAMES, Telemetry, log_event
from service.types.request import ImageInput
from tests.fakes import fake_spec
from tests.schedulers.support import ask, metric, read_all, small_backend, with_router


def served() -> Telemetry:
    """The metrics after requests that end in every way, a preemption, a refusal and a worker's death."""
    telemetry = Telemetry(tier=("given", "--batch_size 4"))
    backend = small_backend(blocks=15, die_at_steps=frozenset({6}))

    async def body(router: Router) -> None:
        requests = [ask("hello world, hello", 14, seed=index, route="/v1/completions") for index in range(5)]
        streams = router.submit([*requests, ask("x", 100, route="/v1/chat/completions")][:5])
        with pytest.raises(Exception, match="context"):
            router.submit([ask("hello", 5000)])
        await asyncio.sleep(0.05)
        streams[0].cancel()
        await read_all(streams)
        await router.hold(router.choose("auto", Demand())[0])
        picture = ImageInput(2, 1, 3, "one", b"pixels")
        await read_all(router.submit([ask("hello world, hello", 3, route="/v1/chat/completions", images=(picture,))]))

    with_router(body, backend, telemetry)
    return telemetry


def test_every_declared_metric_is_filled_and_carries_the_labels():
    families = {family.name: family for family in parse(served().snapshot().render()[0].decode())}
    for row in METRICS:
        family = families[f"deepseek_{row.name}".removesuffix("_total")]
        assert family.documentation == row.help
        for sample in family.samples:
            assert {"version", "tier", "device", *row.labels} <= set(sample.labels)
            assert sample.labels["version"] == "v2.3@abababababab"


def test_outcomes_add_up_to_what_was_accepted_and_tokens_to_what_was_billed():
    telemetry = served()
    assert metric(telemetry, "requests_total") == 6
    assert metric(telemetry, "tier_info", how="given", flags="--batch_size 4") == 1
    assert metric(telemetry, "requests_total", outcome="cancelled") == 1
    assert metric(telemetry, "requests_total", outcome="length") == 5
    assert metric(telemetry, "admission_rejections_total", reason="context_length_exceeded") == 1
    assert metric(telemetry, "worker_restarts_total", reason="died") == 1
    assert metric(telemetry, "preemptions_total") > 0
    assert (metric(telemetry, "images_total", result="encoded"), metric(telemetry, "image_tokens_total")) == (1, 3)
    gates = [metric(telemetry, "fusion_gate_total", modality=modality, head="0") for modality in ("text", "image")]
    assert metric(telemetry, "fusion_rows_total") > 0 and gates[0] == 3 * gates[1] > 0
    generated = metric(telemetry, "generation_tokens_total")
    assert 4 * 14 + 3 <= generated < 5 * 14 + 3
    gaps = metric(telemetry, "inter_token_latency_seconds_count")
    assert gaps == generated - metric(telemetry, "time_to_first_token_seconds_count")
    assert metric(telemetry, "request_duration_seconds_count", route="/v1/chat/completions") == 1


def test_both_formats_parse():
    telemetry = served()
    text, kind = telemetry.snapshot().render(openmetrics=True)
    assert kind.startswith("application/openmetrics-text")
    assert len(list(parse_openmetrics(text.decode()))) == len(METRICS)
    text, kind = telemetry.snapshot().render()
    assert kind.startswith("text/plain")
    assert len(list(parse(text.decode()))) >= len(METRICS)


def test_a_snapshot_does_not_follow_what_is_counted_after_it():
    telemetry = Telemetry()
    metrics = telemetry.version("v", "cpu", "d")
    counter, distribution, sizes = metrics.value("preemptions_total"), metrics.distribution("step_tokens"), [3]
    metrics.watch("requests_running", lambda: sizes[0])
    distribution.observe(2)
    before = telemetry.snapshot()
    counter.add()
    distribution.observe(2)
    sizes[0] = 9
    metrics.value("requests_total", "stop").add()
    samples = {sample.name: sample.value for family in before.collect() for sample in family.samples}
    assert samples["deepseek_preemptions_total"] == 0 and samples["deepseek_requests_running"] == 3
    assert samples["deepseek_step_tokens_count"] == 1 and samples["deepseek_step_tokens_sum"] == 2
    assert "deepseek_requests_total" not in samples


def test_vllms_names_show_the_same_numbers_with_its_labels():
    telemetry = Telemetry("vllm")
    metrics = telemetry.version("v", "cpu", "d")
    metrics.value("requests_running").set(3)
    metrics.value("requests_total", "stop").add(2)
    metrics.value("requests_total", "cancelled").add()
    metrics.value("model_loaded").set(1)
    metrics.latencies("/v1/completions").first.observe(0.3)
    text = telemetry.snapshot().render()[0].decode()
    for line in text.splitlines():
        assert line.startswith("#") or line.split(" ")[0] in telemetry.snapshot().render(openmetrics=True)[0].decode()
    parsed = {(sample.name, sample.labels.get("finished_reason")): sample for family in parse(text) for sample in family.samples}
    assert parsed["vllm:num_requests_running", None].value == 3
    assert parsed["vllm:num_requests_running", None].labels == {"model_name": "v", "tier": "cpu", "device": "d"}
    assert parsed["vllm:request_success_total", "stop"].value == 2
    assert parsed["vllm:request_success_total", "abort"].value == 1
    assert parsed["vllm:time_to_first_token_seconds_sum", None].value == 0.3
    assert "deepseek_requests_running" in text and "vllm:model_loaded" not in text
    plain = Telemetry()
    plain.version("v", "cpu", "d").value("requests_running").set(3)
    assert "vllm:" not in plain.snapshot().render()[0].decode()


def test_aliases_are_of_metrics_that_exist_and_of_one_kind():
    assert set(VLLM_NAMES) <= {metric.name for metric in METRICS}
    assert len(set(VLLM_NAMES.values())) == len(VLLM_NAMES)
    kinds = {metric.name: metric.kind for metric in METRICS}
    assert all(
        (kinds[ours] == "counter") == theirs.endswith("_total") for ours, theirs in VLLM_NAMES.items() if theirs != "iteration_tokens_total"
    )


def test_a_distribution_counts_at_and_below_its_bounds():
    distribution = Telemetry().version("v", "cpu", "d").distribution("step_tokens")
    for value in (0.5, 1.0, 1.5):
        distribution.observe(value)
    distribution.observe(3, times=5)
    distribution.observe(1e9)
    rows = dict(distribution.cumulative())
    assert (rows["1.0"], rows["2.0"], rows["4.0"], rows["+Inf"]) == (2, 3, 8, 9)
    assert distribution.total == pytest.approx(18 + 1e9)


def test_children_are_bound_once_and_labels_are_checked():
    telemetry = Telemetry()
    metrics = telemetry.version("v", "cpu", "d")
    assert telemetry.version("v", "cpu", "d") is metrics
    assert metrics.value("requests_total", "stop") is metrics.value("requests_total", "stop")
    assert metrics.latencies("/a") is metrics.latencies("/a")
    with pytest.raises(ValueError, match="outcome"):
        metrics.value("requests_total")


def test_dropping_forgets_gauges_and_empty_counters_of_that_version_only():
    telemetry = Telemetry()
    old, other = telemetry.version("v", "none", "none"), telemetry.version("w", "none", "none")
    for metrics in (old, other):
        metrics.value("model_loaded").set(1)
        metrics.value("preemptions_total")
        metrics.value("prompt_tokens_total").add(3)
        metrics.distribution("step_tokens")
    old.distribution("step_seconds", "decode").observe(0.1)
    old.drop()
    names = [(sample.name, sample.labels["version"]) for family in telemetry.snapshot().collect() for sample in family.samples]
    assert ("deepseek_prompt_tokens_total", "v") in names
    assert ("deepseek_model_loaded", "v") not in names
    assert ("deepseek_model_loaded", "w") in names
    assert ("deepseek_step_tokens_count", "v") not in names
    assert ("deepseek_step_tokens_count", "w") in names
    assert ("deepseek_step_seconds_count", "v") in names


@pytest.mark.parametrize(("tokens", "context"), [(1, 10.0), (64, 300.5), (3, 5000.0)])
def test_the_cost_of_a_step_is_the_models_own(tokens, context):
    spec = fake_spec()
    context = min(context, spec.context_tokens)
    flops, size = StepCost(spec, 4).of(tokens, tokens, tokens, context)
    assert flops == pytest.approx(spec.flops(tokens, context))
    assert size == pytest.approx(spec.bytes_read(tokens, context, 4, 4))


def test_a_log_line_is_one_json_object_with_its_time(capsys):
    log_event("sequence_failed", request_id="r1", code="x", odd={1, 2})
    (line,) = capsys.readouterr().err.splitlines()
    fields = json.loads(line)
    assert (fields["event"], fields["request_id"]) == ("sequence_failed", "r1")
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", fields["time"])
