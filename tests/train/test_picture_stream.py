"""Batches with questions about pictures, and that a model learns from them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from random import Random

import pytest
import torch

from service.models.build import build
from service.models.decoder import Decoder
from service.train.loop import Trainer
from service.train.objective import Batch, NextToken
from service.train.picture_stream import IGNORED, Pictured, PictureStream, right_answers
from service.train.prepare import PreparedRun, prepare
from service.train.publish import publish
from service.train.recipe import Recipe
from service.train.run import conclude
from service.types.catalog import V3_5
from service.types.errors import SettingsError
from service.types.vision import VisionSpec
from tests.train.conftest import TINY

pytest.importorskip("sklearn")
EYES = VisionSpec(patch=4, merge=1, dim=16, layers=1, heads=2, mlp_hidden=32, least_tokens=4, most_tokens=4, side_tokens=4)
LONG = {"lengths": [{"until": 1.0, "tokens": 64}]}
PICTURES = {"source": "digits", "held_out_permille": 200, "share": 0.5, "weight": 8.0}


@pytest.fixture(scope="module")
def run(library: Path, recipe_with: Callable[..., Recipe]) -> PreparedRun:
    made = prepare(recipe_with(line="3.5", pictures=PICTURES, optimizer={"rest_rate": 0.01}, schedule=LONG), library)
    shape = replace(TINY, vocab_size=made.tokenizer.vocab_size, vision=EYES)
    spec = V3_5.spec(shape, (made.tokenizer.end_id,), image_id=made.tokenizer.special_id("<|image|>"))
    assert made.pictures is not None
    pixels, grid = made.pictures.found.prepared(EYES)
    pictures = replace(made.pictures, pixels=pixels, grid=grid)
    documents = made.tokenizer.encode(list(made.corpus.train))
    return replace(made, spec=spec, pictures=pictures, train=PictureStream(documents, made.tokenizer, 3, pictures))


def test_a_question_is_written_as_the_chat_template_writes_it(run: PreparedRun) -> None:
    stream, codec = run.train, run.tokenizer
    assert isinstance(stream, PictureStream) and run.pictures is not None
    question = run.pictures.found.ask(Random(0), run.pictures.found.train, "larger")
    inputs, targets = stream.example(question, 64)
    shown = [-1 - index for index in question.pictures for _ in range(4)]
    user, *rest = codec.encode_chat(question.text)
    answer = [*codec.encode([question.answer])[0], codec.end_id]
    ids = [user, *shown, *rest, *answer]
    assert inputs.tolist()[: len(ids)] == ids and set(inputs.tolist()[len(ids) :]) == {codec.end_id}
    learned = [(at, token) for at, token in enumerate(targets.tolist()) if token != IGNORED]
    assert [token for _, token in learned] == answer and learned[0][0] == len(ids) - len(answer) - 1
    assert stream.tokens_of(question) == len(ids)


def test_batches_depend_on_their_position_alone_and_mix_text_with_training_pictures(run: PreparedRun) -> None:
    inputs, targets = run.train.batch(128, 40, 64)
    again, _ = run.train.batch(128 + 64 * 10, 5, 64)
    assert (inputs.reshape(40, 64)[10:15].reshape(-1) == again).all()
    asked = (inputs.reshape(40, 64) < 0).any(1)
    assert 8 < asked.sum() < 32
    assert run.pictures is not None
    assert {-1 - int(token) for token in inputs[inputs < 0]} <= set(run.pictures.found.train)
    assert (targets.reshape(40, 64)[~asked] >= 0).all() and (targets.reshape(40, 64)[asked] == IGNORED).any(1).all()


def test_one_sequence_alone_is_what_it_is_among_others(run: PreparedRun) -> None:
    inputs, targets = run.train.batch(0, 40, 64)
    for index in range(40):
        alone = run.train.batch(64 * index, 1, 64)
        assert (alone[0] == inputs[64 * index : 64 * (index + 1)]).all() and (alone[1] == targets[64 * index : 64 * (index + 1)]).all()


def test_a_phase_may_ask_about_pictures_more_or_less_often(library: Path, recipe_with: Callable[..., Recipe]) -> None:
    phases = [{"until": 0.5, "tokens": 64}, {"until": 1.0, "tokens": 128, "pictures": 0.0}]
    made = prepare(
        recipe_with(line="3.5", pictures=PICTURES, schedule={"lengths": phases, "batch_tokens": 128, "micro_tokens": 128}), library
    )
    assert (made.train.batch(0, 20, 64)[0] < 0).any() and not (made.train.batch(0, 10, 128)[0] < 0).any()
    for wrong, key in (
        ([{"until": 1.0, "tokens": 64, "pictures": 1.5}], "pictures of a phase"),
        ([{"until": 0.5, "tokens": 64, "pictures": 0.5}, {"until": 1.0, "tokens": 64}], "phases of one length"),
    ):
        with pytest.raises(SettingsError, match=key):
            recipe_with(line="3.5", pictures=PICTURES, schedule={"lengths": wrong})
    with pytest.raises(SettingsError, match="needs pictures"):
        recipe_with(schedule={"lengths": [{"until": 1.0, "tokens": 64, "pictures": 0.5}]})


def test_whole_passes_may_ask_in_short_sequences_while_texts_are_long(library: Path, recipe_with: Callable[..., Recipe]) -> None:
    schedule = {"lengths": [{"until": 1.0, "tokens": 128}], "batch_tokens": 128, "micro_tokens": 128}
    made = prepare(recipe_with(line="3.5", pictures=PICTURES | {"tokens": 64}, schedule=schedule), library)
    passes = [made.train.one_pass(128 * index, 128, 128) for index in range(40)]
    lengths = [length for _, _, length in passes]
    assert set(lengths) == {64, 128} and 10 < lengths.count(64) < 30
    for inputs, targets, length in passes:
        assert len(inputs) == len(targets) == 128
        rows = inputs.reshape(-1, length) < 0
        assert rows.any(1).all() if length == 64 else not rows.any()
    again = made.train.one_pass(128 * 7, 128, 128)
    assert (again[0] == passes[7][0]).all() and again[2] == passes[7][2]
    trainer = Trainer(made.recipe, build(made.spec, "cpu", torch.float32), made.train, "x")
    assert made.pictures is not None
    trainer.objective = Pictured(made.pictures, trainer.device, NextToken())
    for _ in range(3):
        assert torch.isfinite(torch.tensor(trainer.step().loss))
    with pytest.raises(SettingsError, match=r"pictures\.tokens"):
        recipe_with(line="3.5", pictures=PICTURES | {"tokens": 48}, schedule=schedule)


def test_a_pass_without_pictures_takes_the_loss_of_text(run: PreparedRun) -> None:
    class Text:
        def parts(self, model: Decoder, batch: Batch) -> Iterator[torch.Tensor]:
            yield torch.tensor(float(len(batch.inputs)))

    model = build(run.spec, "cpu", torch.float32)
    Trainer(run.recipe, model, run.train, "x")
    assert run.pictures is not None
    objective = Pictured(run.pictures, torch.device("cpu"), Text())
    inputs, targets = (torch.from_numpy(array) for array in run.train.batch(0, 8, 64))
    (shown,) = objective.parts(model, Batch(inputs, targets, 64))
    (read,) = objective.parts(model, Batch(inputs.clamp(min=0), targets, 64))
    assert float(read) == 512.0 and float(shown.detach()) > 512.0


def test_pictures_stand_in_place_and_each_sequence_sees_its_own(run: PreparedRun) -> None:
    model = build(run.spec, "cpu", torch.float32)
    Trainer(run.recipe, model, run.train, "x")
    assert run.pictures is not None
    objective = Pictured(run.pictures, torch.device("cpu"), NextToken())
    flat = [torch.from_numpy(array) for array in run.train.batch(0, 8, 64)]
    context = objective.context(model, Batch(flat[0], flat[1], 64))
    assert context is not None and len(context.at) == int((flat[0] < 0).sum()) == sum(len(seen.keys) for seen in context.seen)
    for seen in context.seen:
        assert seen.counts is not None and seen.counts[0] == 1 and seen.counts[-1] == len(seen.keys) == len(seen.values)
    only_text = Batch(flat[0].clamp(min=0), flat[1], 64)
    assert objective.context(model, only_text) is None


def test_a_few_steps_lower_the_loss_of_answers(run: PreparedRun) -> None:
    model = build(run.spec, "cpu", torch.float32)
    assert run.pictures is not None
    trainer = Trainer(run.recipe, model, run.train, "x")
    trainer.objective = Pictured(run.pictures, torch.device("cpu"), NextToken())
    batch = Batch(*(torch.from_numpy(array) for array in run.train.batch(0, 16, 64)), 64)

    def loss() -> float:
        with torch.no_grad():
            return sum(float(part) for part in trainer.objective.parts(model, batch))

    before = loss()
    for _ in range(16):
        trainer.step()
    assert loss() < 0.75 * before
    assert model.vision is not None and model.vision.patch.weight is not None and model.vision.patch.weight.isfinite().all()


def test_answers_about_held_out_pictures_are_counted_whole(run: PreparedRun) -> None:
    model = build(run.spec, "cpu", torch.float32)
    Trainer(run.recipe, model, run.train, "x")
    assert run.pictures is not None and isinstance(run.train, PictureStream)
    asked: list[int] = []

    class Knowing(torch.nn.Module):
        """Says what the question's row says next, but for sums, where it says 9."""

        def __init__(self) -> None:
            super().__init__()
            self.spec, self.fusion, self.vision = model.spec, None, None
            self.one = torch.nn.Parameter(torch.zeros(1))

        def forward(self, tokens: torch.Tensor, positions: torch.Tensor, attend: object, images: object) -> torch.Tensor:
            said = tokens.roll(-1)
            asked.append(len(tokens))
            nine = run.tokenizer.encode(["9"])[0][0]
            sums = run.tokenizer.encode(["What is the sum of the two digits?"])[0]
            rows = tokens.view(-1, 64)
            is_sum = torch.tensor([len(set(sums) - set(row.tolist())) == 0 for row in rows]).repeat_interleave(64)
            return torch.nn.functional.one_hot(
                torch.where(is_sum & (said != run.tokenizer.end_id), nine, said), run.spec.vocab_size
            ).float()

    shares = right_answers(Knowing(), run.train, run.pictures, 50)  # type: ignore[arg-type]
    assert asked == [50 * 64] * 4 and set(shares) == {"digit", "parity", "larger", "sum"}
    assert shares["digit"] == shares["parity"] == shares["larger"] == 1.0 and shares["sum"] < 0.4


def test_the_row_and_the_card_say_how_well_pictures_are_read(run: PreparedRun, tmp_path: Path) -> None:
    trainer = Trainer(run.recipe, build(run.spec, "cpu", torch.float32), run.train, "x")
    assert run.pictures is not None
    trainer.objective = Pictured(run.pictures, trainer.device, NextToken())
    trainer.step()
    row = json.loads(publish(trainer, run, conclude(trainer, run), tmp_path, None))
    part, card = row["pictures"], (tmp_path / "checkpoint" / "README.md").read_text()
    assert part["questions"] == 200 and part["learned"] + part["held_out"] == 1797 and set(part["right"]) == set(run.pictures.found.kinds)
    assert f"digit {part['right']['digit']:.3f}" in card and "CC BY 4.0" in card and f"{part['held_out']} are held out" in card


def test_pictures_need_a_line_that_reads_them(library: Path, recipe_with: Callable[..., Recipe]) -> None:
    with pytest.raises(SettingsError, match=r"reads? images"):
        prepare(recipe_with(pictures=PICTURES), library)
    with pytest.raises(SettingsError, match="sequences of 32"):
        prepare(recipe_with(line="3.5", pictures=PICTURES), library)
    for wrong in ({"share": 0.0}, {"weight": 0.0}, {"variants": -1}):
        with pytest.raises(SettingsError, match=r"recipe\.pictures"):
            recipe_with(line="3.5", pictures=PICTURES | wrong)
