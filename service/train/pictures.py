"""Pictures and questions about them: real handwritten digits, or a local MedMNIST .npz; split by content, asked in ways that need both.

It does not know tokens or models. Invariants: no picture is in both splits (the split is a function of its SHA-256); a question and its
answer are a function of the draw alone; what two pictures or two kinds of question answer differently needs picture and question.
"""

from __future__ import annotations

import hashlib
import math
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from service.inputs.images import resize_pixels
from service.types.errors import SettingsError
from service.types.vision import Grid, VisionSpec

DIGITS = "digits"
DIGIT_KINDS = ("digit", "parity", "larger", "sum")
CLASS_KINDS = ("class",)
Pixels = npt.NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class Question:
    """What is asked of which pictures (indexes into the set), and the one right answer."""

    kind: str
    pictures: tuple[int, ...]
    text: str
    answer: str


@dataclass(frozen=True, slots=True)
class PictureSet:
    """Pictures [N, height, width, 3] uint8 with a label each. `train` and `held_out` are indexes; `kinds` what can be asked."""

    pixels: Pixels
    labels: tuple[int, ...]
    train: tuple[int, ...]
    held_out: tuple[int, ...]
    kinds: tuple[str, ...]

    @property
    def digest(self) -> str:
        """SHA-256 over pixels, labels and split."""
        return hashlib.sha256(self.pixels.tobytes() + repr((self.labels, self.held_out)).encode()).hexdigest()

    def prepared(self, vision: VisionSpec) -> tuple[Pixels, Grid]:
        """Every picture as a server prepares it, [N, rows · unit, columns · unit, 3], and the grid that all share."""
        height, width = self.pixels.shape[1:3]
        grid = vision.grid(width, height)
        shape = (grid.rows * vision.unit, grid.columns * vision.unit, 3)
        made = [np.frombuffer(resize_pixels(picture.tobytes(), width, height, vision), np.uint8).reshape(shape) for picture in self.pixels]
        return np.stack(made), grid

    def ask(self, draw: Random, among: Sequence[int], kind: str | None = None) -> Question:
        """A random question (of that kind) about pictures of `among`."""
        kind = kind or draw.choice(self.kinds)
        first, second = draw.choice(among), draw.choice(among)
        one, two = self.labels[first], self.labels[second]
        if kind == "class":
            return Question(kind, (first,), "Which class is this?", str(one))
        if kind == "digit":
            return Question(kind, (first,), "Which digit is this?", str(one))
        if kind == "parity":
            return Question(kind, (first,), "Is this digit even or odd?", "odd" if one % 2 else "even")
        if kind == "sum":
            return Question(kind, (first, second), "What is the sum of the two digits?", str(one + two))
        if one == two:
            return self.ask(draw, among, kind)
        return Question(kind, (first, second), "Which digit is larger, the first or the second?", "first" if one > two else "second")


def load_pictures(source: str, held_out_permille: int, variants: int = 0) -> PictureSet:
    """The digits of scikit-learn, or the MedMNIST file at the path `source`. Raises SettingsError.

    Each picture to learn from comes `variants` times more, moved, turned and scaled a little; those held out stay as they are.
    """
    if source == DIGITS:
        pixels, labels = _digits()
        held = [_permille(picture) < held_out_permille for picture in pixels]
        return _varied(_split(pixels, labels, held, DIGIT_KINDS), variants)
    train, test = (_npz(Path(source), part) for part in ("train", "test"))
    held = [False] * len(train[1]) + [True] * len(test[1])
    return _varied(_split(np.concatenate((train[0], test[0])), [*train[1], *test[1]], held, CLASS_KINDS), variants)


def _varied(found: PictureSet, variants: int) -> PictureSet:
    """The set with `variants` more of every picture to learn from, at the end."""
    if not variants:
        return found
    made = [_moved(found.pixels[index], Random(f"variant {index} {turn}")) for turn in range(variants) for index in found.train]
    labels = (*found.labels, *(found.labels[index] for _ in range(variants) for index in found.train))
    train = (*found.train, *range(len(found.labels), len(labels)))
    return PictureSet(np.concatenate((found.pixels, np.stack(made))), labels, train, found.held_out, found.kinds)


def _moved(picture: Pixels, draw: Random) -> Pixels:
    """The picture turned by up to 12 degrees, scaled by up to an eighth and moved by up to a tenth of its side; black comes in."""
    height, width = picture.shape[:2]
    turn, scale = math.radians(draw.uniform(-12, 12)), draw.uniform(7 / 8, 9 / 8)
    cosine, sine = math.cos(turn) / scale, math.sin(turn) / scale
    middle_x, middle_y = (width - 1) / 2, (height - 1) / 2
    from_x, from_y = middle_x + draw.uniform(-0.1, 0.1) * width, middle_y + draw.uniform(-0.1, 0.1) * height
    places = (cosine, sine, from_x - cosine * middle_x - sine * middle_y, -sine, cosine, from_y + sine * middle_x - cosine * middle_y)
    moved = Image.fromarray(picture).transform((width, height), Image.Transform.AFFINE, places, Image.Resampling.BICUBIC)
    return np.asarray(moved, np.uint8)


def _split(pixels: Pixels, labels: Sequence[int], held: Sequence[bool], kinds: tuple[str, ...]) -> PictureSet:
    train, held_out = (tuple(at for at, one in enumerate(held) if one is wanted) for wanted in (False, True))
    if not train or not held_out:
        raise SettingsError("The pictures have an empty split: change held_out_permille, or take another file.")
    return PictureSet(pixels, tuple(labels), train, held_out, kinds)


def _digits() -> tuple[Pixels, list[int]]:
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise SettingsError("The digits come with scikit-learn: pip install 'deepseek-service[train]'.") from None
    found: Any = load_digits()
    grey = np.asarray(np.rint(found.images * (255 / 16)), np.uint8)
    return np.repeat(grey[..., None], 3, axis=3), [int(label) for label in found.target]


def _npz(path: Path, part: str) -> tuple[Pixels, list[int]]:
    try:
        with np.load(path, allow_pickle=False) as file:
            images, labels = file[f"{part}_images"], file[f"{part}_labels"]
    except (OSError, KeyError, ValueError, zipfile.BadZipFile):
        raise SettingsError(f"{path} is not a MedMNIST file with {part}_images and {part}_labels.") from None
    if images.dtype != np.uint8 or images.ndim not in (3, 4) or labels.reshape(len(labels), -1).shape[1] != 1 or len(labels) != len(images):
        raise SettingsError(f"{path} must hold one label for each picture, and pictures of 8 bits, grey or RGB.")
    colour = np.repeat(images[..., None], 3, axis=3) if images.ndim == 3 else images
    return np.ascontiguousarray(colour), [int(label) for label in labels.reshape(-1)]


def _permille(picture: Pixels) -> int:
    return int(hashlib.sha256(picture.tobytes()).hexdigest()[:8], 16) % 1000
