"""The tree of failures: every error has a status, code and kind of its own, and the drawing at the top of the file is the tree."""

from __future__ import annotations

import re

import pytest

from service.types import errors
from service.types.errors import ServiceError, StartupError


def family(root: type[Exception]) -> list[type[Exception]]:
    return [root, *(leaf for child in root.__subclasses__() for leaf in family(child))]


SERVICE_ERRORS = [kind for kind in family(ServiceError) if kind.__module__ == errors.__name__]
STARTUP_ERRORS = [kind for kind in family(StartupError) if kind.__module__ == errors.__name__]


@pytest.mark.parametrize("kind", SERVICE_ERRORS)
def test_every_error_has_a_status_and_words_for_machines(kind: type[ServiceError]) -> None:
    assert 400 <= kind.status < 600
    assert re.fullmatch(r"[a-z_]+", kind.code) and re.fullmatch(r"[a-z_]+", kind.kind)
    assert (kind.kind == "server_error") == (kind.status >= 500)
    error = kind("Said.", param="field", retry_after_s=1.5)
    assert (str(error), error.message, error.param, error.retry_after_s) == ("Said.", "Said.", "field", 1.5)


def test_only_what_passes_by_itself_is_retried() -> None:
    assert {kind.status for kind in SERVICE_ERRORS if kind.retryable} == {408, 429, 503}


def test_codes_are_distinct() -> None:
    codes = [kind.code for kind in SERVICE_ERRORS if kind is not ServiceError]
    assert len(codes) == len(set(codes))


@pytest.mark.parametrize("kind", SERVICE_ERRORS)
def test_the_drawing_shows_every_error_with_its_status(kind: type[ServiceError]) -> None:
    drawing = errors.__doc__ or ""
    assert kind is ServiceError or re.search(rf"\b{kind.__name__} {kind.status}\b", drawing)


def test_the_drawing_shows_nothing_else() -> None:
    drawn = set(re.findall(r"\b([A-Z]\w+) \d{3}\b", errors.__doc__ or ""))
    assert drawn == {kind.__name__ for kind in SERVICE_ERRORS} - {"ServiceError"}
    assert all(kind.__name__ in (errors.__doc__ or "") for kind in STARTUP_ERRORS)
