from __future__ import annotations

from dataclasses import replace

import pytest

from service.schedulers.accounting import Accounting, StepCost
from service.schedulers.sequence import State
from service.telemetry import Telemetry
from service.types.catalog import V2_3, Shape
from service.types.errors import DeadlineExceeded, InternalError
from service.types.plan import SampledToken, StepResult
from service.types.request import FinishEvent, FinishReason
from service.types.settings import SchedulerSettings
from tests.fakes import FakeBackend, fake_spec
from tests.schedulers.support import metric
from tests.schedulers.test_planner import add, make_planner

SPEC = V2_3.spec(Shape(vocab_size=300, dim=32, layers=3, heads=4, kv_heads=2, mlp_hidden=48, context_tokens=512))


def make(**settings: float) -> tuple[Telemetry, Accounting]:
    telemetry = Telemetry()
    return telemetry, Accounting(telemetry.version("v", "cpu", "none"), fake_spec(), "float32", SchedulerSettings(**settings))


def test_more_of_anything_costs_more_and_weights_are_read_once_a_step():
    cost = StepCost(SPEC, 4)
    flops, size = cost.of(1, 1, 1, 10.0)
    for more in ((2, 1, 1, 10.0), (1, 2, 1, 10.0), (1, 1, 1, 20.0)):
        assert cost.of(*more)[0] > flops
    assert cost.of(1, 1, 2, 10.0)[1] - size == size - SPEC.matmul_parameters * 4
    assert StepCost(SPEC, 2).of(1, 1, 1, 10.0)[1] * 2 == size


def test_quantised_weights_are_counted_at_their_own_size():
    telemetry, accounting = make()
    spec, planner = fake_spec(), make_planner()
    info = FakeBackend().info
    halved = replace(info, quantize="int8", memory_bytes=(("weights", spec.parameters * 2),))
    counted = []
    for told in (info, halved):
        accounting.ready(told, "0", planner)
        before = metric(telemetry, "model_bytes_read_total")
        sequence = add(planner)
        step = planner.plan()
        assert step is not None
        accounting.stepped(step, StepResult(step.plan.step, (SampledToken(0, 97),)), 0)
        counted.append(metric(telemetry, "model_bytes_read_total") - before)
        planner.leave(sequence, State.FINISHED)
    assert counted[0] - counted[1] == spec.matmul_parameters_read * (4 - 2)


def test_keys_and_values_are_counted_in_their_own_type():
    telemetry, accounting = make()
    counted = []
    for kept in ("", "bfloat16"):
        planner = make_planner()
        accounting.ready(replace(FakeBackend().info, kv_cache_dtype=kept), "0", planner)
        before = metric(telemetry, "model_bytes_read_total")
        add(planner)
        step = planner.plan()
        assert step is not None
        accounting.stepped(step, StepResult(step.plan.step, (SampledToken(0, 97),)), 0)
        counted.append(metric(telemetry, "model_bytes_read_total") - before)
    weights = fake_spec().matmul_parameters_read * 4
    assert counted[1] - weights == (counted[0] - weights) / 2 > 0


def test_a_sampled_row_costs_the_head():
    cost = StepCost(SPEC, 4)
    assert cost.of(8, 3, 1, 8.0)[0] - cost.of(8, 2, 1, 8.0)[0] == 2.0 * SPEC.vocab_size * SPEC.dim


def test_steps_are_counted_by_kind():
    telemetry, accounting = make()
    planner = make_planner()
    sequence = add(planner)
    for token in (97, 98):
        step = planner.plan()
        assert step is not None
        accounting.stepped(step, StepResult(step.plan.step, (SampledToken(0, token),), (), 0.25, (("attention", "fake", 2),)), 3)
        sequence.computed, sequence.decoding = step.entries[0].end, True
        sequence.tokens.append(token)
        sequence.in_flight -= 1
    assert metric(telemetry, "step_seconds_count", kind="prefill") == 1
    assert metric(telemetry, "step_seconds_sum", kind="decode") == 0.25
    assert metric(telemetry, "preemptions_total") == 6
    assert metric(telemetry, "kernel_dispatch_total", op="attention") == 4
    assert metric(telemetry, "step_tokens_sum") == 6


@pytest.mark.parametrize(
    ("reason", "error", "outcome"),
    [
        (FinishReason.STOP, None, "stop"),
        (FinishReason.LENGTH, None, "length"),
        (FinishReason.ERROR, InternalError("broken"), "error"),
        (FinishReason.ERROR, DeadlineExceeded("late"), "deadline"),
    ],
)
def test_an_ending_is_counted_once_under_its_outcome(reason, error, outcome):
    telemetry, accounting = make()
    sequence = add(make_planner())
    accounting.ended(sequence, FinishEvent(reason, sequence.usage, error), 7.0)
    counted = {value: metric(telemetry, "requests_total", outcome=value) for value in ("stop", "length", "error", "deadline")}
    assert counted == {value: float(value == outcome) for value in counted}
