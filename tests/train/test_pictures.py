"""Pictures and questions: splits, answers, and files that are refused."""

from __future__ import annotations

from pathlib import Path
from random import Random

import numpy as np
import pytest

from service.train.pictures import DIGIT_KINDS, PictureSet, load_pictures
from service.types.catalog import V3_5
from service.types.errors import SettingsError

pytest.importorskip("sklearn")
EYES = dict(V3_5.shapes)["nano"].vision


@pytest.fixture(scope="module")
def digits() -> PictureSet:
    return load_pictures("digits", 200)


def test_no_picture_is_in_both_splits(digits: PictureSet) -> None:
    assert sorted(digits.train + digits.held_out) == list(range(1797))
    shown = {digits.pixels[index].tobytes() for index in digits.train}
    assert not shown & {digits.pixels[index].tobytes() for index in digits.held_out}
    assert 0.17 < len(digits.held_out) / 1797 < 0.23
    assert digits.digest == load_pictures("digits", 200).digest != load_pictures("digits", 100).digest


def test_variants_are_like_their_picture_and_only_of_those_that_are_learned(digits: PictureSet) -> None:
    varied = load_pictures("digits", 200, 2)
    number = len(digits.train)
    assert varied.held_out == digits.held_out and len(varied.train) == 3 * number and len(varied.labels) == 1797 + 2 * number
    assert (varied.pixels[:1797] == digits.pixels).all() and varied.digest != digits.digest == load_pictures("digits", 200, 0).digest
    first, second = varied.pixels[1797 : 1797 + number].astype(float), varied.pixels[1797 + number :].astype(float)
    own = digits.pixels[list(digits.train)].astype(float)
    assert varied.labels[1797 : 1797 + number] == varied.labels[1797 + number :] == tuple(digits.labels[index] for index in digits.train)
    for made in (first, second):
        apart = np.abs(made - own).mean((1, 2, 3))
        assert (apart > 0).mean() > 0.99 and apart.mean() < 0.75 * np.abs(np.roll(own, 1, 0) - own).mean()
    assert (first != second).any()
    assert (load_pictures("digits", 200, 2).pixels == varied.pixels).all()


def test_answers_are_those_of_the_labels(digits: PictureSet) -> None:
    draw, seen = Random(1), set()
    for _ in range(300):
        question = digits.ask(draw, digits.held_out)
        labels = [digits.labels[index] for index in question.pictures]
        assert set(question.pictures) <= set(digits.held_out)
        wanted = {
            "digit": str(labels[0]),
            "parity": ("even", "odd")[labels[0] % 2],
            "sum": str(sum(labels)),
            "larger": "first" if labels[0] > labels[-1] else "second",
        }
        assert question.answer == wanted[question.kind]
        assert question.kind != "larger" or labels[0] != labels[1]
        seen.add(question.kind)
    assert seen == set(DIGIT_KINDS)


def test_pictures_are_prepared_as_a_server_would(digits: PictureSet) -> None:
    from service.inputs.image_messages import Prepare, Prepared
    from service.inputs.images import prepare
    from tests.inputs.test_images import Image, encoded

    small = PictureSet(digits.pixels[:3], digits.labels[:3], (0,), (1, 2), DIGIT_KINDS)
    pixels, grid = small.prepared(EYES)
    assert pixels.shape == (3, grid.rows * EYES.unit, grid.columns * EYES.unit, 3)
    for index in range(3):
        reply = prepare(Prepare(encoded(Image.fromarray(small.pixels[index])), EYES, EYES.most_tokens, 1000))
        assert isinstance(reply, Prepared) and reply.pixels == pixels[index].tobytes()


@pytest.mark.parametrize("colour", [False, True])
def test_a_medmnist_file(tmp_path: Path, colour: bool) -> None:
    shape = (28, 28, 3) if colour else (28, 28)
    images = np.random.default_rng(0).integers(0, 256, (7, *shape), np.uint8)
    labels = np.array([[2], [0], [1], [2], [1], [0], [1]])
    np.savez(tmp_path / "m.npz", train_images=images[:5], train_labels=labels[:5], test_images=images[5:], test_labels=labels[5:])
    found = load_pictures(str(tmp_path / "m.npz"), 0)
    assert (found.train, found.held_out, found.labels) == ((0, 1, 2, 3, 4), (5, 6), (2, 0, 1, 2, 1, 0, 1))
    assert found.pixels.shape == (7, 28, 28, 3) and (colour or (found.pixels[..., 0] == found.pixels[..., 2]).all())
    question = found.ask(Random(0), (3,))
    assert (question.kind, question.answer) == ("class", "2")


@pytest.mark.parametrize("broken", ["missing", "text", "names", "shapes", "labels", "pickled"])
def test_other_files_are_refused(tmp_path: Path, broken: str) -> None:
    path, images, labels = tmp_path / "m.npz", np.zeros((2, 8, 8), np.uint8), np.zeros((2, 1), np.int64)
    if broken == "text":
        path.write_text("no file of arrays")
    elif broken != "missing":
        images = images.astype(np.float32) if broken == "shapes" else images
        labels = np.zeros((3, 1)) if broken == "labels" else np.array([[{}], [{}]]) if broken == "pickled" else labels
        names = {"train": images} if broken == "names" else {"train_images": images, "train_labels": labels}
        np.savez(path, **names)
    with pytest.raises(SettingsError, match=r"m\.npz"):
        load_pictures(str(path), 0)
