"""Two sets of result rows side by side: for each scenario both medians with their spread, and the ratio of the medians.

It does not know where rows come from or how a comparison is shown. Invariants: only rows of one scenario (or one set of flags) are compared
with each other; a difference counts only where the two spreads do not touch, or where all rounds of two servers agree.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# What is compared: its name in a row, and whether more of it is better.
MEASURES: tuple[tuple[str, bool], ...] = (
    ("requests_per_s", True),
    ("output_tokens_per_s", True),
    ("total_tokens_per_s", True),
    ("goodput_requests_per_s", True),
    ("ttft_ms.p50", False),
    ("ttft_ms.p99", False),
    ("tpot_ms.p50", False),
    ("tpot_ms.p99", False),
    ("itl_ms.p99", False),
    ("latency_ms.p50", False),
)


class RowsError(Exception):
    """The files hold nothing that could be compared; the message says why."""


@dataclass(frozen=True, slots=True)
class Side:
    """One measure in the rows of one side: median, smallest, largest and how many."""

    median: float
    least: float
    most: float
    rows: int


@dataclass(frozen=True, slots=True)
class Difference:
    """One measure of one scenario on both sides; `ratio` is after over before, `verdict` better, worse or within the spread."""

    scenario: str
    measure: str
    before: Side
    after: Side
    ratio: float
    verdict: str


@dataclass(frozen=True, slots=True)
class RoundRatio:
    """One measure of a server over that of the first one: the ratio of each round, and whether all rounds agree on a side of 1."""

    measure: str
    ratio: Side
    verdict: str


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The benchmark rows of a file. Raises RowsError."""
    try:
        lines = path.read_text("utf-8").splitlines()
        rows = [json.loads(line) for line in lines if line.strip()]
    except OSError as error:
        raise RowsError(f"{path} cannot be read: {error.strerror}.") from None
    except ValueError:
        raise RowsError(f"{path} must hold one JSON row a line.") from None
    found = [row for row in rows if isinstance(row, dict) and row.get("kind") == "benchmark"]
    if not found:
        raise RowsError(f"{path} has no rows of deepseek-benchmark.")
    return found


def scenario_of(row: Mapping[str, Any]) -> str:
    """The scenario's name and what was changed of it, or what the flags asked for. A seed makes no other scenario."""
    if row.get("scenario"):
        changes = (f"{name}={value}" for name, value in sorted(row.get("changes", {}).items()) if name != "seed")
        return " ".join((str(row["scenario"]), *changes))
    asked = row.get("asked", {})
    load = f"{row['rate']}/s" if row.get("rate") else f"{row.get('concurrency')} clients"
    return f"{row.get('endpoint')} {asked.get('prompt_tokens')}+{asked.get('output_tokens')} {load}"


def compare(before: Iterable[Mapping[str, Any]], after: Iterable[Mapping[str, Any]]) -> list[Difference]:
    """Every measure of every scenario that both sides have. Raises RowsError where there is none."""
    left, right = _by_scenario(before), _by_scenario(after)
    differences = [
        _difference(scenario, measure, more_is_better, left[scenario], right[scenario])
        for scenario in left
        if scenario in right
        for measure, more_is_better in MEASURES
        if _values(left[scenario], measure) and _values(right[scenario], measure)
    ]
    if not differences:
        raise RowsError(f"the two files share no scenario: {', '.join(left)} and {', '.join(right)}.")
    return differences


def compare_rounds(first: Sequence[Mapping[str, Any]], other: Sequence[Mapping[str, Any]]) -> list[RoundRatio]:
    """The ratio of every measure, round by round; row i of both sides is of round i. A verdict takes three rounds."""
    found = []
    for measure, more_is_better in MEASURES:
        pairs = [(_value(left, measure), _value(right, measure)) for left, right in zip(first, other, strict=True)]
        ratios = [round(right / left, 4) for left, right in pairs if left and right is not None]
        if ratios:
            found.append(RoundRatio(measure, _side(ratios), _verdict(ratios, more_is_better)))
    return found


def side_of(rows: Sequence[Mapping[str, Any]], measure: str) -> Side | None:
    """A measure over some rows; None where no row has it."""
    values = _values(rows, measure)
    return _side(values) if values else None


def _verdict(ratios: Sequence[float], more_is_better: bool) -> str:
    if len(ratios) < 3:
        return "too few rounds"
    if min(ratios) <= 1 <= max(ratios):
        return "within spread"
    return "better" if (min(ratios) > 1) == more_is_better else "worse"


def _by_scenario(rows: Iterable[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    found: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        found.setdefault(scenario_of(row), []).append(row)
    return found


def _difference(
    scenario: str, measure: str, more_is_better: bool, left: Sequence[Mapping[str, Any]], right: Sequence[Mapping[str, Any]]
) -> Difference:
    before, after = _side(_values(left, measure)), _side(_values(right, measure))
    ratio = after.median / before.median if before.median else float("inf" if after.median else 1)
    apart = after.least > before.most or after.most < before.least
    better = (after.median > before.median) == more_is_better
    return Difference(scenario, measure, before, after, ratio, ("better" if better else "worse") if apart else "within spread")


def _values(rows: Sequence[Mapping[str, Any]], measure: str) -> list[float]:
    return [value for row in rows if (value := _value(row, measure)) is not None]


def _value(row: Mapping[str, Any], measure: str) -> float | None:
    name, _, point = measure.partition(".")
    found = row.get(name)
    number = found.get(point) if isinstance(found, dict) else found
    return float(number) if isinstance(number, int | float) else None


def _side(values: Sequence[float]) -> Side:
    return Side(statistics.median(values), min(values), max(values), len(values))
