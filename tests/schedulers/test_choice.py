"""The 3C rule on plain facts."""

from __future__ import annotations

import pytest

from service.schedulers.choice import CAPACITY, COMPLEXITY, COST, DEFAULT, Demand, Facts, rank

TEXT, IMAGES = ("text",), ("text", "image")
LARGE = Facts("v5.2", "5.2", IMAGES, 16_384, 100.0)
LIGHT = Facts("v4.8", "4.8", TEXT, 2048, 10.0)
SEEING = Facts("v3.5", "3.5", IMAGES, 4096, 60.0)
PLAIN = Facts("v2.3", "2.3", TEXT, 2048, 50.0)
ALL = [LARGE, LIGHT, SEEING, PLAIN]


def ranked(versions: list[Facts], tier: str = "cpu", **demand: object) -> list[tuple[str, str]]:
    return [(versions[one.index].name, one.reason) for one in rank(versions, Demand(**demand), tier)]  # type: ignore[arg-type]


def test_the_default_where_nothing_speaks_against_it() -> None:
    assert ranked(ALL) == [("v5.2", DEFAULT)]
    assert ranked(ALL[2:]) == [("v3.5", DEFAULT)]


def test_low_cost_takes_the_cheapest_and_then_what_is_long_enough() -> None:
    assert ranked(ALL, cost="low") == [("v4.8", COST), ("v3.5", COMPLEXITY), ("v5.2", COMPLEXITY)]


def test_an_edge_device_prefers_the_light_line() -> None:
    assert ranked(ALL, "edge")[0] == ("v4.8", CAPACITY)
    assert ranked([LARGE, PLAIN], "edge") == [("v5.2", DEFAULT)]


def test_images_need_a_version_that_reads_them() -> None:
    assert ranked([PLAIN, SEEING, LARGE], images=True) == [("v3.5", COMPLEXITY), ("v5.2", COMPLEXITY)]
    assert ranked([LARGE, SEEING], images=True, cost="low") == [("v3.5", COST), ("v5.2", COMPLEXITY)]
    assert ranked(ALL, "edge", images=True) == [("v5.2", DEFAULT)]
    assert ranked([PLAIN, LIGHT], images=True) == []


@pytest.mark.parametrize("order", [[PLAIN, LARGE, SEEING], [PLAIN, SEEING, LARGE]])
def test_longer_contexts_follow_the_shortest_first(order: list[Facts]) -> None:
    assert ranked(order) == [("v2.3", DEFAULT), ("v3.5", COMPLEXITY), ("v5.2", COMPLEXITY)]
