"""Distillation and int8 training from recipe to row, with a teacher published by a run of its own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from service.checkpoints.load import load
from service.checkpoints.manifest import read_manifest
from service.checkpoints.store import save
from service.models.build import build, init_weights
from service.models.layers import DIFFERENTIABLE, FAKE_INT8
from service.train.evaluate import held_out_loss
from service.train.prepare import PreparedRun, prepare
from service.train.publish import _row
from service.train.recipe import Recipe
from service.train.run import conclude
from service.train.source import Source, read_source
from service.train.start import start
from service.types.catalog import V4_8
from service.types.errors import SettingsError
from tests.train.conftest import TINY

DISTIL = {"kl": 0.4, "mse": 0.2, "temperature": 2.0}


@pytest.fixture(scope="module")
def teacher(prepared: PreparedRun, tmp_path_factory: pytest.TempPathFactory) -> Source:
    model = build(prepared.spec, "cpu", torch.float32)
    init_weights(model, 8)
    directory = tmp_path_factory.mktemp("teacher") / "model"
    save(directory, prepared.spec, model.state_dict(), prepared.tokenizer.files(prepared.spec.context_tokens), dtype="float32")
    return read_source(directory)


def student_run(recipe: Recipe, library: Path, teacher: Source) -> PreparedRun:
    vocabulary = teacher.manifest.spec.vocab_size
    run = prepare(replace(recipe, vocab_size=vocabulary), library, teacher)
    shape = replace(TINY, vocab_size=vocabulary, layers=4, shared_layers=2)
    return replace(run, line=V4_8, spec=V4_8.spec(shape, (run.tokenizer.end_id,)))


def test_a_light_student_learns_in_int8_and_is_published_whole(
    library: Path, recipe_with: Callable[..., Recipe], teacher: Source, tmp_path: Path
) -> None:
    recipe = recipe_with(distil=DISTIL, quantise={"start": 0.5}, line="4.8", schedule={"steps": 12})
    run = student_run(recipe, library, teacher)
    trainer = start(run, "cpu", 1)
    seen = [trainer.step() for _ in range(6)]
    assert trainer.model.kernels is DIFFERENTIABLE
    seen += [trainer.step() for _ in range(6)]
    assert trainer.model.kernels is FAKE_INT8 and seen[-1].loss < seen[0].loss
    outcome = conclude(trainer, run)
    assert outcome.unquantised is not None and outcome.unquantised.nats_per_token != outcome.held_out.nats_per_token
    row = _row(trainer, run, outcome)
    assert row["teacher"] == {"artifact": teacher.artifact, "parameters": teacher.manifest.spec.parameters}
    assert row["int8"]["loss_ratio"] == pytest.approx(outcome.held_out.nats_per_token / outcome.unquantised.nats_per_token, abs=1e-5)
    save(tmp_path / "student", run.spec, outcome.weights, run.tokenizer.files(64), dtype="bfloat16")
    manifest = read_manifest(tmp_path / "student")
    assert manifest.spec == run.spec and manifest.spec.sharing is not None
    loaded = load(manifest, "cpu", torch.float32, serving=False)
    measured = held_out_loss(loaded, run.held_out.tokens, run.tokenizer.token_bytes, 512)
    assert measured.nats_per_token == pytest.approx(outcome.unquantised.nats_per_token, rel=1e-4)


def test_teachers_and_recipes_must_go_together(library: Path, recipe_with: Callable[..., Recipe], teacher: Source) -> None:
    with pytest.raises(SettingsError, match="leave --teacher out"):
        prepare(recipe_with(), library, teacher)
    with pytest.raises(SettingsError, match="with --teacher"):
        prepare(recipe_with(distil=DISTIL), library)
    with pytest.raises(SettingsError, match="vocab_size is 999"):
        prepare(recipe_with(distil=DISTIL, vocab_size=999), library, teacher)
    long = recipe_with(distil=DISTIL, vocab_size=teacher.manifest.spec.vocab_size)
    schedule = replace(long.schedule, lengths=(replace(long.schedule.lengths[0], tokens=128),))
    with pytest.raises(SettingsError, match="reads 64 tokens"):
        prepare(replace(long, schedule=schedule), library, teacher)


def test_another_teacher_is_another_run(library: Path, recipe_with: Callable[..., Recipe], teacher: Source) -> None:
    recipe = recipe_with(distil=DISTIL, vocab_size=teacher.manifest.spec.vocab_size)
    other = replace(teacher, manifest=replace(teacher.manifest, digest="0" * 64))
    assert prepare(recipe, library, teacher).identity != prepare(recipe, library, other).identity
