"""A whole small run: trained, measured, published, loaded again."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from service.checkpoints.load import load
from service.checkpoints.manifest import read_manifest, verify
from service.models.build import build
from service.train.evaluate import HeldOut, held_out_loss
from service.train.loop import StepReport, Trainer
from service.train.prepare import PreparedRun
from service.train.publish import publish
from service.train.recipe import Recipe
from service.train.run import Outcome, conclude, train


class Watch:
    """Remembers what it is told."""

    def __init__(self) -> None:
        self.steps: list[StepReport] = []
        self.losses: list[HeldOut] = []

    def stepped(self, report: StepReport) -> None:
        self.steps.append(report)

    def evaluated(self, report: StepReport, held_out: HeldOut) -> None:
        self.losses.append(held_out)


def trainer(prepared: PreparedRun) -> Trainer:
    return Trainer(prepared.recipe, build(prepared.spec, "cpu", torch.float32), prepared.train, prepared.identity)


@pytest.fixture(scope="module")
def finished(prepared: PreparedRun, tmp_path_factory: pytest.TempPathFactory) -> tuple[Trainer, Outcome, Path, Watch, str]:
    out = tmp_path_factory.mktemp("out")
    run, watch = trainer(prepared), Watch()
    assert train(run, prepared, out / "state.pt", watch)
    outcome = conclude(run, prepared)
    row = publish(run, prepared, outcome, out, out / "kept" / "training.jsonl")
    return run, outcome, out, watch, row


def test_progress_is_told(finished: tuple[Trainer, Outcome, Path, Watch, str]) -> None:
    watch = finished[3]
    assert [report.step for report in watch.steps] == list(range(1, 21))
    assert watch.steps[-1].progress == 1.0 and watch.steps[-1].tokens == 20 * 256
    assert len(watch.losses) == 2 and watch.losses[1].nats_per_token < watch.losses[0].nats_per_token
    assert all(loss.tokens == 256 and loss.text_bytes > 256 for loss in watch.losses)


def test_the_published_directory_is_whole_and_loads(prepared: PreparedRun, finished: tuple[Trainer, Outcome, Path, Watch, str]) -> None:
    _, outcome, out, _, _ = finished
    manifest = read_manifest(out / "checkpoint")
    verify(manifest)
    assert manifest.spec == prepared.spec and manifest.stored_dtype == "bfloat16"
    assert manifest.generation.temperature == 0.7 and manifest.generation.top_p == 0.95
    assert manifest.chat_template and "<|assistant|>" in manifest.chat_template
    assert manifest.digest[:12] in finished[4]
    decoder = load(manifest, "cpu", torch.float32, serving=False)
    for name, weight in decoder.state_dict().items():
        assert torch.equal(weight, outcome.weights[name].float())
    again = held_out_loss(decoder, prepared.held_out.tokens, prepared.tokenizer.token_bytes, 512)
    assert again.nats_per_token == pytest.approx(outcome.held_out.nats_per_token, rel=1e-5)


def test_the_row_and_the_card_say_what_was_measured(prepared: PreparedRun, finished: tuple[Trainer, Outcome, Path, Watch, str]) -> None:
    _, outcome, out, _, text = finished
    row = json.loads(text)
    assert (out / "kept" / "training.jsonl").read_text() == (out / "row.json").read_text() == text + "\n"
    assert row["steps"] == 20 and row["tokens"] == 5120 and row["parameters"] == prepared.spec.parameters
    assert row["nats_per_token"] == round(outcome.held_out.nats_per_token, 5)
    assert row["corpus_digest"] == prepared.corpus.digest and row["recipe_digest"] == prepared.recipe.digest
    card = (out / "checkpoint" / "README.md").read_text()
    assert f"{row['nats_per_token']:.4f} nats/token" in card and prepared.corpus.digest in card
    assert "PSF License" in card and "not a release of any company" in card and "def fibonacci(n):" in card
    assert (out / "checkpoint" / "corpus.txt").read_text() == prepared.corpus.manifest
    kept = json.loads((out / "checkpoint" / "training.json").read_text())
    assert row == {**kept, "artifact": row["artifact"]}


def test_the_better_weights_are_chosen(finished: tuple[Trainer, Outcome, Path, Watch, str]) -> None:
    outcome = finished[1]
    assert outcome.average is not None
    better = "average" if outcome.average.nats_per_token < outcome.last.nats_per_token else "last"
    assert outcome.chosen == better


def test_the_plot_is_drawn(finished: tuple[Trainer, Outcome, Path, Watch, str]) -> None:
    pytest.importorskip("matplotlib")
    assert (finished[2] / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_stopping_leaves_a_state_that_goes_on(
    prepared: PreparedRun, finished: tuple[Trainer, Outcome, Path, Watch, str], tmp_path: Path
) -> None:
    run, watch = trainer(prepared), Watch()
    assert not train(run, prepared, tmp_path / "state.pt", watch, lambda: len(watch.steps) == 7)
    again = trainer(prepared)
    again.resume(tmp_path / "state.pt")
    assert again.state.step == 7
    assert train(again, prepared, tmp_path / "state.pt", watch)
    assert [report.loss for report in watch.steps] == [report.loss for report in finished[3].steps]


def test_states_are_kept_on_the_way(prepared: PreparedRun, recipe_with: Callable[..., Recipe], tmp_path: Path) -> None:
    ticks = iter(range(10_000))
    recipe = recipe_with(checkpoint_minutes=0.05)  # every third of these one-second steps
    run = Trainer(recipe, build(prepared.spec, "cpu", torch.float32), prepared.train, prepared.identity, lambda: float(next(ticks)))
    seen: list[bool] = []
    train(
        run,
        replace(prepared, recipe=recipe),
        tmp_path / "state.pt",
        Watch(),
        lambda: seen.append((tmp_path / "state.pt").exists()) or False,
    )
    assert seen[:3] == [False] * 3 and seen[3] is True
