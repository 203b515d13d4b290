"""Preparation: the same recipe and library prepare the same run, and its identity tells when they do not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from service.train.prepare import PreparedRun, prepare
from service.train.recipe import Recipe
from service.types.errors import SettingsError


def test_the_same_again(prepared: PreparedRun, library: Path, recipe_with: Callable[..., Recipe]) -> None:
    again = prepare(recipe_with(), library)
    assert again.identity == prepared.identity
    assert np.array_equal(again.train.tokens, prepared.train.tokens)
    assert again.tokenizer.files(64) == prepared.tokenizer.files(64)


@pytest.mark.parametrize(
    ("changes", "same"),
    [
        ({"schedule": {"steps": 99}}, True),
        ({"samples": {"tokens": 9}}, True),
        ({"evaluate": {"times": 9}}, True),
        ({"seed": 9}, False),
        ({"corpus": {"chat_share": 0.1}}, False),
        ({"vocab_size": 400}, False),
        ({"optimizer": {"clip": 2.0}}, False),
    ],
    ids=str,
)
def test_identity(prepared: PreparedRun, library: Path, recipe_with: Callable[..., Recipe], changes: dict[str, Any], same: bool) -> None:
    assert (prepare(recipe_with(**changes), library).identity == prepared.identity) is same


def test_nothing_held_out_is_in_the_stream(prepared: PreparedRun) -> None:
    text = prepared.tokenizer.decode(prepared.train.tokens.tolist())
    for held_out in prepared.corpus.held_out:
        name = held_out.split("class ")[1].split(":")[0]
        assert f"class {name}:" not in text


def test_a_recipe_asks_for_sequences_that_begin_with_documents(
    prepared: PreparedRun, library: Path, recipe_with: Callable[..., Recipe]
) -> None:
    aligned = prepare(recipe_with(corpus={"aligned": True}), library)
    assert aligned.identity != prepared.identity and np.array_equal(aligned.train.tokens, prepared.train.tokens)
    tokens = aligned.train.tokens
    firsts = {tuple(tokens[end + 1 : end + 5].tolist()) for end in np.flatnonzero(tokens == prepared.tokenizer.end_id)}
    starts = [[tuple(run.train.batch(at, 1, 64)[0][:4].tolist()) for at in range(0, 64 * 40, 64)] for run in (aligned, prepared)]
    begun = [sum(start in firsts for start in found) for found in starts]
    assert begun[0] > begun[1] + 5


def test_unknown_lines_and_shapes(library: Path, recipe_with: Callable[..., Recipe]) -> None:
    for changes in ({"line": "9.9"}, {"shape": "vast"}):
        with pytest.raises(SettingsError, match="not in the catalog"):
            prepare(recipe_with(**changes), library)
