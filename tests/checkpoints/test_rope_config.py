from __future__ import annotations

from typing import Any

import pytest

from service.checkpoints.fields import Fields
from service.checkpoints.rope_config import read_rope
from service.types.errors import CheckpointError
from service.types.model_spec import RopeScaling, RopeSpec


def read(config: dict[str, Any], trained: int = 100) -> tuple[RopeSpec, int]:
    return read_rope(Fields(config, "config.json"), 16, trained)


def scaled(**rope: Any) -> dict[str, Any]:
    return {"rope_scaling": rope}


def test_no_scaling() -> None:
    assert read({}) == (RopeSpec(10_000.0, 16, original_context=100), 100)
    assert read({"rope_theta": 5, "rope_scaling": None})[0].theta == 5.0
    assert read({"rope_parameters": {"rope_type": "default", "rope_theta": 7.0}})[0].theta == 7.0


@pytest.mark.parametrize(
    ("config", "kind", "reach"),
    [
        (scaled(type="linear", factor=4), RopeScaling.LINEAR, 400),
        (scaled(rope_type="dynamic", factor=2.5), RopeScaling.DYNAMIC, 250),
        (scaled(type="yarn", factor=4.0, original_max_position_embeddings=25), RopeScaling.YARN, 100),
        (scaled(type="yarn", factor=4.0, original_max_position_embeddings=100), RopeScaling.YARN, 400),
        (scaled(rope_type="llama3", factor=8, low_freq_factor=1, high_freq_factor=4), RopeScaling.LLAMA3, 100),
    ],
)
def test_kinds_and_how_far_they_reach(config: dict[str, Any], kind: RopeScaling, reach: int) -> None:
    spec, context = read(config)
    assert (spec.scaling, context) == (kind, reach)


def test_yarn_without_a_factor_takes_the_ratio_of_the_contexts() -> None:
    assert read(scaled(type="yarn", original_max_position_embeddings=20))[0].factor == 5.0


def test_the_original_context_outside_the_object_wins() -> None:
    config = {**scaled(type="yarn", factor=2.0, original_max_position_embeddings=30), "original_max_position_embeddings": 40}
    assert read(config)[0].original_context == 40


@pytest.mark.parametrize(
    ("config", "name"),
    [
        (scaled(rope_type="longrope", factor=2.0), "rope_type"),
        (scaled(factor=2.0), "rope_type"),
        (scaled(type="linear"), "factor"),
        (scaled(type="linear", factor="2"), "factor"),
        (scaled(type="linear", factor=0), "factor"),
        (scaled(type="linear", factor=2.0, beta_fast=3), "beta_fast"),
        (scaled(type="default", mrope_section=[1, 2]), "mrope_section"),
        (scaled(rope_type="llama3", factor=8, high_freq_factor=4), "low_freq_factor"),
        (scaled(rope_type="llama3", factor=8, low_freq_factor=4, high_freq_factor=4), "high_freq_factor"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "full_attention"),
        ({"rope_scaling": "linear"}, "rope_scaling"),
        ({"rope_theta": -1}, "rope_theta"),
    ],
)
def test_refused_by_name(config: dict[str, Any], name: str) -> None:
    with pytest.raises(CheckpointError, match=rf": {name}\b"):
        read(config)
