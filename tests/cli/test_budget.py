"""KV memory of several versions is planned before loading: shares fit, named budgets are kept, the impossible is refused with numbers."""

from __future__ import annotations

from pathlib import Path

import pytest

from service.checkpoints.manifest import Manifest, read_manifest
from service.cli.budget import RUNTIME_BYTES, plan_demand, share_kv
from service.types.errors import CapacityError
from service.types.settings import EngineSettings, SchedulerSettings
from tests.tiny_models import build_tiny

GIB = 1 << 30
SCHEDULER = SchedulerSettings(batch_size=8)


@pytest.fixture(scope="module")
def manifests(tmp_path_factory: pytest.TempPathFactory) -> list[Manifest]:
    root: Path = tmp_path_factory.mktemp("budget")
    return [read_manifest(build_tiny(root / "a", "llama")), read_manifest(build_tiny(root / "b", "llama", max_position_embeddings=512))]


def test_one_version_plans_for_itself(manifests: list[Manifest]) -> None:
    assert share_kv(manifests[:1], EngineSettings(), SCHEDULER, 0) == [0]


def test_a_named_budget_is_kept(manifests: list[Manifest]) -> None:
    assert share_kv(manifests, EngineSettings(kv_bytes=5), SCHEDULER, 0) == [5, 5]


def test_with_room_everybody_gets_what_it_can_use(manifests: list[Manifest]) -> None:
    shares = share_kv(manifests, EngineSettings(), SCHEDULER, 64 * GIB)
    assert shares == [8 * manifest.spec.kv_layout().sequence_bytes(manifest.spec.context_tokens, 4) for manifest in manifests]
    half = share_kv(manifests, EngineSettings(dtype="float16"), SCHEDULER, 64 * GIB)
    assert [2 * share for share in half] == shares


def test_without_room_shares_follow_need_and_fit(manifests: list[Manifest]) -> None:
    free = 2 * RUNTIME_BYTES + (8 << 20)
    first, second = share_kv(manifests, EngineSettings(), SCHEDULER, free)
    assert 0 < first < second and first + second <= 4 << 20
    assert second == pytest.approx(2 * first, rel=0.01)


def test_what_cannot_fit_is_refused_with_numbers(manifests: list[Manifest]) -> None:
    with pytest.raises(CapacityError, match=r"2 versions need \d+ MiB .* 300 MiB are free"):
        share_kv(manifests, EngineSettings(), SCHEDULER, RUNTIME_BYTES)


def test_on_demand_each_version_is_planned_as_if_alone(manifests: list[Manifest]) -> None:
    plans = plan_demand(manifests, EngineSettings(), SCHEDULER, 64 * GIB)
    assert [kv for kv, _ in plans] == share_kv(manifests, EngineSettings(), SCHEDULER, 64 * GIB)
    assert all(RUNTIME_BYTES < total - kv < RUNTIME_BYTES + GIB for kv, total in plans)
    assert plan_demand(manifests, EngineSettings(kv_bytes=7), SCHEDULER, GIB)[0][0] == 7
    tight = RUNTIME_BYTES + (8 << 20)
    assert all(total <= tight for _, total in plan_demand(manifests, EngineSettings(), SCHEDULER, tight))


def test_a_version_that_never_fits_is_refused_at_once(manifests: list[Manifest]) -> None:
    with pytest.raises(CapacityError, match=r"needs \d+ MiB .* --memory_bytes"):
        plan_demand(manifests, EngineSettings(), SCHEDULER, RUNTIME_BYTES)
