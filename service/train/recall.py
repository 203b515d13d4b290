"""Documents that teach a model to look things up far back: the questions of `inputs/recall_tasks` with their answers, in lines of text.

It does not know tokens or models. Invariants: the same texts, numbers and seed give the same documents; the filler is taken from the texts
that are learned from anyway, so nothing held out comes in.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from service.inputs.recall_tasks import TASKS

_FEWEST_LINES = 4


def recall_documents(texts: Sequence[str], number: int, longest_lines: int, seed: int) -> list[str]:
    """`number` documents over up to `longest_lines` lines of `texts`, the four kinds of questions in turn, short ones more often."""
    lines = [line for text in texts for line in text.splitlines() if line.strip()]
    documents = []
    for index in range(number):
        draw = random.Random(f"recall {seed} {index}")
        longest = min(longest_lines, len(lines))
        count = min(int(_FEWEST_LINES * (longest / _FEWEST_LINES) ** draw.random()) + 1, longest)
        start = draw.randrange(len(lines) - count + 1)
        case = TASKS[index % len(TASKS)](lines[start : start + count], draw.random(), draw.randrange(1 << 30))
        documents.append(f"{case.prompt} {case.answer}\n")
    return documents
