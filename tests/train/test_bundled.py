"""The checkpoint that ships with the package: whole, small, what its card says, and writing Python."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import service
from service.checkpoints.load import load
from service.checkpoints.manifest import Manifest, read_manifest, verify
from service.inputs.bpe import BpeTokenizer
from service.models.decoder import Decoder
from service.train.evaluate import held_out_loss
from service.train.recipe import load_recipe
from service.train.sample import continue_ids
from service.types.catalog import V2_3

DIRECTORY = Path(service.__file__).parent / "bundled" / "nano-v2.3"


@pytest.fixture(scope="module")
def manifest() -> Manifest:
    return read_manifest(DIRECTORY)


@pytest.fixture(scope="module")
def row() -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((DIRECTORY / "training.json").read_text())
    return loaded


@pytest.fixture(scope="module")
def decoder(manifest: Manifest) -> Decoder:
    return load(manifest, "cpu", torch.float32, serving=False)


def test_it_is_whole_and_small(manifest: Manifest) -> None:
    verify(manifest)
    assert sum(path.stat().st_size for path in DIRECTORY.iterdir()) <= 16 * 1024 * 1024
    assert manifest.line == "2.3" and manifest.stored_dtype == "bfloat16"
    assert manifest.spec == V2_3.spec(dict(V2_3.shapes)["nano"], manifest.spec.end_ids)


def test_its_recipe_is_the_committed_one(row: dict[str, Any]) -> None:
    assert row["recipe"] == "nano-v2.3" and row["recipe_digest"] == load_recipe("nano-v2.3").digest


def test_its_loss_can_be_measured_again(decoder: Decoder, row: dict[str, Any]) -> None:
    probe = row["probe"]
    tokenizer = BpeTokenizer.load(DIRECTORY)
    ids = np.asarray(tokenizer.encode([probe["text"]])[0], dtype=np.uint16)
    measured = held_out_loss(decoder, ids, tokenizer.token_bytes, decoder.spec.context_tokens)
    assert measured.tokens == probe["tokens"] > 200
    assert measured.nats_per_token == pytest.approx(probe["nats_per_token"], rel=1e-3)
    assert measured.nats_per_token < 0.6 * np.log(decoder.spec.vocab_size)


def test_the_card_says_what_the_row_says(row: dict[str, Any]) -> None:
    card = (DIRECTORY / "README.md").read_text()
    assert f"{row['nats_per_token']:.4f} nats/token, {row['bits_per_byte']:.4f} bits/byte" in card
    assert row["corpus_digest"] in card and "PSF License" in card and "not a release of any company" in card


def test_the_split_was_decided_by_digest() -> None:
    lines = [line.split() for line in (DIRECTORY / "corpus.txt").read_text().splitlines()]
    permille = load_recipe("nano-v2.3").corpus.held_out_permille
    for digest, name, split in lines:
        held_out = name != "pydoc_data/topics.py" and int(digest[:8], 16) % 1000 < permille
        assert split == ("held-out" if held_out else "train")
    assert 0.02 < sum(split == "held-out" for _, _, split in lines) / len(lines) < 0.1


@pytest.mark.parametrize(
    "prompt", ["def fibonacci(n):\n", "class Stack:\n    def push(self, item):\n", "import os\n\ndef list_files(path):\n"]
)
def test_it_continues_with_indented_python(decoder: Decoder, prompt: str) -> None:
    tokenizer = BpeTokenizer.load(DIRECTORY)
    text = tokenizer.decode(continue_ids(decoder, tokenizer.encode([prompt])[0], 24, 0.0, 0))
    indent = "        " if prompt.startswith("class") else "    "
    assert text.startswith(indent) and text.strip()
