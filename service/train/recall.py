"""Documents that teach a model to look things up far back: the questions of `inputs/recall_tasks` with their answers, in lines of text.

It does not know tokens or models. Invariants: the same texts, numbers and seed give the same documents; the filler is taken from the texts
that are learned from anyway, so nothing held out comes in.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from service.inputs.recall_tasks import TASKS, assignment, names, question, value

_LINES_PER_FACT, _MOST_FACTS = (1, 2, 4, 8), 72
_HANDED_ON = 0.25  # of the facts are the values of earlier names


def recall_documents(texts: Sequence[str], number: int, counts: tuple[int, int], seed: int) -> list[str]:
    """`number` documents over more than counts[0] and up to counts[1] lines of `texts`, short ones more often.

    Every third is one question of the four kinds in turn; the others state and ask facts all the way through, so that there is much to
    learn in each.
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
        if index % 3:
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
    made = [((at + 0.5) / len(filler), line) for at, line in enumerate(filler)] + placed
    return "\n".join(line for _, line in sorted(made, key=lambda item: item[0])) + "\n"
