"""The 3C rule: which version `auto` means for a request, by complexity (what it needs), cost and capacity (the hardware tier). Pure.

It does not know loops or HTTP. Invariants: only versions that can read what the request holds are named; the order is a function of the
facts given; a plain name never comes here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

CAPACITY, COMPLEXITY, COST, DEFAULT = "capacity", "complexity", "cost", "default"
EDGE_LINE = "4.8"


@dataclass(frozen=True, slots=True)
class Facts:
    """What the rule knows of a version: `flops` is the arithmetic of one token, `line` its number or None."""

    name: str
    line: str | None
    modalities: tuple[str, ...]
    context_tokens: int
    flops: float


@dataclass(frozen=True, slots=True)
class Demand:
    """What a request asks: whether it holds images, and `cost` `low` (the cheapest that can), `any`, or "" (as the server is set)."""

    images: bool = False
    cost: str = ""


@dataclass(frozen=True, slots=True)
class Ranked:
    """A version to try, by its index among those given, and why."""

    index: int
    reason: str


def rank(versions: Sequence[Facts], demand: Demand, tier: str) -> list[Ranked]:
    """The versions that can read what the request holds, best first; the caller takes the first whose context the request fits.

    `versions` come in the server's order, the default first. Behind the first choice stand those with a longer context, shortest first,
    whose reason is complexity: a prompt that needs them is what makes them the choice.
    """
    needed = {"text", "image"} if demand.images else {"text"}
    able = [index for index, facts in enumerate(versions) if needed <= set(facts.modalities)]
    if not able:
        return []
    first, reason = _first(versions, able, demand, tier)
    longer = [index for index in able if versions[index].context_tokens > versions[first].context_tokens]
    longer.sort(key=lambda index: (versions[index].context_tokens, versions[index].flops))
    return [Ranked(first, reason), *(Ranked(index, COMPLEXITY) for index in longer)]


def _first(versions: Sequence[Facts], able: Sequence[int], demand: Demand, tier: str) -> tuple[int, str]:
    if demand.cost == "low":
        return min(able, key=lambda index: versions[index].flops), COST
    light = [index for index in able if versions[index].line == EDGE_LINE]
    if tier == "edge" and light:
        return light[0], CAPACITY
    return able[0], DEFAULT if able[0] == 0 else COMPLEXITY
