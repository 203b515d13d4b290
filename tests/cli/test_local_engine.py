"""An engine without HTTP: generating at once, scoring prompts, and its end."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from service.cli.local_engine import LocalEngine, Round, round_of
from service.types.errors import ServiceError, StartupError
from service.types.request import TokenLogprob
from service.types.settings import EngineSettings, SchedulerSettings
from tests.tiny_models import build_tiny

SETTINGS = EngineSettings(dtype="float32", device="cpu", threads=1, quantize="int8", quantize_cache="none")


def test_rounds_and_scores_come_from_one_worker(tmp_path: Path) -> None:
    async def run() -> tuple[Round, tuple[TokenLogprob, ...], str]:
        async with LocalEngine(build_tiny(tmp_path), SETTINGS, SchedulerSettings(batch_size=2)) as engine:
            spent = await engine.generate([(1, 2, 3), (4, 5, 6, 7), (8, 9)], 4)
            return spent, await engine.score((1, 2, 3, 4, 5)), engine.info.quantize

    spent, scores, quantize = asyncio.run(run())
    assert spent.output > 0 and spent.decode > 0 and spent.prefill > 0
    assert [entry.token for entry in scores] == [2, 3, 4, 5]
    assert all(entry.logprob < 0 and len(entry.top) == 1 for entry in scores)
    assert quantize == "int8"


def test_what_is_decoded_while_prompts_are_read_is_neither_counted_nor_timed() -> None:
    """Prompts of two sequences read one after the other, in steps of a second; what a step gives is told within some milliseconds."""
    early = [(1.0, 1), (2.001, 1), (3.0, 2), (4.0, 1)]
    late = [(2.0, 1), (3.002, 1), (4.002, 1)]
    spent = round_of(0.0, 100, [early, late])
    assert spent.prefill == 50
    assert spent.decode == pytest.approx(5 / 2.002)
    assert spent.output == pytest.approx(8 / 4.002)
    assert round_of(0.0, 4, [[(1.0, 1)], [(2.0, 1)]]) == (2.0, 0.0, 1.0)


def test_a_prompt_that_does_not_fit_is_an_error_and_the_worker_ends(tmp_path: Path) -> None:
    async def run() -> None:
        async with LocalEngine(build_tiny(tmp_path), SETTINGS, SchedulerSettings(batch_size=2)) as engine:
            await engine.generate([(1,) * (engine.info.context_tokens + 1)], 4)

    with pytest.raises(ServiceError):
        asyncio.run(run())


def test_before_it_is_started_there_is_no_worker(tmp_path: Path) -> None:
    with pytest.raises(StartupError, match="worker is not there"):
        _ = LocalEngine(build_tiny(tmp_path), SETTINGS, SchedulerSettings()).info
