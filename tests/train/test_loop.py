"""The loop: it learns, obeys its recipe, and a killed run goes on as if nothing had happened."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from service.models.build import build
from service.train.loop import Trainer, compute_dtype
from service.train.prepare import PreparedRun
from service.train.recipe import Recipe
from service.train.start import start
from service.types.errors import CheckpointError


def trainer(prepared: PreparedRun, recipe: Recipe, clock: Callable[[], float] | None = None) -> Trainer:
    model = build(prepared.spec, "cpu", torch.float32)
    return Trainer(recipe, model, prepared.train, prepared.identity, clock or (lambda: 0.0))


def losses(run: Trainer, steps: int) -> list[float]:
    return [run.step().loss for _ in range(steps)]


def test_loss_goes_down(prepared: PreparedRun, recipe_with: Callable[..., Recipe]) -> None:
    seen = losses(trainer(prepared, recipe_with(schedule={"steps": 30})), 30)
    assert seen[0] == pytest.approx(torch.log(torch.tensor(float(prepared.spec.vocab_size))).item(), rel=0.05)
    assert sum(seen[-5:]) / 5 < 0.8 * seen[0]


def test_a_killed_run_goes_on_with_the_same_curve(prepared: PreparedRun, recipe_with: Callable[..., Recipe], tmp_path: Path) -> None:
    whole = trainer(prepared, recipe_with())
    expected = losses(whole, 20)
    first = trainer(prepared, recipe_with())
    begun = losses(first, 10)
    first.save(tmp_path / "state.pt")
    losses(first, 3)  # work that the kill takes back
    second = trainer(prepared, recipe_with())
    second.resume(tmp_path / "state.pt")
    assert second.state.step == 10 and second.progress == 0.5
    assert begun + losses(second, 10) == expected
    for name, weight in whole.model.state_dict().items():
        assert torch.equal(weight, second.model.state_dict()[name])
        assert torch.equal(whole.averaged()[name], second.averaged()[name])
    assert second.state == whole.state


def test_a_state_of_another_run_is_refused(prepared: PreparedRun, recipe_with: Callable[..., Recipe], tmp_path: Path) -> None:
    run = trainer(prepared, recipe_with())
    run.save(tmp_path / "state.pt")
    other = Trainer(recipe_with(), build(prepared.spec, "cpu", torch.float32), prepared.train, "another")
    with pytest.raises(CheckpointError, match="another recipe, corpus, tokenizer, --teacher or --init"):
        other.resume(tmp_path / "state.pt")


def test_a_damaged_state_is_refused(prepared: PreparedRun, recipe_with: Callable[..., Recipe], tmp_path: Path) -> None:
    run = trainer(prepared, recipe_with())
    run.save(tmp_path / "state.pt")
    (tmp_path / "state.pt").write_bytes((tmp_path / "state.pt").read_bytes()[:1000])
    with pytest.raises(CheckpointError, match="cannot be read"):
        run.resume(tmp_path / "state.pt")


def test_a_state_that_runs_code_is_refused(prepared: PreparedRun, recipe_with: Callable[..., Recipe], tmp_path: Path) -> None:
    torch.save({"identity": Path("x")}, tmp_path / "state.pt")
    with pytest.raises(CheckpointError):
        trainer(prepared, recipe_with()).resume(tmp_path / "state.pt")


def test_passes_do_not_change_the_gradient(prepared: PreparedRun, recipe_with: Callable[..., Recipe]) -> None:
    small = losses(trainer(prepared, recipe_with(schedule={"micro_tokens": 64})), 4)
    large = losses(trainer(prepared, recipe_with(schedule={"micro_tokens": 256})), 4)
    assert small == pytest.approx(large, rel=2e-4)


OBEYED: list[dict[str, Any]] = [
    {"seed": 5},
    {"schedule": {"batch_tokens": 512}},
    {"schedule": {"warmup_steps": 9}},
    {"schedule": {"decay_from": 0.1}},
    {"schedule": {"floor": 0.9, "decay_from": 0.1}},
    {"schedule": {"steps": 8}},
    {"schedule": {"lengths": [{"until": 1.0, "tokens": 16}]}},
    {"optimizer": {"kind": "adamw"}},
    {"optimizer": {"matrix_rate": 0.05}},
    {"optimizer": {"rest_rate": 0.01}},
    {"optimizer": {"momentum": 0.5}},
    {"optimizer": {"weight_decay": 0.9}},
    {"optimizer": {"beta1": 0.5}},
    {"optimizer": {"beta2": 0.5}},
    {"optimizer": {"clip": 0.001}},
    {"dtype": "bfloat16"},
    {"dtype": "float16"},
]


@pytest.mark.parametrize("changes", OBEYED, ids=str)
def test_what_a_recipe_says_is_done(prepared: PreparedRun, recipe_with: Callable[..., Recipe], changes: dict[str, Any]) -> None:
    changed = losses(trainer(prepared, recipe_with(**changes)), 6)
    assert all(math.isfinite(loss) for loss in changed)
    assert changed != losses(trainer(prepared, recipe_with()), 6)


@pytest.mark.parametrize("changes", [{"segments": {"tokens": 16, "memory_tokens": 16}}, {"quantise": {"start": 0.0}}], ids=str)
def test_parts_of_a_recipe_are_obeyed(prepared: PreparedRun, recipe_with: Callable[..., Recipe], changes: dict[str, Any]) -> None:
    runs = [start(replace(prepared, recipe=recipe_with(**given)), "cpu", 1) for given in ({}, changes)]
    plain, changed = (losses(run, 4) for run in runs)
    assert all(math.isfinite(loss) for loss in changed) and changed != plain
    assert changed == pytest.approx(plain, rel=0.05)


def test_a_recipe_that_recomputes_layers_learns_the_same(prepared: PreparedRun, recipe_with: Callable[..., Recipe]) -> None:
    runs = [start(replace(prepared, recipe=recipe_with(gradient_checkpointing=on)), "cpu", 1) for on in (False, True)]
    saved: list[int] = []
    for run in runs:
        sizes: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda tensor, sizes=sizes: sizes.append(tensor.nbytes) or tensor, lambda x: x):
            losses(run, 1)
        saved.append(sum(sizes))
    assert losses(runs[0], 3) == pytest.approx(losses(runs[1], 3), rel=1e-4) and saved[1] < 0.7 * saved[0]


def test_the_average_follows_its_recipe(prepared: PreparedRun, recipe_with: Callable[..., Recipe]) -> None:
    off, late = trainer(prepared, recipe_with(average={"decay": 0.0})), trainer(prepared, recipe_with(average={"start": 0.5}))
    losses(off, 20), losses(late, 9)
    assert not off.averaged() and not late.averaged()
    losses(late, 11)
    name = "layers.0.mlp.down.weight"
    assert late.state.averaged_steps == 10 and not torch.equal(late.averaged()[name], late.model.state_dict()[name])


def test_minutes_are_a_budget_of_the_clock(prepared: PreparedRun, recipe_with: Callable[..., Recipe], tmp_path: Path) -> None:
    def ticking() -> Iterator[float]:
        now = 0.0
        while True:
            yield now
            now += 6.0

    ticks = ticking()
    run = trainer(prepared, recipe_with(schedule={"steps": 0, "minutes": 1.0}), lambda: next(ticks))
    progress = [run.step().progress for _ in range(4)]
    assert progress == pytest.approx([0.1, 0.2, 0.3, 0.4])
    run.save(tmp_path / "state.pt")
    later = trainer(prepared, run.recipe, lambda: next(ticks))
    later.resume(tmp_path / "state.pt")
    assert later.progress == pytest.approx(0.4)


def test_compute_types(prepared: PreparedRun) -> None:
    model, cpu = build(prepared.spec, "cpu", torch.float32), torch.device("cpu")
    assert compute_dtype("float16", model, cpu) == torch.float16
    assert compute_dtype("auto", model, cpu) in {torch.float32, torch.bfloat16}


def test_master_weights_stay_float32(prepared: PreparedRun, recipe_with: Callable[..., Recipe]) -> None:
    run = trainer(prepared, recipe_with(dtype="bfloat16"))
    losses(run, 2)
    assert {weight.dtype for weight in run.model.state_dict().values()} == {torch.float32}
