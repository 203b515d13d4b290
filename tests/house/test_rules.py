"""Every rule of the house holds for the service, and every rule can fail: each is shown a planted violation."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.house import checks
from tests.house.source import ROOT, SourceTree

HEADER = '"""A file.\n\nSecond line.\nThird line.\n"""\n'


@pytest.fixture(scope="module")
def service() -> SourceTree:
    return SourceTree(ROOT)


@pytest.mark.parametrize("check", checks.CHECKS, ids=lambda check: check.__name__)
def test_the_service_keeps_the_rule(service: SourceTree, check: Callable[[SourceTree], list[str]]) -> None:
    assert check(service) == []


def plant(root: Path, files: dict[str, str]) -> SourceTree:
    for path, text in files.items():
        target = root / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text)
    return SourceTree(root)


LONG_FUNCTION = HEADER + 'def long() -> None:\n    """Long."""\n' + "    print()\n" * 50
LONG_CLASS = HEADER + 'class Long:\n    """Long."""\n' + "".join(f"    x{index} = 0\n" for index in range(250))
BRANCHY = (
    HEADER
    + 'def branchy(x: int) -> None:\n    """Branchy."""\n'
    + "".join(f"    if x == {index}:\n        return\n" for index in range(10))
)
DOCUMENTED = HEADER + 'def well(a: int) -> int:\n    """Well."""\n    return a\n'

PLANTED: list[tuple[Callable[[SourceTree], list[str]], dict[str, str], str]] = [
    (checks.circles, {"service/a.py": "import service.b", "service/b.py": "import service.a"}, "service.a <-> service.b"),
    (
        checks.circles,
        {"service/a.py": "if TYPE_CHECKING:\n    from service.b import x", "service/b.py": "def f():\n    from service import a"},
        "service.a <-> service.b",
    ),
    (checks.circles, {"service/p/a.py": "from . import b", "service/p/b.py": "from .a import x"}, "service.p.a <-> service.p.b"),
    (checks.third_party, {"service/schedulers/x.py": "def f():\n    import fastapi.responses"}, "x.py:2 imports fastapi"),
    (checks.third_party, {"service/api/x.py": "from prometheus_client import Counter"}, "imports prometheus_client"),
    (checks.third_party, {"service/api/x.py": "import tokenizers"}, "imports tokenizers"),
    (checks.third_party, {"service/schedulers/x.py": "import torch"}, "imports torch"),
    (checks.third_party, {"service/models/x.py": "import surprising"}, "imports surprising"),
    (checks.types_are_plain, {"service/types/x.py": "import msgspec"}, "imports msgspec"),
    (checks.types_are_plain, {"service/types/x.py": "from service.config import load"}, "imports service.config"),
    (checks.sizes, {"service/x.py": HEADER + "x = 0\n" * 350}, "lines"),
    (checks.sizes, {"service/x.py": LONG_FUNCTION}, "long has 52 lines"),
    (checks.sizes, {"service/x.py": LONG_CLASS}, "class Long has 252 lines"),
    (checks.sizes, {"service/x.py": "def f(a, b, c, *, d, e, f, g): ..."}, "f has 7 parameters"),
    (checks.sizes, {"service/x.py": BRANCHY}, "branchy has a complexity of 11"),
    (checks.documentation, {"service/x.py": '"""Too short."""'}, "header"),
    (checks.documentation, {"service/x.py": HEADER + "def bare(): ..."}, "bare has no docstring"),
    (checks.documentation, {"service/x.py": HEADER + "class Bare: ..."}, "Bare has no docstring"),
    (checks.documentation, {"service/x.py": HEADER + 'class A:\n    """A."""\n    def bare(self): ...'}, "bare has no docstring"),
    (checks.names, {"service/x.py": "class BlockManager: ..."}, "BlockManager"),
    (checks.names, {"service/utils.py": ""}, "utils"),
    (checks.names, {"service/x.py": "def f(page_id): ..."}, "page_id"),
    (checks.names, {"service/x.py": "self.kv_slots = 1"}, "kv_slots"),
    (checks.names, {"service/x.py": "for req in []: ..."}, "req"),
    (checks.no_global, {"service/x.py": "def f():\n    global x"}, "x.py:2"),
    (checks.no_assert, {"service/x.py": "assert True"}, "x.py:1"),
    (checks.broad_except, {"service/x.py": "try: ...\nexcept Exception: ..."}, "x.py:2"),
    (checks.broad_except, {"service/x.py": "try: ...\nexcept (ValueError, BaseException): ..."}, "x.py:2"),
    (checks.broad_except, {"service/x.py": "try: ...\nexcept: ..."}, "x.py:2"),
    (checks.broad_except, {"service/x.py": "try: ...\nexcept Exception as e:\n    raise ValueError"}, "x.py:2"),
    (checks.environment, {"service/x.py": "import os\nos.environ['A']"}, "x.py:2"),
    (checks.environment, {"service/x.py": "from os import getenv"}, "x.py:1"),
    (checks.forbidden_text, {"service/x.py": "# TO" + "DO later"}, "x.py:1"),
    (checks.forbidden_text, {"service/x.py": "path = '/ho" + "me/me'"}, "x.py:1"),
    (checks.fields_obeyed, {"service/types/settings.py": "class A:\n    lonely: int = 0", "service/x.py": "a.lonely = 1"}, "A.lonely"),
    (checks.fields_obeyed, {"service/api/schemas.py": "class Body:\n    lonely: int = 0\n    x = self.lonely"}, "Body.lonely"),
]


@pytest.mark.parametrize(("check", "files", "expected"), PLANTED, ids=lambda value: getattr(value, "__name__", ""))
def test_every_rule_can_fail(tmp_path: Path, check: Callable[[SourceTree], list[str]], files: dict[str, str], expected: str) -> None:
    found = check(plant(tmp_path, files))
    assert any(expected in entry for entry in found), found


def test_every_rule_was_shown_a_violation() -> None:
    assert {check for check, _, _ in PLANTED} == set(checks.CHECKS)


def test_a_good_file_passes_every_rule(tmp_path: Path) -> None:
    tree = plant(tmp_path, {"service/well.py": DOCUMENTED})
    assert [check(tree) for check in checks.CHECKS] == [[]] * len(checks.CHECKS)


def test_complexity_counts_decisions() -> None:
    source = (
        "def f(x):\n    for a in x:\n        if a and x:\n            pass\n        elif a:\n            pass\n    while x:\n        pass\n"
    )
    tree = checks.ast.parse(source)
    assert checks.complexity(tree.body[0]) == 5  # type: ignore[arg-type]
