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
    name, held = names(draw, 1)[0], value(draw)
    return _ask("needle", filler, [(depth, assignment(name, held))], question(name), (depth, held))


def many_needles(filler: Sequence[str], depth: float, seed: int) -> RecallCase:
    """`KEYS` facts of which one is asked; the others stand anywhere."""
    draw = random.Random(f"many {seed} {depth}")
    keys = names(draw, KEYS)
    values = [value(draw) for _ in keys]
    facts = [(depth if at == 0 else draw.random(), assignment(*pair)) for at, pair in enumerate(zip(keys, values, strict=True))]
    return _ask("multi_key", filler, facts, question(keys[0]), (depth, values[0]))


def traced_variable(filler: Sequence[str], depth: float, seed: int) -> RecallCase:
    """A value handed on through `HOPS` names; the last one is asked."""
    draw = random.Random(f"trace {seed} {depth}")
    chain, held = names(draw, HOPS + 1), value(draw)
    places = sorted([depth, *(depth + (1 - depth) * draw.random() for _ in range(HOPS))])
    sources = [held, *chain[:-1]]
    facts = [(place, assignment(name, source)) for place, name, source in zip(places, chain, sources, strict=True)]
    return _ask("tracing", filler, facts, question(chain[-1]), (depth, held))


def commonest_name(filler: Sequence[str], depth: float, seed: int) -> RecallCase:
    """Calls of a few names all over the text (from `depth` on); which was called most often?"""
    draw = random.Random(f"count {seed} {depth}")
    called = names(draw, WORDS)
    calls = [name for at, name in enumerate(called) for _ in range(MOST if at == 0 else draw.randint(1, MOST // 2))]
    facts = [(depth + (1 - depth) * draw.random(), f"count({name})") for name in calls]
    return _ask("aggregation", filler, facts, "print(most_counted())  # prints", (depth, called[0]))


TASKS: tuple[Task, ...] = (single_needle, many_needles, traced_variable, commonest_name)


def assignment(name: str, held: str) -> str:
    """The line that states a fact."""
    return f"{name} = {held}"


def question(name: str) -> str:
    """The line that asks what `name` holds; a space and the answer follow."""
    return f"print({name})  # prints"


def names(draw: random.Random, number: int) -> list[str]:
    """That many different names."""
    pairs = [f"{adjective}_{noun}" for adjective in _ADJECTIVES for noun in _NOUNS]
    return draw.sample(pairs, number)


def value(draw: random.Random) -> str:
    """What a name may hold: five digits, the first no 0."""
    return str(draw.randint(10_000, 99_999))


def _ask(kind: str, filler: Sequence[str], facts: Sequence[tuple[float, str]], asked: str, answer: tuple[float, str]) -> RecallCase:
    """The filler with every fact put in at its share of the lines, then the question."""
    depth, told = answer
    lines = list(filler)
    for place, fact in sorted(facts, reverse=True):
        lines.insert(min(int(place * (len(filler) + 1)), len(filler)), fact)
    return RecallCase(kind, depth, "\n".join([*lines, asked]), told)
