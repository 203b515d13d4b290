"""Every scenario against our own server with real models: each request is read, answered and counted, and none fails."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from loadtests.served_scenarios import RUNS, models, run_scenario, served
from tests.test_scenarios import NAMES

pytestmark = pytest.mark.slow
# Shorter than what rows are kept of; another rate would take the place of burst's phases.
SHORT: dict[str, dict[str, float]] = {
    "burst": {"requests": 20},
    "long_document": {"requests": 2},
    "rag": {"requests": 10, "rate": 4.0},
    "replay": {"requests": 12},
}


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with served(models(tmp_path_factory.mktemp("served"))) as url:
        yield url


def test_every_scenario_is_run() -> None:
    assert set(RUNS) == NAMES


@pytest.mark.parametrize("name", sorted(RUNS))
def test_scenario(address: str, name: str) -> None:
    changed = SHORT.get(name, {"requests": 24, "rate": 8.0})
    row = run_scenario(address, name, changed)
    assert row["errors"] == {} and row["failures"] == {}
    assert row["completed"] + row["aborted"] == changed["requests"]
    assert row["output_tokens"] > 0 and row["ttft_ms"]["p50"] > 0
    if name == "long_document":
        assert row["prompt_tokens"] >= 2 * 16000 and row["output_tokens"] == 2 * 64
    if name in ("mixed_versions", "multimodal", "soak"):
        assert all(kind["completed"] > 0 for kind in row["kinds"].values()) and len(row["kinds"]) >= 2
    if name == "soak":
        assert row["aborted"] > 0
