"""The source tree as the house checks see it: every file parsed once, with helpers to walk imports and definitions.

It does not know the rules. Invariant: imports under TYPE_CHECKING and inside functions are imports like any other.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FunctionNode = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class SourceFile:
    """One file: its path below the tree's root, text and syntax tree."""

    path: str
    text: str

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.text, self.path)

    @property
    def module(self) -> str:
        return self.path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")

    @property
    def package(self) -> str:
        return self.module if self.path.endswith("/__init__.py") else self.module.rpartition(".")[0]

    def nodes(self, *kinds: type[ast.AST]) -> Iterator[ast.AST]:
        return (node for node in ast.walk(self.tree) if isinstance(node, kinds))

    def functions(self) -> Iterator[FunctionNode]:
        return (node for node in ast.walk(self.tree) if isinstance(node, FunctionNode))

    def imports(self, *, inside_functions: bool = True) -> Iterator[tuple[str, int]]:
        """(dotted name, line) of everything imported; for `from a import b` both `a` and `a.b`."""
        hidden = set()
        if not inside_functions:
            hidden = {id(inner) for function in self.functions() for inner in ast.walk(function)}
        for node in ast.walk(self.tree):
            if id(node) in hidden:
                continue
            if isinstance(node, ast.Import):
                yield from ((alias.name, node.lineno) for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                base = self._absolute(node)
                yield base, node.lineno
                yield from ((f"{base}.{alias.name}", node.lineno) for alias in node.names)

    def _absolute(self, node: ast.ImportFrom) -> str:
        if not node.level:
            return node.module or ""
        parts = self.package.split(".")
        kept = parts[: len(parts) - node.level + 1]
        return ".".join([*kept, *([node.module] if node.module else [])])


@dataclass(frozen=True)
class SourceTree:
    """Every Python file below `root/service`."""

    root: Path
    under: str = "service"

    @cached_property
    def files(self) -> tuple[SourceFile, ...]:
        paths = sorted((self.root / self.under).rglob("*.py"))
        return tuple(SourceFile(path.relative_to(self.root).as_posix(), path.read_text("utf-8")) for path in paths)

    def file(self, path: str) -> SourceFile | None:
        return next((file for file in self.files if file.path == path), None)
