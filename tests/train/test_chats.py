"""Chats made from docstrings."""

from __future__ import annotations

from service.train.chats import chats_of

SOURCE = '''"""Adds numbers.

And more."""

def add(a, b):
    """Return the sum
    of both.

    Details."""
    return a + b

def bare(a):
    return a

class Sum:
    """A running sum."""

    def take(self, number):
        """Add a number."""
        self.total += number
'''


def test_questions_and_answers() -> None:
    chats = {chat.key: chat for chat in chats_of("sums", SOURCE)}
    assert set(chats) == {
        "explain:sums",
        "explain:sums.add",
        "grant:sums.add",
        "explain:sums.Sum",
        "explain:sums.Sum.take",
        "grant:sums.Sum.take",
    }
    assert chats["explain:sums"].answer == "Adds numbers."
    assert chats["explain:sums.add"].answer == "Return the sum of both."
    assert "add`" in chats["explain:sums.add"].question
    assert "Return the sum of both." in chats["grant:sums.add"].question


def test_granted_functions_are_dedented_and_whole() -> None:
    chats = {chat.key: chat for chat in chats_of("sums", SOURCE)}
    answer = chats["grant:sums.Sum.take"].answer
    assert answer == '```python\ndef take(self, number):\n    """Add a number."""\n    self.total += number\n```'


def test_private_names_are_left_out() -> None:
    assert not list(chats_of("m", 'def _f():\n    """Secret."""\n    return 1\n'))


def test_what_does_not_parse_has_none() -> None:
    assert not list(chats_of("m", "print 'old'\n"))
    assert not list(chats_of("m", "x = '\0'\n"))


def test_same_source_same_chats() -> None:
    assert list(chats_of("sums", SOURCE)) == list(chats_of("sums", SOURCE))
