"""Short chats made from docstrings: a question about a function and its first paragraph, or a wish and the function that grants it.

It reads source text only (nothing is imported or run) and does not know tokens or templates. Invariant: a chat is a function of the
module's name and text.
"""

from __future__ import annotations

import ast
import hashlib
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass

_ASK_FUNCTION = ("What does `{name}` do?", "Explain `{name}`.", "What is `{name}` for?", "How would you describe `{name}` in Python?")
_ASK_CLASS = ("What is `{name}`?", "Explain the class `{name}`.", "What is `{name}` for?")
_ASK_MODULE = ("What is the module `{name}` for?", "What does the Python module `{name}` do?", "Explain the `{name}` module.")
_WISH = ("Write a Python function `{name}`: {summary}", "Write `{name}` in Python. {summary}", "Show me a function `{name}`. {summary}")
_LONGEST_ANSWER = 700
_LONGEST_SOURCE_LINES = 40

_Function = ast.FunctionDef | ast.AsyncFunctionDef
_Documented = ast.Module | ast.ClassDef | _Function


@dataclass(frozen=True, slots=True)
class Chat:
    """One question and its answer. `key` tells chats apart within a corpus."""

    key: str
    question: str
    answer: str


def chats_of(module: str, source: str) -> Iterator[Chat]:
    """The chats of one module's source, in the order of the source. A module that does not parse has none."""
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return
    yield from _explain(tree, module, module, _ASK_MODULE)
    yield from _walk(tree, module, module, source)


def _walk(node: ast.Module | ast.ClassDef, prefix: str, module: str, source: str) -> Iterator[Chat]:
    for child in node.body:
        if not isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if child.name.startswith("_"):
            continue
        name = f"{prefix}.{child.name}"
        if isinstance(child, ast.ClassDef):
            yield from _explain(child, name, module, _ASK_CLASS)
            yield from _walk(child, name, module, source)
        else:
            yield from _explain(child, name, module, _ASK_FUNCTION)
            yield from _grant(child, name, source)


def _explain(node: _Documented, name: str, module: str, questions: tuple[str, ...]) -> Iterator[Chat]:
    paragraph = _first_paragraph(node)
    if paragraph and len(paragraph) <= _LONGEST_ANSWER:
        shown = name if _bucket(name, 2) else name.removeprefix(module + ".")
        yield Chat(f"explain:{name}", questions[_bucket(name, len(questions))].format(name=shown), paragraph)


def _grant(node: _Function, name: str, source: str) -> Iterator[Chat]:
    summary = _first_paragraph(node).split(". ")[0]
    lines = (node.end_lineno or node.lineno) - node.lineno + 1
    if not summary or len(summary) > 160 or lines > _LONGEST_SOURCE_LINES:
        return
    code = textwrap.dedent("\n".join(source.splitlines()[node.lineno - 1 : node.end_lineno]))
    wish = _WISH[_bucket(name, len(_WISH))].format(name=node.name, summary=summary.rstrip(".") + ".")
    yield Chat(f"grant:{name}", wish, f"```python\n{code}\n```")


def _first_paragraph(node: _Documented) -> str:
    text = ast.get_docstring(node) or ""
    return " ".join(text.split("\n\n")[0].split())


def _bucket(name: str, count: int) -> int:
    return hashlib.sha256(name.encode()).digest()[0] % count
