"""Tiers: what each compares, and the row of real engines of a tiny model."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace

import pytest

from service.checkpoints.bundled import bundled_directory
from service.checkpoints.long_context import adapt
from service.checkpoints.manifest import read_manifest
from service.cli import tiers
from service.cli.tiers import MEASUREMENTS, Measurement, measure_tier, sides
from service.config.load import load_settings
from service.config.machine import Machine
from service.types.catalog import V2_3
from service.types.settings import AttentionSettings
from tests.tiny_models import build_tiny

SPEC = read_manifest(bundled_directory(V2_3)).spec


@pytest.mark.parametrize(("kept", "element_bytes"), [("", 4), ("bfloat16", 2)])
def test_the_share_of_the_limit_counts_the_cache_as_it_is_kept(kept: str, element_bytes: int) -> None:
    info = SimpleNamespace(limits={"bytes": 1e9, "flops": 1e15}, memory_bytes={"weights": 0}, dtype="float32", kv_cache_dtype=kept)
    engine = SimpleNamespace(info=info, manifest=SimpleNamespace(spec=SPEC))
    shares = tiers._shares(engine, 8, [SimpleNamespace(prefill=1.0, decode=1e5)], (1000, 48))
    assert shares["decode"] == round(1e5 * SPEC.bytes_read(8, 1024.0, 0, element_bytes) / 1e9 / 8, 3) > 0


@pytest.mark.parametrize("tier", ["cpu", "edge"])
def test_what_is_measured_is_what_the_tier_sets(tier: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("service.config.load.this_machine", lambda: Machine(gpu=False, board="", cores=2, quota=0))
    baseline, recommended = sides(tier, SPEC, 1, 100)
    for flags in (recommended.flags.split(), ["--tier", tier]):
        settings = load_settings(["--model", "m=/models/m", *flags])
        assert settings.engine.quantize == recommended.engine.quantize == "int8"
        assert settings.scheduler == recommended.scheduler
    assert (baseline.engine.dtype, baseline.engine.quantize, baseline.engine.backend) == ("float32", "none", "torch")
    assert baseline.scheduler.batch_size <= recommended.scheduler.batch_size and baseline.attention == recommended.attention


def test_the_gpu_tier_is_measured_against_both_full_attentions() -> None:
    baseline, between, recommended = sides("gpu", SPEC, 0, 16_000)
    assert [side.engine.device for side in (baseline, between, recommended)] == ["cuda"] * 3
    assert [side.engine.dtype for side in (baseline, between, recommended)] == ["float32", "float16", "float16"]
    assert (baseline.attention.attention_window, between.attention.attention_window) == (0, 0)
    assert recommended.attention.attention_window == 2048 and recommended.engine.backend == "auto"
    assert recommended.flags == "--dtype float16 --attention_window 2048 --batch_size 256 --step_tokens 2048"
    settings = load_settings(["--model", "m=/models/m", *recommended.flags.split()])
    assert (settings.attention, settings.scheduler) == (recommended.attention, recommended.scheduler)


def test_full_attention_of_a_model_with_far_blocks_is_a_window_over_everything() -> None:
    spec = adapt(SPEC, AttentionSettings(attention_window=64))
    assert sides("gpu", spec, 0, 1000)[0].attention.attention_window == 1000


@pytest.mark.slow
def test_a_tier_with_a_window_has_a_row_of_three_sides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The gpu tier as it runs on a GPU, here on a CPU with a short window."""
    monkeypatch.setitem(MEASUREMENTS, "gpu", Measurement(2, 2, 2.3, "cpu", "bfloat16", 64))
    row = asyncio.run(measure_tier("gpu", build_tiny(tmp_path), 1, 2, (100, 5)))
    assert row["between"].keys() == {"--dtype bfloat16"} and row["between"]["--dtype bfloat16"]["rounds"] == 2
    assert set(row["machine"]) == {"float32", "--dtype bfloat16", "recommended"} and row["backend"] == "torch"
    assert row["flags"].startswith("--dtype bfloat16 --attention_window 64") and row["share_of_limit"]["prefill"] > 0


def test_both_sides_run_in_alternating_rounds_and_the_limits_are_measured(tmp_path: Path) -> None:
    row = asyncio.run(measure_tier("edge", build_tiny(tmp_path), 1, 2, (12, 5)))
    assert row["ratio"]["rounds"] == row["tokens_per_s"]["rounds"] == 2
    assert row["ratio"]["min"] <= row["ratio"]["median"] <= row["ratio"]["max"]
    assert row["baseline_tokens_per_s"]["min"] > 0
    assert {"float32", "recommended"} == set(row["machine"]) and row["between"] == {}
    assert all(value > 0 for side in row["machine"].values() for value in side.values())
    assert 0 <= row["share_of_limit"]["decode"] < 1.5
    assert (row["clients"], row["prompt_tokens"], row["output_tokens"]) == (4, 12, 5)
