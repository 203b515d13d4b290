"""`python -m tests.house.measures`: the measures of the code as a table, each beside its bound, for `make check`.

It does not judge; the tests do. Invariant: every number is counted from the tree as it is.
"""

from __future__ import annotations

import ast
import sys

from tests.house import checks
from tests.house.source import ROOT, SourceFile, SourceTree


def measures(service: SourceTree, tests: SourceTree) -> list[tuple[str, str, str]]:
    """(what, value, bound) of each measure."""
    functions = [(file, node) for file in service.files for node in file.functions()]
    classes = [node for file in service.files for node in file.nodes(ast.ClassDef)]
    held = [(file, node) for file, node in functions if not file.path.startswith("service/kernels/")]
    lines, test_lines = _code_lines(service), _code_lines(tests)
    return [
        ("files", str(len(service.files)), ""),
        ("lines of code", str(lines), ""),
        ("longest file", str(max(file.text.count("\n") for file in service.files)), f"<= {checks.FILE_LINES}"),
        ("longest function", str(max(checks.lines_of(node) for _, node in functions)), f"<= {checks.FUNCTION_LINES}"),
        ("longest class", str(max(checks.lines_of(node) for node in classes)), f"<= {checks.CLASS_LINES}"),  # type: ignore[arg-type]
        ("most parameters", str(max(len(checks.parameters_of(node)) for _, node in held)), f"<= {checks.PARAMETERS}"),
        ("highest complexity", str(max(checks.complexity(node) for _, node in functions)), f"<= {checks.COMPLEXITY}"),
        ("import circles", str(len(checks.circles(service))), "0"),
        ("public names without a docstring", str(len(checks.documentation(service))), "0"),
        ("tests : source", f"{test_lines / lines:.2f}", ">= 1"),
    ]


def _code_lines(tree: SourceTree) -> int:
    return sum(_lines_with_code(file) for file in tree.files)


def _lines_with_code(file: SourceFile) -> int:
    return sum(1 for line in file.text.splitlines() if line.strip() and not line.lstrip().startswith("#"))


def main() -> int:
    """Print the table."""
    for what, value, bound in measures(SourceTree(ROOT), SourceTree(ROOT, "tests")):
        print(f"{what:<36}{value:>8}  {bound}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
