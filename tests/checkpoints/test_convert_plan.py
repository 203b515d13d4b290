"""What a conversion changes, from specs alone; a difference that is not understood is refused."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from service.checkpoints.convert_plan import Stretch, neutral_of, plan_conversion
from service.checkpoints.pieces import parameter_shapes
from service.types.catalog import LINES, V1_0, V2_3, Shape
from service.types.errors import CheckpointError
from service.types.model_spec import DenseMlp, ModelSpec, RopeScaling

SHAPE = Shape(vocab_size=30, dim=24, layers=3, heads=6, kv_heads=2, mlp_hidden=40, context_tokens=64, head_dim=8)


def changed(spec: ModelSpec, layer: int | None = None, **attention: Any) -> ModelSpec:
    """The spec with fields of one layer's attention, or of every layer's, changed."""
    layers = tuple(
        replace(one, attention=replace(one.attention, **attention)) if layer in (None, index) else one
        for index, one in enumerate(spec.layers)
    )
    return replace(spec, layers=layers)


@pytest.mark.parametrize("line", LINES, ids=lambda line: line.label)
def test_a_line_to_itself_is_a_copy(line: Any) -> None:
    plan = plan_conversion(line.spec(SHAPE, (3,), 1), line)
    assert plan.source == plan.target and not (plan.filled or plan.dropped or plan.losses or plan.notes)
    assert set(plan.copied) == set(parameter_shapes(plan.target))


def test_gates_are_filled_and_dropped() -> None:
    plain = replace(changed(V1_0.spec(SHAPE), gate=False), family="llama", line=None)
    plan = plan_conversion(plain, V2_3)
    assert len(plan.filled) == 6 and not plan.losses and plan.target == V2_3.spec(SHAPE)
    assert {plan.filled[f"layers.2.attention.gate.{leaf}"].value for leaf in ("weight", "bias")} == {0.0, 32.0}
    ungated = replace(V1_0, gated_heads=False)
    assert len(plan_conversion(V1_0.spec(SHAPE), ungated).dropped) == 6
    assert neutral_of("layers.0.attention.qkv.weight") is None


@pytest.mark.parametrize(("window", "losses"), [(64, 0), (63, 1), (1, 1)])
def test_a_window_counts_within_the_context(window: int, losses: int) -> None:
    plan = plan_conversion(changed(V1_0.spec(SHAPE), window=window), V2_3)
    assert len(plan.losses) == losses
    assert not losses or plan.losses == (f"a token sees all tokens before it where it saw {window}",)


def test_each_loss_is_said_once() -> None:
    spec = changed(changed(V1_0.spec(SHAPE), window=5), layer=1, window=6)
    assert len(plan_conversion(spec, V2_3, Stretch(32)).losses) == 3


@pytest.mark.parametrize("change", [{"scale": 0.5}, {"softcap": 30.0}], ids=str)
def test_what_no_line_has_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError, match=f"{next(iter(change))} is .* cannot have"):
        plan_conversion(changed(V1_0.spec(SHAPE), **change), V2_3)


def test_layers_that_differ_are_refused() -> None:
    spec = V1_0.spec(SHAPE)
    for odd in (
        replace(spec, layers=(*spec.layers[:2], replace(spec.layers[2], mlp=DenseMlp(48)))),
        changed(spec, layer=2, qkv_bias=True),
        changed(spec, layer=2, kv_heads=6),
    ):
        with pytest.raises(CheckpointError):
            plan_conversion(odd, V2_3)


def test_a_scaled_rotation_is_kept() -> None:
    scaled = plan_conversion(V1_0.spec(SHAPE), V1_0, Stretch(256, RopeScaling.YARN)).target
    assert plan_conversion(scaled, V2_3).target.rope == scaled.rope
    assert plan_conversion(scaled, V2_3, Stretch(128)).target.rope == scaled.rope
