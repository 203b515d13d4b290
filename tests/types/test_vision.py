"""The grid of an image and what images cost, counted by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.types.catalog import V2_3, V3_5
from service.types.vision import FusionSpec, Grid, VisionSpec

EYES = VisionSpec(patch=2, merge=2, dim=8, layers=1, heads=2, mlp_hidden=12, least_tokens=2, most_tokens=9, side_tokens=6)
SIDES = st.integers(1, 20_000)


@pytest.mark.parametrize(
    ("size", "grid"),
    [
        ((8, 8), (2, 2)),
        ((12, 8), (2, 3)),  # width 12, height 8
        ((1, 1), (1, 1)),
        ((4, 4), (1, 1)),
        ((400, 400), (3, 3)),
        ((4000, 4), (1, 6)),
        ((4, 4000), (6, 1)),
        ((400, 100), (2, 4)),
    ],
)
def test_grids_by_hand(size: tuple[int, int], grid: tuple[int, int]) -> None:
    assert EYES.grid(*size) == Grid(*grid)


@given(SIDES, SIDES, st.integers(1, 12))
def test_a_grid_keeps_its_bounds(width: int, height: int, most: int) -> None:
    grid, turned = EYES.grid(width, height, most), EYES.grid(height, width, most)
    assert 1 <= grid.rows <= 6 and 1 <= grid.columns <= 6 and grid.tokens <= min(most, 9)
    assert abs(grid.tokens - turned.tokens) <= 3
    assert grid.rows <= grid.columns or height >= width


def test_parameters_of_the_encoder_by_hand() -> None:
    layer = 2 * 8 + 3 * 8 * 8 + 8 * 8 + 2 * 12 * 8 + 12 * 8
    patch, positions, projector = 12 * 8 + 8, 2 * 12 * 8, (4 * 8 * 16 + 16) + (16 * 16 + 16)
    assert EYES.parameters(16) == patch + positions + layer + 8 + projector


def test_flops_of_an_image_by_hand() -> None:
    matrices = 12 * 8 + 4 * 8 * 8 + 3 * 8 * 12
    assert EYES.flops(3, 16) == 2 * 12 * matrices + 2 * 3 * (4 * 8 * 16 + 16 * 16) + 4 * 12 * 12 * 8


def test_the_fusion_costs_its_matrices_and_what_is_seen() -> None:
    fusion = FusionSpec(after_layers=1, heads=4, kv_heads=2, head_dim=8)
    assert fusion.parameters(16) == 3 * 16 * 32 + 16 * 8 + 2 * 16 * 16 + 2 * 16 + 8
    assert fusion.flops(5, 20, 16) == 2 * 5 * (3 * 16 * 32 + 16 * 8) + 4 * 20 * 32
    assert fusion.image_flops(3, 16) == 2 * 3 * 16 * 2 * 16


def test_a_model_counts_what_it_sees_with() -> None:
    shape = dict(V3_5.shapes)["nano"]
    spec, blind = V3_5.spec(shape, image_id=4), V3_5.spec(replace(shape, vision=None), image_id=4)
    assert spec.vision is not None and spec.fusion is not None
    assert spec.parameters - blind.parameters == spec.vision.parameters(spec.dim) + spec.fusion.parameters(spec.dim)
    assert spec.matmul_parameters == blind.matmul_parameters
    assert (spec.modalities, blind.modalities) == (("text", "image"), ("text",))
    assert spec.image_flops(4) == spec.vision.flops(4, spec.dim) + spec.fusion.image_flops(4, spec.dim)
    assert (spec.image_token_values(), blind.image_token_values(), blind.image_flops(4)) == (256 + 4 * 128, 0, 0)
    assert (blind.image_id, blind.layers) == (None, V2_3.spec(shape).layers)
