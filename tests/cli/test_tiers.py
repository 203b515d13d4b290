"""Tiers: what each compares, and the row of real engines of a tiny model."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from service.cli.tiers import MEASUREMENTS, measure_tier, tuned
from service.config.load import load_settings
from service.config.machine import Machine
from tests.tiny_models import build_tiny


@pytest.mark.parametrize("tier", MEASUREMENTS)
def test_what_is_measured_is_what_the_tier_sets(tier: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("service.config.load.this_machine", lambda: Machine(gpu=False, board="", cores=2, quota=0))
    profile, measured = tuned(tier), MEASUREMENTS[tier]
    for flags in (profile.flags.split(), ["--tier", tier]):
        settings = load_settings(["--model", "m=/models/m", *flags])
        assert (settings.engine.quantize, settings.scheduler.batch_size) == (profile.quantize, profile.batch_size)
    assert measured.baseline_batch <= profile.batch_size and measured.claim > 1


def test_both_sides_run_in_alternating_rounds_and_the_limits_are_measured(tmp_path: Path) -> None:
    row = asyncio.run(measure_tier("edge", build_tiny(tmp_path), 1, 2, (12, 5)))
    assert row["ratio"]["rounds"] == row["tokens_per_s"]["rounds"] == 2
    assert row["ratio"]["min"] <= row["ratio"]["median"] <= row["ratio"]["max"]
    assert row["baseline_tokens_per_s"]["min"] > 0
    assert {"float32", "int8"} == set(row["machine"]) and all(value > 0 for side in row["machine"].values() for value in side.values())
    assert 0 <= row["share_of_limit"]["decode"] < 1.5
    assert (row["clients"], row["prompt_tokens"], row["output_tokens"]) == (4, 12, 5)
