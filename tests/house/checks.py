"""The rules of the house as functions from a source tree to a list of violations, each naming file and line.

It does not know pytest. Invariant: an empty list means that the rule holds everywhere; every rule is shown to fail on a planted violation.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Callable, Iterator

from tests.house.source import FunctionNode, SourceFile, SourceTree

FILE_LINES, FUNCTION_LINES, CLASS_LINES, PARAMETERS, COMPLEXITY = 350, 50, 250, 6, 10

# Who may import what. A path ends in "/" for a room. Everything third-party that service/ imports is listed.
MAY_IMPORT: dict[str, tuple[str, ...]] = {
    "fastapi": ("service/api/",),
    "starlette": ("service/api/",),
    "uvicorn": ("service/api/",),
    "h11": ("service/api/",),
    "httptools": ("service/api/",),
    "pydantic": ("service/api/", "service/config/"),
    "pydantic_settings": ("service/config/",),
    "annotated_types": ("service/config/",),
    "prometheus_client": ("service/telemetry.py",),
    "tokenizers": ("service/inputs/",),
    "jinja2": ("service/inputs/",),
    "PIL": ("service/inputs/images.py", "service/train/pictures.py"),
    "onnx": tuple(f"service/checkpoints/onnx_{name}.py" for name in ("export", "nodes", "decoder", "vision")),
    "onnxruntime": ("service/checkpoints/onnx_graph.py",),
    "torch": ("service/kernels/", "service/models/", "service/checkpoints/", "service/engine/", "service/train/"),
    "triton": ("service/kernels/",),
    "safetensors": ("service/checkpoints/", "service/train/"),
    "yaml": ("service/config/", "service/checkpoints/", "service/train/"),
    "numpy": ("service/inputs/", "service/kernels/", "service/models/", "service/checkpoints/", "service/engine/", "service/train/"),
    "msgspec": ("service/processes.py", "service/engine/", "service/inputs/", "service/api/", "service/loadgen/", "service/telemetry.py"),
    "httpx": ("service/loadgen/httpx_sender.py",),
    "rich": ("service/cli/", "service/train/"),
    "uvloop": ("service/cli/", "service/api/"),
    "sklearn": ("service/train/",),
    "matplotlib": ("service/train/", "service/cli/train.py", "service/cli/benchmark_report.py"),
}
# Worker, loop and HTTP boundary; and the one call into a library that raises bare Exception (tokenizers).
BROAD_EXCEPT = ("service/engine/worker.py", "service/schedulers/loop.py", "service/api/front.py", "service/inputs/tokens.py")
# Settings are read in config; processes hands the environment on to children without looking for anything in it.
ENVIRONMENT = ("service/config/", "service/processes.py")
SCHEMAS = "service/api/schemas.py"
BANNED_NAME_WORDS = {"manager", "handler", "helper", "helpers", "util", "utils", "misc", "base", "wrapper"}
BANNED_CONCEPTS = {"page", "pages", "slot", "slots", "chunk", "chunks", "req", "reqs"}
# Where such a word names something that is no KV block: the protocol's events, pieces of a file, pages of the operating system.
OTHER_CONCEPTS = {
    "service/api/": {"chunk", "chunks"},
    "service/checkpoints/": {"chunk", "chunks"},
    "service/engine/memory.py": {"page", "pages"},
    "service/engine/kv_pool.py": {"page"},
}
FORBIDDEN_TEXT = re.compile(r"\b(TODO|FIXME|XXX|HACK)\b|/home/|/root/|/Users/|/work/|/tmp/[a-z]", re.IGNORECASE)


def circles(tree: SourceTree) -> list[str]:
    """Groups of modules that import each other, counting imports under TYPE_CHECKING and inside functions."""
    modules = {file.module for file in tree.files}
    graph: dict[str, set[str]] = {}
    for file in tree.files:
        lazy = file.path != "service/kernels/dispatch.py"
        graph[file.module] = {name for name, _ in file.imports(inside_functions=lazy) if name in modules and name != file.module}
    return [" <-> ".join(sorted(group)) for group in _components(graph) if len(group) > 1]


def _components(graph: dict[str, set[str]]) -> list[set[str]]:
    def reach(start: str) -> set[str]:
        seen, stack = set(), [start]
        while stack:
            for after in graph[stack.pop()] - seen:
                seen.add(after)
                stack.append(after)
        return seen

    reached = {name: reach(name) for name in graph}
    groups: list[set[str]] = []
    for name in graph:
        if not any(name in group for group in groups):
            groups.append({name} | {other for other in reached[name] if name in reached[other]})
    return groups


def third_party(tree: SourceTree) -> list[str]:
    """Imports of libraries by files that may not, or of libraries that the table does not know."""
    found = set()
    for file in tree.files:
        for name, line in file.imports():
            library = name.partition(".")[0]
            if library in sys.stdlib_module_names or library in ("service", "__future__"):
                continue
            if not any(file.path.startswith(place) for place in MAY_IMPORT.get(library, ())):
                found.add(f"{file.path}:{line} imports {library}")
    return sorted(found)


def types_are_plain(tree: SourceTree) -> list[str]:
    """Imports in service/types of anything but the standard library and service.types."""
    return [
        f"{file.path}:{line} imports {name}"
        for file in tree.files
        if file.path.startswith("service/types/")
        for name, line in file.imports()
        if name.partition(".")[0] not in sys.stdlib_module_names and not name.startswith("service.types")
    ]


def sizes(tree: SourceTree) -> list[str]:
    """Files, functions, classes, parameter lists and branching over the house's measures."""
    found = []
    for file in tree.files:
        lines = file.text.count("\n")
        if lines > FILE_LINES:
            found.append(f"{file.path} has {lines} lines")
        found += [
            f"{file.path}:{node.lineno} class {node.name} has {lines_of(node)} lines"
            for node in _classes(file)
            if lines_of(node) > CLASS_LINES
        ]
        for node in file.functions():
            found += [f"{file.path}:{node.lineno} {node.name} {problem}" for problem in _function_problems(file, node)]
    return found


def _function_problems(file: SourceFile, node: FunctionNode) -> Iterator[str]:
    if lines_of(node) > FUNCTION_LINES:
        yield f"has {lines_of(node)} lines"
    if len(parameters_of(node)) > PARAMETERS and not file.path.startswith("service/kernels/"):
        yield f"has {len(parameters_of(node))} parameters"
    if (branches := complexity(node)) > COMPLEXITY:
        yield f"has a complexity of {branches}"


def complexity(function: FunctionNode) -> int:
    """McCabe's number: decisions plus one; nested functions count as one."""
    total, stack = 1, list(ast.iter_child_nodes(function))
    while stack:
        node = stack.pop()
        if isinstance(node, FunctionNode | ast.Lambda):
            total += isinstance(node, FunctionNode)
            continue
        if isinstance(node, ast.If | ast.For | ast.AsyncFor | ast.While | ast.ExceptHandler):
            total += 1
        elif isinstance(node, ast.Match):
            total += len(node.cases)
        stack.extend(ast.iter_child_nodes(node))
    return total


def documentation(tree: SourceTree) -> list[str]:
    """Files without a header of at least three lines, public names without a docstring."""
    found = []
    for file in tree.files:
        header = ast.get_docstring(file.tree) or ""
        least = 1 if file.path.endswith("__init__.py") else 3
        if len(header.splitlines()) < least:
            found.append(f"{file.path} needs a header of {least} lines")
        for node in [*_classes(file), *_public_functions(file)]:
            if not node.name.startswith("_") and not ast.get_docstring(node):
                found.append(f"{file.path}:{node.lineno} {node.name} has no docstring")
    return found


def names(tree: SourceTree) -> list[str]:
    """Defined names that say nothing (Manager, Helper …) or give a concept a second word (page for block …)."""
    found = []
    for file in tree.files:
        other = set().union(*(words for place, words in OTHER_CONCEPTS.items() if file.path.startswith(place)))
        for name, line in _defined(file):
            words = set(re.findall(r"[A-Z]?[a-z0-9]+|[A-Z]+(?![a-z])", name))
            lowered = {word.lower() for word in words}
            if lowered & (BANNED_CONCEPTS - other) or (lowered & BANNED_NAME_WORDS and _is_definition(file, name)):
                found.append(f"{file.path}:{line} {name}")
    return sorted(set(found))


def no_global(tree: SourceTree) -> list[str]:
    """`global` statements."""
    return [f"{file.path}:{node.lineno}" for file in tree.files for node in file.nodes(ast.Global)]  # type: ignore[attr-defined]


def no_assert(tree: SourceTree) -> list[str]:
    """`assert` in the service: `python -O` would drop it."""
    return [f"{file.path}:{node.lineno}" for file in tree.files for node in file.nodes(ast.Assert)]  # type: ignore[attr-defined]


def broad_except(tree: SourceTree) -> list[str]:
    """`except Exception`, `except BaseException` and bare `except` outside the three places, unless it ends in `raise`."""
    found = []
    for file in tree.files:
        for node in file.nodes(ast.ExceptHandler):
            kinds = node.type.elts if isinstance(node.type, ast.Tuple) else [node.type]  # type: ignore[attr-defined]
            broad = any(kind is None or (isinstance(kind, ast.Name) and kind.id in ("Exception", "BaseException")) for kind in kinds)
            passed_on = isinstance(last := node.body[-1], ast.Raise) and last.exc is None  # type: ignore[attr-defined]
            if broad and not passed_on and file.path not in BROAD_EXCEPT:
                found.append(f"{file.path}:{node.lineno}")  # type: ignore[attr-defined]
    return found


def environment(tree: SourceTree) -> list[str]:
    """Reads of the environment outside config."""
    found = []
    for file in tree.files:
        if file.path.startswith(ENVIRONMENT):
            continue
        for node in file.nodes(ast.Attribute, ast.ImportFrom):
            is_read = isinstance(node, ast.Attribute) and node.attr in ("environ", "getenv", "environb")
            imported = isinstance(node, ast.ImportFrom) and node.module == "os" and any("env" in alias.name for alias in node.names)
            if is_read or imported:
                found.append(f"{file.path}:{node.lineno}")  # type: ignore[attr-defined]
    return found


def forbidden_text(tree: SourceTree) -> list[str]:
    """Unfinished work and paths of somebody's machine."""
    return [
        f"{file.path}:{number} {match[0]}"
        for file in tree.files
        for number, line in enumerate(file.text.splitlines(), 1)
        if (match := FORBIDDEN_TEXT.search(line))
    ]


def fields_obeyed(tree: SourceTree) -> list[str]:
    """Fields of settings, requests and HTTP bodies that no code beyond their definition reads."""
    read: set[str] = set()
    for file in tree.files:
        if not file.path.startswith(("service/types/", "service/config/", SCHEMAS)):
            read |= {node.attr for node in file.nodes(ast.Attribute) if isinstance(node.ctx, ast.Load)}  # type: ignore[attr-defined]
    found = []
    for path in ("service/types/settings.py", "service/types/request.py", "service/types/plan.py", SCHEMAS):
        file = tree.file(path)
        for owner in _classes(file) if file else ():
            if any(isinstance(base, ast.Name) and base.id == "NamedTuple" for base in owner.bases):
                continue  # unpacked by position
            found += [f"{owner.name}.{name}" for name in _fields(owner) if name not in read and name not in READ_AS_WHOLE]
    return found


# Read by `Stop.effective_ids`.
READ_AS_WHOLE = {"end_ids", "ignore_eos", "token_ids"}

CHECKS: tuple[Callable[[SourceTree], list[str]], ...] = (
    circles,
    third_party,
    types_are_plain,
    sizes,
    documentation,
    names,
    no_global,
    no_assert,
    broad_except,
    environment,
    forbidden_text,
    fields_obeyed,
)


def _classes(file: SourceFile) -> list[ast.ClassDef]:
    return [node for node in ast.walk(file.tree) if isinstance(node, ast.ClassDef)]


def _public_functions(file: SourceFile) -> Iterator[FunctionNode]:
    """Functions of the module and methods of public classes; not what is nested in functions."""
    for node in file.tree.body:
        if isinstance(node, FunctionNode):
            yield node
        elif isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            yield from (inner for inner in node.body if isinstance(inner, FunctionNode))


def _fields(owner: ast.ClassDef) -> list[str]:
    return [node.target.id for node in owner.body if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)]


def parameters_of(node: FunctionNode) -> list[ast.arg]:
    """The parameters of a function but for self and cls."""
    every = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
    return [argument for argument in every if argument.arg not in ("self", "cls")]


def lines_of(node: FunctionNode | ast.ClassDef) -> int:
    """Lines of a definition from its first to its last."""
    return (node.end_lineno or node.lineno) - node.lineno + 1


def _is_definition(file: SourceFile, name: str) -> bool:
    return any(node.name == name for node in (*_classes(file), *file.functions())) or name == file.module.rpartition(".")[2]


def _defined(file: SourceFile) -> Iterator[tuple[str, int]]:
    yield file.module.rpartition(".")[2], 1
    for node in ast.walk(file.tree):
        if isinstance(node, FunctionNode | ast.ClassDef):
            yield node.name, node.lineno
        elif isinstance(node, ast.arg):
            yield node.arg, node.lineno
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store) and node.id != "__slots__":
            yield node.id, node.lineno
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.attr, node.lineno
