"""Finding stop strings in a text that arrives in pieces, character by character, whatever the pieces are.

One Knuth-Morris-Pratt automaton a string: the cost is linear in the text for any set of strings, also for adversarial ones. It does not
know tokens or streams. Invariant: what is held back is exactly the longest suffix that is a proper prefix of some stop string, and the
first match is the one that ends first (of those, the longest), so that the result does not depend on how the text was cut.
"""

from __future__ import annotations


class StopStrings:
    """The stop strings of one sequence and the text held back because one of them may have begun."""

    __slots__ = ("_failures", "_first", "_held", "_states", "_strings")

    def __init__(self, strings: tuple[str, ...]) -> None:
        self._strings = strings
        self._first = frozenset(string[0] for string in strings)
        self._failures = tuple(_failure_links(string) for string in strings)
        self._states = [0] * len(strings)
        self._held = ""

    def push(self, piece: str) -> tuple[str, str | None]:
        """Add text; gives the text that became certain and the stop string that was matched, if one was (what follows it is lost)."""
        if not self._held and self._first.isdisjoint(piece):
            return piece, None
        text = self._held + piece
        for index, character in enumerate(piece, len(self._held) + 1):
            matched = self._step(character)
            if matched is not None:
                self._held = ""
                return text[: index - len(matched)], matched
        certain = len(text) - max(self._states)
        self._held = text[certain:]
        return text[:certain], None

    def flush(self) -> str:
        """The text still held back, when it is known that nothing follows."""
        held, self._held = self._held, ""
        return held

    def _step(self, character: str) -> str | None:
        matched: str | None = None
        for index, string in enumerate(self._strings):
            state, links = self._states[index], self._failures[index]
            while state and string[state] != character:
                state = links[state - 1]
            if string[state] == character:
                state += 1
            if state == len(string):
                matched = string if matched is None or len(string) > len(matched) else matched
                state = links[state - 1]
            self._states[index] = state
        return matched


def _failure_links(string: str) -> list[int]:
    """For each prefix of `string`, the length of its longest proper border."""
    links, border = [0] * len(string), 0
    for index in range(1, len(string)):
        while border and string[index] != string[border]:
            border = links[border - 1]
        if string[index] == string[border]:
            border += 1
        links[index] = border
    return links
