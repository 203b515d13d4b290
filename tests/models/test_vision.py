"""The patch encoder: grids, independence of images, positions, gradients."""

from __future__ import annotations

import pytest
import torch

from service.models.vision import PatchEncoder
from service.types.vision import Grid, VisionSpec

SPEC = VisionSpec(patch=2, merge=2, dim=8, layers=2, heads=2, mlp_hidden=12, least_tokens=1, most_tokens=16, side_tokens=4)
GRID = Grid(2, 3)


@pytest.fixture(scope="module")
def encoder() -> PatchEncoder:
    torch.manual_seed(0)
    made = PatchEncoder(SPEC, 16, 1e-6, "cpu", torch.float32)
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return made


def pixels_of(grid: Grid, images: int = 1, seed: int = 0) -> torch.Tensor:
    draw = torch.Generator().manual_seed(seed)
    shape = (images, grid.rows * SPEC.unit, grid.columns * SPEC.unit, 3)
    return torch.randint(0, 256, shape, generator=draw, dtype=torch.uint8)


@torch.no_grad()
def test_tokens_have_the_grids_number_and_the_decoders_width(encoder: PatchEncoder) -> None:
    for grid in (Grid(1, 1), GRID, Grid(4, 4)):
        assert encoder(pixels_of(grid, 2), grid).shape == (2, grid.tokens, 16)


@torch.no_grad()
def test_images_of_a_batch_do_not_see_each_other(encoder: PatchEncoder) -> None:
    pixels = pixels_of(GRID, 3)
    alone = torch.cat([encoder(pixels[index : index + 1], GRID) for index in range(3)])
    torch.testing.assert_close(encoder(pixels, GRID), alone)


@torch.no_grad()
def test_every_token_sees_every_patch_and_knows_its_place(encoder: PatchEncoder) -> None:
    pixels = pixels_of(GRID)
    changed = pixels.clone()
    changed[0, 0, 0, 0] ^= 255
    before, after = encoder(pixels, GRID)[0], encoder(changed, GRID)[0]
    assert all(not torch.equal(before[row], after[row]) for row in range(GRID.tokens))
    flat = encoder(torch.full_like(pixels, 90), GRID)[0]
    assert len({tuple(row.tolist()) for row in flat}) == GRID.tokens


@torch.no_grad()
def test_patches_are_cut_where_they_lie(encoder: PatchEncoder) -> None:
    """Without layers and positions, a token is a function of its own unit of pixels."""
    layers, encoder.layers = encoder.layers, torch.nn.ModuleList()
    try:
        pixels = pixels_of(GRID)
        changed = pixels.clone()
        changed[0, SPEC.unit :, SPEC.unit : 2 * SPEC.unit] ^= 255  # row 1, column 1
        differs = (encoder(pixels, GRID) != encoder(changed, GRID)).any(-1)[0]
    finally:
        encoder.layers = layers
    assert differs.tolist() == [False, False, False, False, True, False]


def test_every_parameter_learns(encoder: PatchEncoder) -> None:
    encoder(pixels_of(Grid(4, 4)), Grid(4, 4)).square().sum().backward()
    still = [name for name, value in encoder.named_parameters() if value.grad is None or not value.grad.abs().sum() > 0]
    encoder.zero_grad()
    assert still == []
