"""Documents of questions: the same again, only over lines that are learned from, all kinds and many lengths; and what a recipe asks for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from service.train.prepare import PreparedRun, prepare
from service.train.recall import recall_documents
from service.train.recipe import Recipe, load_recipe, recipe_names
from service.types.catalog import V5_2

TEXTS = ["\n".join(f"text {number} of {place}" for number in range(200)) for place in "ab"]


def test_documents_are_the_same_again_and_end_with_their_answers() -> None:
    documents = recall_documents(TEXTS, 40, 100, 1)
    assert documents == recall_documents(TEXTS, 40, 100, 1) and documents != recall_documents(TEXTS, 40, 100, 2)
    assert len(set(documents)) == 40
    for document in documents:
        question, answer = document.rstrip("\n").rsplit(" ", 1)
        assert question.endswith("# prints") and answer in question
    lengths = [document.count("\n") for document in documents]
    assert min(lengths) < 20 and 60 < max(lengths) < 130
    assert {document.splitlines()[-1].startswith("print(most") for document in documents} == {True, False}


def test_a_recipe_that_asks_for_questions_learns_them(prepared: PreparedRun, library: Path, recipe_with: Callable[..., Recipe]) -> None:
    asked = recipe_with(corpus={"recall_documents": 30, "recall_lines": 20})
    run = prepare(asked, library)
    assert run.identity != prepared.identity and len(run.train) > len(prepared.train)
    text = run.tokenizer.decode(run.train.tokens.tolist())
    assert text.count("# prints") == 30 and "# prints" not in prepared.tokenizer.decode(prepared.train.tokens.tolist())
    assert np.array_equal(run.held_out.tokens, prepared.held_out.tokens)


def test_the_flagship_has_a_recipe() -> None:
    recipe = load_recipe("nano-v5.2")
    assert "nano-v5.2" in recipe_names() and recipe.line == V5_2.number
    assert recipe.schedule.lengths[-1].tokens == dict(V5_2.shapes)[recipe.shape].context_tokens
    assert recipe.corpus.recall_documents > 0
