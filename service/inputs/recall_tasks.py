"""Prompts whose answer stands far back in them: needles, chains of variables, counts. Text only, the same for the same seed.

They look like source code, so that a model of code can be asked too: facts are assignments between lines of other text, and the question is
what such a name holds. It does not know tokenizers or models. Invariant: an answer cannot be guessed from its question, and every name is
assigned once.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import NamedTuple

_ADJECTIVES = (
    "amber",
    "brisk",
    "coral",
    "dusty",
    "eager",
    "frosty",
    "golden",
    "hollow",
    "ivory",
    "jolly",
    "keen",
    "lunar",
    "mossy",
    "noble",
)
_NOUNS = ("anchor", "badger", "candle", "desert", "engine", "falcon", "garden", "harbor", "island", "jacket", "kettle", "lantern")
KEYS = 8
HOPS = 3
WORDS, MOST = 5, 6


class RecallCase(NamedTuple):
    """One question: `prompt` ends where the answer begins. `depth` 0 … 1 is where in the text the (first) fact stands."""

    kind: str
    depth: float
    prompt: str
    answer: str


Task = Callable[[Sequence[str], float, int], RecallCase]


def single_needle(filler: Sequence[str], depth: float, seed: int) -> RecallCase:
    """One fact among the lines of `filler`."""
    draw = random.Random(f"single {seed} {depth}")
    name, value = _names(draw, 1)[0], _value(draw)
    return _ask("needle", filler, [(depth, f"{name} = {value}")], f"print({name})  # prints", (depth, value))


def many_needles(filler: Sequence[str], depth: float, seed: int) -> RecallCase:
    """`KEYS` facts of which one is asked; the others stand anywhere."""
    draw = random.Random(f"many {seed} {depth}")
    names = _names(draw, KEYS)
    values = [_value(draw) for _ in names]
    facts = [(depth if at == 0 else draw.random(), f"{name} = {value}") for at, (name, value) in enumerate(zip(names, values, strict=True))]
    return _ask("multi_key", filler, facts, f"print({names[0]})  # prints", (depth, values[0]))


def traced_variable(filler: Sequence[str], depth: float, seed: int) -> RecallCase:
    """A value handed on through `HOPS` names; the last one is asked."""
    draw = random.Random(f"trace {seed} {depth}")
    names, value = _names(draw, HOPS + 1), _value(draw)
    places = sorted([depth, *(depth + (1 - depth) * draw.random() for _ in range(HOPS))])
    sources = [value, *names[:-1]]
    facts = [(place, f"{name} = {source}") for place, name, source in zip(places, names, sources, strict=True)]
    return _ask("tracing", filler, facts, f"print({names[-1]})  # prints", (depth, value))


def commonest_name(filler: Sequence[str], depth: float, seed: int) -> RecallCase:
    """Calls of a few names all over the text (from `depth` on); which was called most often?"""
    draw = random.Random(f"count {seed} {depth}")
    names = _names(draw, WORDS)
    calls = [name for at, name in enumerate(names) for _ in range(MOST if at == 0 else draw.randint(1, MOST // 2))]
    facts = [(depth + (1 - depth) * draw.random(), f"count({name})") for name in calls]
    return _ask("aggregation", filler, facts, "print(most_counted())  # prints", (depth, names[0]))


TASKS: tuple[Task, ...] = (single_needle, many_needles, traced_variable, commonest_name)


def _ask(kind: str, filler: Sequence[str], facts: Sequence[tuple[float, str]], question: str, answer: tuple[float, str]) -> RecallCase:
    """The filler with every fact put in at its share of the lines, then the question."""
    depth, value = answer
    lines = list(filler)
    for place, fact in sorted(facts, reverse=True):
        lines.insert(min(int(place * (len(filler) + 1)), len(filler)), fact)
    return RecallCase(kind, depth, "\n".join([*lines, question]), value)


def _names(draw: random.Random, number: int) -> list[str]:
    pairs = [f"{adjective}_{noun}" for adjective in _ADJECTIVES for noun in _NOUNS]
    return draw.sample(pairs, number)


def _value(draw: random.Random) -> str:
    return str(draw.randint(10_000, 99_999))
