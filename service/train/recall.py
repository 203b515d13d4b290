"""Documents that teach a model to look things up far back: the questions of `inputs/recall_tasks` with their answers, in lines of text.

It does not know tokens or models. Invariants: the same texts, numbers and seed give the same documents; the filler is taken from the texts
that are learned from anyway, so nothing held out comes in.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from service.inputs.recall_tasks import TASKS, assignment, names, question, value

_LINES_PER_FACT, _MOST_FACTS = (1, 2, 4, 8), 72
_FACTS_ASKED_AT_END = (8, 24, 72)
_HANDED_ON = 0.25  # of the facts are the values of earlier names


def recall_documents(texts: Sequence[str], number: int, counts: tuple[int, int], seed: int, *, at_end: float = 0.0) -> list[str]:
    """`number` documents over more than counts[0] and up to counts[1] lines of `texts`, short ones more often.

    Every third is one question of the four kinds in turn; the others state and ask facts all the way through, so that there is much to
    learn in each, or, the share `at_end` of them, ask at the end what was stated anywhere and in the first line.
    """
    lines = [line for text in texts for line in text.splitlines() if line.strip()]
    documents = []
    for index in range(number):
        draw = random.Random(f"recall {seed} {index}")
        longest = min(counts[1], len(lines))
        fewest = min(counts[0], longest)
        count = min(int(fewest * (longest / fewest) ** draw.random()) + 1, longest)
        start = draw.randrange(len(lines) - count + 1)
        filler = lines[start : start + count]
        if index % 3 and at_end and draw.random() < at_end:
            documents.append(_questions_at_end(filler, draw))
        elif index % 3:
            documents.append(_many_questions(filler, draw))
        else:
            case = TASKS[index // 3 % len(TASKS)](filler, draw.random(), draw.randrange(1 << 30))
            documents.append(f"{case.prompt} {case.answer}\n")
    return documents


def _many_questions(filler: Sequence[str], draw: random.Random) -> str:
    """The filler with facts between its lines, each asked once or twice anywhere after it.

    Every text has a density of its own: only where many names are held at once does the name asked for matter.
    """
    facts = names(draw, min(max(2, len(filler) // draw.choice(_LINES_PER_FACT)), _MOST_FACTS))
    held: dict[str, str] = {}
    placed: list[tuple[float, str]] = []
    for name, place in zip(facts, sorted(draw.random() for _ in facts), strict=True):
        source = draw.choice(list(held)) if held and draw.random() < _HANDED_ON else value(draw)
        held[name] = held.get(source, source)
        placed.append((place, assignment(name, source)))
        for _ in range(draw.randint(1, 2)):
            placed.append((place + (1.0 - place) * draw.random(), f"{question(name)} {held[name]}"))
    return _between(filler, placed)


def _questions_at_end(filler: Sequence[str], draw: random.Random) -> str:
    """The filler with facts between its lines, the first before all of them, each asked in the last tenth."""
    facts = names(draw, min(draw.choice(_FACTS_ASKED_AT_END), max(2, len(filler) // 4)))
    placed: list[tuple[float, str]] = []
    for at, name in enumerate(facts):
        place, held = draw.random() if at else 0.0, value(draw)
        placed.append((place, assignment(name, held)))
        placed.append((max(place, 0.9) + (1.0 - max(place, 0.9)) * draw.random(), f"{question(name)} {held}"))
    return _between(filler, placed)


def _between(filler: Sequence[str], placed: Sequence[tuple[float, str]]) -> str:
    """The filler's lines with others between them, each at its share 0 … 1 of the text."""
    made = [((at + 0.5) / len(filler), line) for at, line in enumerate(filler)] + list(placed)
    return "\n".join(line for _, line in sorted(made, key=lambda item: item[0])) + "\n"
