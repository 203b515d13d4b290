from __future__ import annotations

import pytest

from service.schedulers.service_levels import ServiceLevels
from service.telemetry import Telemetry
from service.types.request import FinishReason
from service.types.settings import SchedulerSettings
from tests.schedulers.support import ask, generate, metric, small_backend
from tests.schedulers.test_planner import add, make_planner


def judged(reason: FinishReason, first_s: float, last_s: float, tokens: int, now: float, **targets: float) -> dict[str, str]:
    """The verdicts on a sequence that arrived at 10 s: targets of 1 s to the first token and 0.1 s for each other."""
    telemetry = Telemetry()
    settings = SchedulerSettings(**{"slo_ttft_ms": 1000, "slo_tpot_ms": 100, **targets})
    levels = ServiceLevels(telemetry.version("v", "cpu", "d"), settings)
    sequence = add(make_planner())
    sequence.arrived_s, sequence.first_token_s, sequence.last_token_s = 10.0, first_s, last_s
    sequence.tokens += [97] * tokens
    levels.ended(sequence, reason, now)
    counted = {
        (level, result): metric(telemetry, "slo_requests_total", slo=level, result=result)
        for level in ("ttft", "tpot", "all")
        for result in ("met", "missed")
    }
    assert all(count in (0, 1) for count in counted.values())
    return {level: result for (level, result), count in counted.items() if count}


@pytest.mark.parametrize(
    ("first_s", "last_s", "tokens", "expected"),
    [
        (10.9, 11.9, 11, {"ttft": "met", "tpot": "met", "all": "met"}),
        (11.1, 11.9, 11, {"ttft": "missed", "tpot": "met", "all": "missed"}),
        (10.9, 12.0, 11, {"ttft": "met", "tpot": "missed", "all": "missed"}),
        (11.1, 13.0, 11, {"ttft": "missed", "tpot": "missed", "all": "missed"}),
        (10.5, 10.5, 1, {"ttft": "met", "tpot": "met", "all": "met"}),
    ],
)
def test_a_whole_answer_is_judged_by_both_targets(first_s, last_s, tokens, expected):
    assert judged(FinishReason.LENGTH, first_s, last_s, tokens, last_s) == expected


def test_a_level_without_a_target_is_not_counted():
    assert judged(FinishReason.STOP, 30.0, 99.0, 3, 99.0, slo_ttft_ms=0, slo_tpot_ms=0) == {"all": "met"}
    assert judged(FinishReason.STOP, 10.5, 99.0, 3, 99.0, slo_tpot_ms=0) == {"ttft": "met", "all": "met"}


def test_what_failed_is_never_good():
    assert judged(FinishReason.ERROR, 10.5, 10.6, 2, 10.7) == {"ttft": "met", "tpot": "met", "all": "missed"}
    assert judged(FinishReason.ERROR, 0.0, 0.0, 0, 10.1) == {"ttft": "missed", "tpot": "missed", "all": "missed"}


def test_a_client_that_left_is_judged_by_what_it_saw():
    assert judged(FinishReason.CANCELLED, 0.0, 0.0, 0, 10.9) == {}
    assert judged(FinishReason.CANCELLED, 0.0, 0.0, 0, 11.1) == {"ttft": "missed", "tpot": "missed", "all": "missed"}
    assert judged(FinishReason.CANCELLED, 10.5, 10.6, 2, 10.7) == {"ttft": "met", "tpot": "met", "all": "met"}


def test_the_loop_judges_every_sequence_once():
    telemetry = Telemetry()
    requests = [ask("hello", 6, seed=index) for index in range(5)]
    generate(requests, small_backend(step_s=0.05), telemetry=telemetry, slo_tpot_ms=10.0)
    assert metric(telemetry, "slo_requests_total", slo="all") == 5
    assert metric(telemetry, "slo_requests_total", slo="ttft", result="met") == 5
    assert metric(telemetry, "slo_requests_total", slo="tpot", result="missed") == 5
