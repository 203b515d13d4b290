"""Muon's step and who gets it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from service.models.build import build, init_weights
from service.train.optimizer import Muon, build_optimizers, orthogonalize, set_rates
from service.train.prepare import PreparedRun
from service.train.recipe import Recipe


@pytest.mark.parametrize("shape", [(24, 24), (16, 48), (48, 16)])
def test_orthogonalised_matrices_have_singular_values_near_one(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    before, after = torch.linalg.svdvals(matrix), torch.linalg.svdvals(orthogonalize(matrix))
    assert before.max() / before.min() > 2
    assert float(after.min()) > 0.6 and float(after.max()) < 1.3


def test_a_fused_matrix_steps_as_its_parts_would() -> None:
    generator = torch.Generator().manual_seed(1)
    start, gradient = torch.randn(12, 8, generator=generator), torch.randn(12, 8, generator=generator)
    fused = torch.nn.Parameter(start.clone())
    fused.grad = gradient.clone()
    Muon([{"params": [fused], "splits": [8, 4]}], 0.1, 0.9, 0.5).step()
    for rows in (slice(0, 8), slice(8, 12)):
        part = torch.nn.Parameter(start[rows].clone())
        part.grad = gradient[rows].clone()
        Muon([{"params": [part]}], 0.1, 0.9, 0.5).step()
        assert torch.allclose(fused[rows], part)


def test_matrices_of_layers_get_muon_and_the_rest_adamw(prepared: PreparedRun, recipe_with: Callable[..., Recipe]) -> None:
    model = build(prepared.spec, "cpu", torch.float32)
    adamw, muon = build_optimizers(model, prepared.spec, recipe_with().optimizer)
    names = {id(weight): name for name, weight in model.named_parameters()}
    chosen = {names[id(weight)]: group for group in muon.param_groups for weight in group["params"]}
    assert set(chosen) == {
        f"layers.{layer}.{name}.weight" for layer in range(2) for name in ("attention.qkv", "attention.out", "mlp.gate_up", "mlp.down")
    }
    assert chosen["layers.0.attention.qkv.weight"]["splits"] == [32, 16, 16]
    assert chosen["layers.0.mlp.gate_up.weight"]["splits"] == [48, 48]
    rest = {names[id(weight)] for group in adamw.param_groups for weight in group["params"]}
    assert rest | set(chosen) == set(names.values()) and not rest & set(chosen)


def test_adamw_alone(prepared: PreparedRun, recipe_with: Callable[..., Recipe]) -> None:
    model = build(prepared.spec, "cpu", torch.float32)
    (only,) = build_optimizers(model, prepared.spec, recipe_with(optimizer={"kind": "adamw", "weight_decay": 0.25}).optimizer)
    assert [group["weight_decay"] for group in only.param_groups] == [0.25, 0.0]


def test_rates_scale_from_the_base(prepared: PreparedRun, recipe_with: Callable[..., Recipe]) -> None:
    model = build(prepared.spec, "cpu", torch.float32)
    init_weights(model, 0)
    optimizers = build_optimizers(model, prepared.spec, recipe_with(optimizer={"matrix_rate": 0.5, "rest_rate": 0.25}).optimizer)
    set_rates(optimizers, 0.5)
    set_rates(optimizers, 0.1)
    assert {group["lr"] for group in optimizers[0].param_groups} == {0.025}
    assert {group["lr"] for group in optimizers[1].param_groups} == {0.05}
