"""Tiers: what each compares, and the row of real engines of a tiny model."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from service.cli.tiers import PROFILES, measure_tier
from service.config.load import load_settings
from tests.tiny_models import build_tiny


@pytest.mark.parametrize("tier", PROFILES)
def test_a_profile_is_what_its_flags_say(tier: str) -> None:
    profile = PROFILES[tier]
    settings = load_settings(["--model", "m=/models/m", *profile.flags.split()])
    assert settings.engine.quantize == profile.quantize
    assert settings.scheduler.batch_size == profile.batch_size
    assert profile.baseline_batch <= profile.batch_size and profile.claim > 1


def test_both_sides_run_in_alternating_rounds_and_the_limits_are_measured(tmp_path: Path) -> None:
    row = asyncio.run(measure_tier("edge", build_tiny(tmp_path), 1, 2, (12, 5)))
    assert row["ratio"]["rounds"] == row["tokens_per_s"]["rounds"] == 2
    assert row["ratio"]["min"] <= row["ratio"]["median"] <= row["ratio"]["max"]
    assert row["baseline_tokens_per_s"]["min"] > 0
    assert {"float32", "int8"} == set(row["machine"]) and all(value > 0 for side in row["machine"].values() for value in side.values())
    assert 0 <= row["share_of_limit"]["decode"] < 1.5
    assert (row["clients"], row["prompt_tokens"], row["output_tokens"]) == (4, 12, 5)
