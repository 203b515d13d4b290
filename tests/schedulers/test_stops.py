from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.schedulers.stops import StopStrings


def naive(text: str, strings: tuple[str, ...]) -> tuple[str, str | None]:
    """Character by character: the first match to end, of those the longest."""
    for end in range(1, len(text) + 1):
        matches = [string for string in strings if text[:end].endswith(string)]
        if matches:
            longest = max(matches, key=len)
            return text[: end - len(longest)], longest
    return text, None


def run(pieces: list[str], strings: tuple[str, ...]) -> tuple[str, str | None]:
    stops, text = StopStrings(strings), ""
    for piece in pieces:
        certain, matched = stops.push(piece)
        text += certain
        if matched is not None:
            return text, matched
    return text + stops.flush(), None


@given(
    st.lists(st.text("abc", max_size=5), max_size=12),
    st.lists(st.text("abc", min_size=1, max_size=5), min_size=1, max_size=4, unique=True).map(tuple),
)
def test_the_same_as_looking_at_the_whole_text_however_it_is_cut(pieces, strings):
    assert run(pieces, strings) == naive("".join(pieces), strings)


@given(st.text("ab", max_size=12), st.lists(st.text("ab", min_size=1, max_size=6), min_size=1, max_size=3).map(tuple))
def test_only_the_longest_possible_beginning_of_a_stop_string_is_held_back(text, strings):
    if naive(text, strings)[1] is not None:
        return
    stops = StopStrings(strings)
    certain = "".join(stops.push(character)[0] for character in text)
    held = text[len(certain) :]
    prefixes = [string[:size] for string in strings for size in range(len(string))]
    assert held == max((prefix for prefix in prefixes if text.endswith(prefix)), key=len)


@pytest.mark.parametrize("pieces", [["on", "e st", "op two"], list("one stop two")])
def test_a_match_across_pieces(pieces):
    assert run(pieces, ("stop",)) == ("one ", "stop")
