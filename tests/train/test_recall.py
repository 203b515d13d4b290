"""Documents of questions: the same again, only over lines that are learned from, all kinds and many lengths; and what a recipe asks for."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np

from service.train.prepare import PreparedRun, prepare
from service.train.recall import recall_documents
from service.train.recipe import Recipe, load_recipe, recipe_names
from service.types.catalog import V5_2

TEXTS = ["\n".join(f"text {number} of {place}" for number in range(200)) for place in "ab"]


def test_documents_are_the_same_again_and_of_many_lengths() -> None:
    documents = recall_documents(TEXTS, 40, (4, 100), 1)
    assert documents == recall_documents(TEXTS, 40, (4, 100), 1) and documents != recall_documents(TEXTS, 40, (4, 100), 2)
    assert len(set(documents)) == 40
    lengths = [document.count("\n") for document in documents]
    assert min(lengths) < 20 and 60 < max(lengths) < 300


def test_some_documents_hold_few_names_and_some_one_for_every_line() -> None:
    documents = [document for index, document in enumerate(recall_documents(TEXTS, 60, (4, 200), 3)) if index % 3]
    facts = [
        len(re.findall(r"^\w+ = \w+$", document, re.M)) / document.count("text ") for document in documents if document.count("text ") >= 16
    ]
    assert min(facts) < 0.2 and max(facts) > 0.9


def test_every_third_document_ends_with_the_answer_to_its_one_question() -> None:
    asked = recall_documents(TEXTS, 40, (4, 100), 1)[::3]
    for document in asked:
        question, answer = document.rstrip("\n").rsplit(" ", 1)
        assert question.endswith("# prints") and answer in question and document.count("# prints") == 1
    assert {document.splitlines()[-1].startswith("print(most") for document in asked} == {True, False}


def test_the_other_documents_ask_every_fact_after_it_was_stated_and_tell_the_truth() -> None:
    documents = [document for index, document in enumerate(recall_documents(TEXTS, 60, (4, 200), 3)) if index % 3]
    handed_on = 0
    for document in documents:
        held: dict[str, str] = {}
        asked: set[str] = set()
        for line in document.splitlines():
            if match := re.fullmatch(r"(\w+) = (\w+)", line):
                name, source = match.groups()
                assert name not in held
                held[name] = held.get(source, source)
                handed_on += source in held
            elif match := re.fullmatch(r"print\((\w+)\)  # prints (\d{5})", line):
                assert held[match[1]] == match[2]
                asked.add(match[1])
            else:
                assert line.startswith("text ")
        assert asked == set(held) and len(held) >= 2
    assert handed_on > 20 and max(document.count("# prints") for document in documents) > 20


def test_questions_at_the_end_ask_for_facts_from_the_first_line_on() -> None:
    plain = recall_documents(TEXTS, 60, (150, 200), 3)
    documents = recall_documents(TEXTS, 60, (150, 200), 3, at_end=1.0)
    # Documents of one question are the same.
    assert documents[::3] == plain[::3] and plain == recall_documents(TEXTS, 60, (150, 200), 3, at_end=0.0)
    counts = set()
    for document in (document for index, document in enumerate(documents) if index % 3):
        lines = document.splitlines()
        held = dict(match.groups() for line in lines if (match := re.fullmatch(r"(\w+) = (\d{5})", line)))
        asked = {at: re.fullmatch(r"print\((\w+)\)  # prints (\d{5})", line) for at, line in enumerate(lines) if line.startswith("print(")}
        assert lines[0].split(" = ")[0] in held
        assert {match[1]: match[2] for match in asked.values() if match} == held and len(asked) == len(held)
        texts = sum(line.startswith("text ") for line in lines)
        assert sum(line.startswith("text ") for line in lines[: min(asked)]) >= int(0.9 * texts)
        counts.add(len(held))
    assert min(counts) == 8 and max(counts) > 30
    mixed = recall_documents(TEXTS, 60, (150, 200), 3, at_end=0.5)
    changed = sum(one != other for one, other in zip(mixed, plain, strict=True))
    assert 10 < sum(one == other for one, other in zip(mixed, documents, strict=True)) - 20 < 30 and changed > 10


def test_a_recipe_that_asks_for_questions_learns_them(prepared: PreparedRun, library: Path, recipe_with: Callable[..., Recipe]) -> None:
    asked = recipe_with(corpus={"recall_documents": 30, "recall_lines": 20})
    run = prepare(asked, library)
    assert run.identity != prepared.identity and len(run.train) > len(prepared.train)
    text = run.tokenizer.decode(run.train.tokens.tolist())
    assert text.count("# prints") > 60 and "# prints" not in prepared.tokenizer.decode(prepared.train.tokens.tolist())
    assert np.array_equal(run.held_out.tokens, prepared.held_out.tokens)
    ending = prepare(recipe_with(corpus={"recall_documents": 30, "recall_lines": 20, "recall_at_end": 1.0}), library)
    assert ending.identity != run.identity and ending.tokenizer.decode(ending.train.tokens.tolist()) != text


def test_the_flagship_has_a_recipe() -> None:
    recipe = load_recipe("nano-v5.2")
    assert "nano-v5.2" in recipe_names() and recipe.line == V5_2.number
    shape, longest = dict(V5_2.shapes)[recipe.shape], recipe.schedule.lengths[-1].tokens
    assert V5_2.window is not None and 2 * V5_2.window < longest <= shape.context_tokens and recipe.pictures is not None
    assert recipe.corpus.recall_documents > 0
