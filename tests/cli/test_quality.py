"""Perplexity and agreement of quantised weights and narrower caches, through real engines of a tiny model."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from service.cli import quality
from service.cli.quality import measure_quality
from service.types.errors import SettingsError
from service.types.request import TokenLogprob
from tests.tiny_models import build_tiny

TEXT = "The quick brown fox jumps over the lazy dog. " * 60


@pytest.fixture
def short_stretches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quality, "STRETCH_TOKENS", 32)


def test_every_form_scores_the_same_tokens_and_int8_is_near(tmp_path: Path, short_stretches: None) -> None:
    row = asyncio.run(measure_quality(build_tiny(tmp_path), ("int8", "int4"), TEXT, 200, 1))
    assert row["tokens"] == 200 // 32 * 31
    assert set(row["forms"]) == {"int8", "int4"}
    assert 0.9 < row["forms"]["int8"]["ratio"] < 1.1
    assert row["forms"]["int8"]["agreement"] >= row["forms"]["int4"]["agreement"] > 0
    assert abs(row["forms"]["int8"]["ratio"] - 1) <= abs(row["forms"]["int4"]["ratio"] - 1)


def test_caches_of_every_type_are_scored(tmp_path: Path, short_stretches: None) -> None:
    row = asyncio.run(measure_quality(build_tiny(tmp_path), ("kv_bfloat16", "kv_float16", "kv_int8"), TEXT, 200, 1))
    ratios = {kind: form["ratio"] for kind, form in row["forms"].items()}
    assert set(ratios) == {"kv_bfloat16", "kv_float16", "kv_int8"} and all(0.95 < ratio < 1.05 for ratio in ratios.values())
    found = {form["perplexity"] for form in row["forms"].values()}
    assert len(found) > 1, "no cache was any other than another"


def test_a_text_too_short_to_compare_is_refused(tmp_path: Path, short_stretches: None) -> None:
    with pytest.raises(SettingsError, match="at least 64 are needed"):
        asyncio.run(measure_quality(build_tiny(tmp_path), ("int8",), "short", 200, 1))


def test_a_form_over_its_bound_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def entries(token: int, logprob: float) -> list[TokenLogprob]:
        return [TokenLogprob(1, logprob, ((token, logprob),))] * 4

    async def scores(directory: Path, form: quality.Form, *_: object) -> tuple[list[TokenLogprob], int]:
        return {"none": entries(1, -1.0), "int8": entries(1, -1.009), "int4": entries(2, -1.04)}[form.quantize], 4

    monkeypatch.setattr(quality, "_scores", scores)
    forms = asyncio.run(measure_quality(tmp_path, ("int8", "int4"), "", 0, 1))["forms"]
    assert forms["int8"]["within_bound"] and forms["int8"]["agreement"] == 1.0
    assert not forms["int4"]["within_bound"] and forms["int4"]["agreement"] == 0.0
    assert forms["int4"]["ratio"] == pytest.approx(2.718281828**0.04, abs=1e-4)
