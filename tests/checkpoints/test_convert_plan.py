"""What a conversion changes, from specs alone; a difference that is not understood is refused."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import pytest

from service.checkpoints.convert_plan import Stretch, neutral_of, plan_conversion
from service.checkpoints.pieces import parameter_shapes
from service.types.catalog import LINES, V1_0, V2_3, V3_5, V5_2, Shape, VersionLine
from service.types.errors import CheckpointError
from service.types.kv_layout import FarSpec
from service.types.model_spec import DenseMlp, ModelSpec, RopeScaling
from service.types.vision import VisionSpec

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
    assert plan.source == plan.target and not (plan.filled or plan.dropped or plan.losses)
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
    assert not losses or plan.losses == (f"a token sees all tokens before it where it saw {window} tokens",)


def test_each_loss_is_said_once() -> None:
    spec = changed(changed(V1_0.spec(SHAPE), window=5), layer=1, window=6)
    assert len(plan_conversion(spec, V2_3, Stretch(32)).losses) == 3


def test_far_blocks_come_with_a_note_and_go_with_a_loss() -> None:
    full, far = V1_0.spec(SHAPE), changed(V1_0.spec(SHAPE), window=16, far=FarSpec())
    sparse = _Sparse(**{entry.name: getattr(V1_0, entry.name) for entry in fields(V1_0)})
    up = plan_conversion(full, sparse)
    assert up.target == far and not up.losses
    assert up.notes == ("prompts of more than 16 tokens are read through a window of 16 and the best blocks behind it",)
    down = plan_conversion(far, V1_0)
    assert down.losses == ("a token sees all tokens before it where it saw 16 tokens and the best blocks behind them (int8)",)
    assert not plan_conversion(far, V1_0, Stretch(16)).losses[1:]


def test_named_dense_layers_read_everything() -> None:
    full = replace(SHAPE, context_tokens=4096)
    plan = plan_conversion(V1_0.spec(full), V5_2, dense_layers=(2, 0, 2))
    assert plan.target == V5_2.spec(replace(full, dense_layers=(0, 2))) and not plan.losses
    again = plan_conversion(plan.target, V5_2)
    assert again.target == plan.target and not again.losses
    other = plan_conversion(plan.target, V5_2, dense_layers=(1,))
    assert other.target == V5_2.spec(replace(full, dense_layers=(1,))) and not other.losses
    assert [note.split(" ")[0] for note in other.notes] == ["prompts", "layers", "the"]
    assert plan_conversion(plan.target, V5_2, dense_layers=()).target == V5_2.spec(full)


@pytest.mark.parametrize(
    ("line", "layers", "words"),
    [
        (V2_3, (0,), "every layer of v2.3 reads everything"),
        (V2_3, (), "every layer of v2.3 reads everything"),
        (V5_2, (3,), "names layer 3, and the model has the layers 0 … 2"),
        (V5_2, (0, 1, 2), "leaves no layer with a window"),
    ],
)
def test_dense_layers_that_no_model_of_the_line_has(line: VersionLine, layers: tuple[int, ...], words: str) -> None:
    with pytest.raises(CheckpointError, match=words):
        plan_conversion(V1_0.spec(SHAPE), line, dense_layers=layers)


class _Sparse(VersionLine):
    """A line whose layers have a window and far blocks."""

    def spec(self, *arguments: Any) -> ModelSpec:
        return changed(super().spec(*arguments), window=16, far=FarSpec())


def test_images_are_a_loss_where_a_line_reads_none() -> None:
    vision = VisionSpec(patch=4, merge=2, dim=8, layers=1, heads=2, mlp_hidden=8, least_tokens=1, most_tokens=4, side_tokens=2)
    seeing = V3_5.spec(replace(SHAPE, vision=vision), image_id=7)
    assert plan_conversion(seeing, V3_5).target == seeing
    plan = plan_conversion(seeing, V2_3)
    assert plan.losses == ("images are no longer read",) and plan.target == V2_3.spec(SHAPE)
    assert {name.partition(".")[0] for name in plan.dropped} == {"vision", "fusion"}
    plan = plan_conversion(V2_3.spec(SHAPE), V3_5)
    assert plan.target.vision is None and plan.notes == ("the model reads text only: it has no patch encoder",)


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
