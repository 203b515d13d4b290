"""The checkpoints that ship with the package: whole, small together, what their cards say, and doing what their lines are for."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
import torch

from service.checkpoints.bundled import BUNDLED, bundled_directory, complete_lines
from service.checkpoints.load import load
from service.checkpoints.manifest import Manifest, read_manifest, verify
from service.inputs.bpe import IMAGE, BpeTokenizer
from service.inputs.recall_tasks import single_needle
from service.models.attention import DenseAttend
from service.models.decoder import Decoder
from service.models.layers import FAKE_INT8
from service.train.evaluate import held_out_loss
from service.train.picture_stream import Pictures, PictureStream, right_answers
from service.train.pictures import load_pictures
from service.train.recipe import Recipe, load_recipe
from service.train.sample import continue_ids
from service.types.catalog import LINES, V2_3, V3_5, V4_8, V5_2, VersionLine

EVERY_LINE = pytest.mark.parametrize("line", LINES, ids=lambda line: line.label)


def manifest_of(line: VersionLine) -> Manifest:
    return read_manifest(bundled_directory(line))


def row_of(line: VersionLine) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((bundled_directory(line) / "training.json").read_text())
    return loaded


def decoder_of(line: VersionLine) -> Decoder:
    return load(manifest_of(line), "cpu", torch.float32, serving=False)


def test_all_lines_are_there_and_small_together() -> None:
    assert complete_lines() == list(LINES)
    assert sum(path.stat().st_size for path in BUNDLED.rglob("*") if path.is_file()) <= 32 * 1024 * 1024


@EVERY_LINE
def test_it_is_whole_and_its_line_s(line: VersionLine) -> None:
    manifest = manifest_of(line)
    verify(manifest)
    assert manifest.line == line.number and manifest.stored_dtype == "bfloat16"
    image_id = BpeTokenizer.load(bundled_directory(line)).special_id(IMAGE) if line.reads_images else None
    assert manifest.spec == line.spec(dict(line.shapes)["nano"], manifest.spec.end_ids, image_id=image_id)


def recipe_of(line: VersionLine) -> Recipe:
    """The committed recipe of its (last) run."""
    return load_recipe(row_of(line)["recipe"])


@EVERY_LINE
def test_its_recipe_is_the_committed_one(line: VersionLine) -> None:
    row, name = row_of(line), f"nano-{line.label}"
    assert row["recipe_digest"] == recipe_of(line).digest and recipe_of(line).line == line.number
    # A model that another run went on with says which one it was.
    assert row["recipe"] == name or (row["recipe"].startswith(f"{name}-") and row["init"].startswith(f"{line.label}@"))


@EVERY_LINE
def test_its_loss_can_be_measured_again(line: VersionLine) -> None:
    probe, decoder = row_of(line)["probe"], decoder_of(line)
    if recipe_of(line).quantise is not None:
        decoder.use(FAKE_INT8)
    tokenizer = BpeTokenizer.load(bundled_directory(line))
    ids = np.asarray(tokenizer.encode([probe["text"]])[0], dtype=np.uint16)
    measured = held_out_loss(decoder, ids, tokenizer.token_bytes, decoder.spec.context_tokens)
    assert measured.tokens == probe["tokens"] > 200
    assert measured.nats_per_token == pytest.approx(probe["nats_per_token"], rel=1e-3)
    assert measured.nats_per_token < 0.6 * np.log(decoder.spec.vocab_size)


@EVERY_LINE
def test_the_card_says_what_the_row_says(line: VersionLine) -> None:
    card, row = (bundled_directory(line) / "README.md").read_text(), row_of(line)
    assert f"{row['nats_per_token']:.4f} nats/token, {row['bits_per_byte']:.4f} bits/byte" in card
    assert row["corpus_digest"] in card and "PSF License" in card and "not a release of any company" in card
    assert ("CC BY 4.0" in card) == ("pictures" in row) == line.reads_images


@EVERY_LINE
def test_the_split_was_decided_by_digest(line: VersionLine) -> None:
    lines = [entry.split() for entry in (bundled_directory(line) / "corpus.txt").read_text().splitlines()]
    permille = recipe_of(line).corpus.held_out_permille
    for digest, name, split in lines:
        held_out = name != "pydoc_data/topics.py" and int(digest[:8], 16) % 1000 < permille
        assert split == ("held-out" if held_out else "train")
    assert 0.02 < sum(split == "held-out" for _, _, split in lines) / len(lines) < 0.1


@pytest.mark.parametrize(
    "prompt", ["def fibonacci(n):\n", "class Stack:\n    def push(self, item):\n", "import os\n\ndef list_files(path):\n"]
)
def test_the_default_continues_with_indented_python(prompt: str) -> None:
    tokenizer = BpeTokenizer.load(bundled_directory(V2_3))
    text = tokenizer.decode(continue_ids(decoder_of(V2_3), tokenizer.encode([prompt])[0], 24, 0.0, 0))
    indent = "        " if prompt.startswith("class") else "    "
    assert text.startswith(indent) and text.strip()


@pytest.mark.parametrize(("line", "least"), [(V3_5, 0.95), (V5_2, 0.6)], ids=["v3.5", "v5.2"])
def test_lines_that_read_images_answer_about_held_out_pictures(line: VersionLine, least: float) -> None:
    pytest.importorskip("sklearn")
    decoder, tokenizer = decoder_of(line), BpeTokenizer.load(bundled_directory(line))
    part = recipe_of(line).pictures
    assert decoder.spec.vision is not None and part is not None
    found = load_pictures(part.source, part.held_out_permille)
    pixels, grid = found.prepared(decoder.spec.vision)
    pictures = Pictures(found, pixels, grid, {}, part.weight)
    shares = right_answers(decoder, PictureStream([[5]], tokenizer, 1, pictures), pictures, 60)
    assert sum(shares.values()) / len(shares) > least
    told = row_of(line)["pictures"]["right"]
    assert set(told) == set(shares) and all(abs(told[kind] - shares[kind]) < 0.15 for kind in told)


def test_the_light_line_is_an_eighth_of_its_teacher_and_loses_little_in_int8() -> None:
    row = row_of(V4_8)
    assert 8 * row["parameters"] <= row_of(V5_2)["parameters"] == row["teacher"]["parameters"]
    assert row["teacher"]["artifact"].startswith("v5.2@")
    assert row["int8"]["loss_ratio"] <= 1.03


def test_the_flagship_finds_needles() -> None:
    decoder, tokenizer = decoder_of(V5_2), BpeTokenizer.load(bundled_directory(V5_2))
    lines = [line for line in Path(__file__).read_text().splitlines() if line.strip()][:60]
    right = 0
    for seed in range(10):
        case = single_needle(lines, Random(seed).random(), seed)
        prompt, answer = (tokenizer.encode([text])[0] for text in (case.prompt, f" {case.answer}\n"))
        ids = torch.tensor(prompt + answer)
        with torch.no_grad():
            logits = decoder(ids, torch.arange(len(ids)), DenseAttend(1, len(ids), decoder.spec.layers))
        right += logits[len(prompt) - 1 : -1].argmax(-1).tolist() == answer
    assert right >= 8
