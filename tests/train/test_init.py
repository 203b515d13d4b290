"""A run that goes on from a published checkpoint: its weights, its tokenizer, what is refused, and what row and card say."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from service.checkpoints.store import save
from service.cli.train import read_flags
from service.inputs.bpe import BpeTokenizer
from service.models.build import build, init_weights
from service.train.card import _extra_rows
from service.train.loop import DTYPES
from service.train.prepare import PreparedRun, prepare
from service.train.publish import _row
from service.train.recipe import Recipe
from service.train.run import conclude
from service.train.source import Source, read_source
from service.train.start import start
from service.types.errors import SettingsError


@pytest.fixture(scope="module")
def earlier(prepared: PreparedRun, tmp_path_factory: pytest.TempPathFactory) -> Source:
    model = build(prepared.spec, "cpu", torch.float32)
    init_weights(model, 8)
    directory = tmp_path_factory.mktemp("earlier") / "model"
    save(directory, prepared.spec, model.state_dict(), prepared.tokenizer.files(prepared.spec.context_tokens), dtype="float32")
    return read_source(directory)


def test_training_begins_with_the_weights_of_the_checkpoint(prepared: PreparedRun, earlier: Source) -> None:
    run = replace(prepared, init=earlier)
    trainer = start(run, "cpu", 1)
    given = earlier.load(torch.device("cpu")).state_dict()
    fresh = start(prepared, "cpu", 1).model.state_dict()
    begun = {name: weight.clone() for name, weight in trainer.model.state_dict().items()}
    assert all(torch.equal(weight, given[name]) for name, weight in begun.items())
    assert any(not torch.equal(weight, fresh[name]) for name, weight in begun.items())
    trainer.step()
    assert any(not torch.equal(weight, begun[name]) for name, weight in trainer.model.state_dict().items())
    row = _row(trainer, run, conclude(trainer, run))
    assert row["init"] == earlier.artifact and any(earlier.artifact in line for line in _extra_rows(row))


def test_what_is_published_may_lie_between_the_trained_weights_and_those_before(
    prepared: PreparedRun, earlier: Source, library: Path, recipe_with: Callable[..., Recipe]
) -> None:
    recipe = recipe_with(average={"start": 0.0, "decay": 0.0, "init": 0.25})
    run = replace(prepared, init=earlier, recipe=recipe)
    trainer = start(run, "cpu", 1)
    trainer.step()
    trained = {name: weight.clone() for name, weight in trainer.model.state_dict().items()}
    outcome = conclude(trainer, run)
    began, stored = earlier.load(torch.device("cpu")).state_dict(), DTYPES[recipe.publish.dtype]
    for name, weight in outcome.weights.items():
        assert torch.equal(weight, (trained[name] + 0.25 * (began[name] - trained[name])).to(stored))
    row = _row(trainer, run, outcome)
    assert row["init_share"] == 0.25 and any("0.25" in line for line in _extra_rows(row))
    with pytest.raises(SettingsError, match="--init"):
        prepare(recipe, library)


def test_the_tokenizer_is_the_checkpoint_s_and_the_run_another(library: Path, recipe_with: Callable[..., Recipe], earlier: Source) -> None:
    recipe = recipe_with()
    plain = prepare(recipe, library)
    other = BpeTokenizer.train(["other words entirely " * 50], recipe.vocab_size)
    source = Source(replace(earlier.manifest, spec=plain.spec), other)
    run = prepare(recipe, library, init=source)
    assert run.tokenizer is other and run.init is source
    assert run.identity != prepare(recipe, library, init=replace(source, manifest=replace(source.manifest, digest="0" * 64))).identity
    assert run.identity != plain.identity


def test_another_network_or_another_teacher_s_tokenizer_is_refused(
    library: Path, recipe_with: Callable[..., Recipe], earlier: Source
) -> None:
    wider = Source(replace(earlier.manifest, spec=replace(prepare(recipe_with(), library).spec, dim=24)), earlier.tokenizer)
    with pytest.raises(SettingsError, match="another network"):
        prepare(recipe_with(), library, init=wider)
    size = earlier.manifest.spec.vocab_size
    recipe = recipe_with(distil={"kl": 0.4, "mse": 0.2, "temperature": 2.0}, vocab_size=size)
    spec = prepare(recipe, library, earlier).spec
    strange = Source(replace(earlier.manifest, spec=spec), BpeTokenizer.train(["other words entirely " * 50], size))
    with pytest.raises(SettingsError, match="different tokenizers"):
        prepare(recipe, library, earlier, strange)


def test_the_flag_names_a_directory_or_a_line() -> None:
    assert read_flags(["--recipe", "nano-v2.3", "--init", "v2.3"]).init == "v2.3"
    assert read_flags(["--recipe", "nano-v2.3"]).init == ""
