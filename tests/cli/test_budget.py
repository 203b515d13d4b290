"""KV memory of several versions is planned before loading: shares fit, named budgets are kept, the impossible is refused with numbers."""

from __future__ import annotations

from pathlib import Path

import pytest

from service.checkpoints.manifest import Manifest, read_manifest
from service.cli.budget import RUNTIME_BYTES, plan_demand, share_kv
from service.types.catalog import V4_8
from service.types.errors import CapacityError
from service.types.settings import EngineSettings, SchedulerSettings
from tests.tiny_models import build_tiny, build_tiny_line

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
    assert share_kv(manifests, EngineSettings(kv_cache_dtype="bfloat16"), SCHEDULER, 64 * GIB) == half


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


def test_quantised_weights_are_planned_as_they_are_kept(tmp_path: Path) -> None:
    wide = read_manifest(build_tiny_line(tmp_path / "wide", V4_8, dim=256, mlp_hidden=512, vocab_size=2048))

    def total(**engine: str) -> int:
        return plan_demand([wide], EngineSettings(kv_bytes=1, **engine), SCHEDULER, GIB)[0][1]

    whole, weights = total(quantize="none"), 4 * wide.spec.parameters
    assert 0.7 * weights < whole - total(quantize="int8") < 0.75 * weights
    assert total(quantize="int4") < total(quantize="int8")
    assert total(device="cpu") == total(quantize="int8") and total() == whole, "auto is the line's own where the device is known"


def test_encoded_images_are_planned(tmp_path: Path) -> None:
    seeing = read_manifest(build_tiny_line(tmp_path / "seeing"))
    small, large = (
        plan_demand([seeing], EngineSettings(kv_bytes=1, image_cache_bytes=size << 20), SCHEDULER, GIB)[0][1] for size in (8, 72)
    )
    assert large - small == pytest.approx(64 << 20, rel=0.01)
    with pytest.raises(CapacityError, match="before any KV cache"):
        plan_demand([seeing], EngineSettings(), SCHEDULER, RUNTIME_BYTES + (32 << 20))
