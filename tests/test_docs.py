"""The documentation says what the code does: links, paths, flags, names and numbers exist, tables equal what they list."""

from __future__ import annotations

import ast
import inspect
import json
import math
import re
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from service.api import schemas
from service.api.app import ROUTES
from service.api.fields import FOREIGN_PARTS, HARMLESS, MESSAGE_UNSUPPORTED, UNSUPPORTED
from service.checkpoints.hugging_face import FAMILIES
from service.cli.benchmark import benchmark_parser
from service.cli.convert import convert_parser
from service.cli.train import build_parser
from service.cli.versions import versions_parser
from service.config.definition import Definition, LimitSection
from service.config.describe import default_text
from service.config.load import serve_parser
from service.telemetry import METRICS, NAMESPACE, VLLM_NAMES, VLLM_NAMESPACE
from service.types.catalog import LINES
from service.types.errors import ServiceError
from service.types.model_spec import RopeScaling
from service.types.settings import HttpLimits
from tests.pages import PAGES, ROOT, blocks, code_spans, table_after

ROOMS = {path.name for path in (ROOT / "service").iterdir()}
# Of other programs, and what stands for any flag.
FOREIGN_FLAGS = {"--name", "--no_name", "--help", "--about", "--constraint", "--cpus", "--gpus"}
# Commands of other programs: tests/deploy/test_deployment_page.py looks at their flags.
FOREIGN_COMMAND = re.compile(r"^(docker|kubectl|install|ln|systemctl|sbatch) .*$", re.MULTILINE)
PARSERS = {
    "deepseek-serve": serve_parser,
    "deepseek-benchmark": benchmark_parser,
    "deepseek-train": build_parser,
    "deepseek-convert": convert_parser,
    "deepseek-versions": versions_parser,
}


# What a page points at exists.


def anchors(text: str) -> set[str]:
    heads = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


def broken_links(page: str, text: str) -> list[str]:
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        path, _, anchor = target.partition("#")
        if "://" in path:
            continue
        file = (ROOT / page).parent / path if path else ROOT / page
        if not file.exists() or (anchor and anchor not in anchors(file.read_text("utf-8"))):
            broken.append(target)
    return broken


@pytest.mark.parametrize("page", PAGES)
def test_links_resolve(page: str) -> None:
    assert broken_links(page, PAGES[page]) == []


def test_a_broken_link_is_seen() -> None:
    assert broken_links("docs/x.md", "[a](nowhere.md) [b](http.md#no-such-part) [c](http.md#errors)") == [
        "nowhere.md",
        "http.md#no-such-part",
    ]


def missing_paths(text: str) -> list[str]:
    """Inline code that looks like a path of this repository, or of a room of it, and is none."""
    missing = []
    for span in code_spans(text):
        if re.fullmatch(r"[\w.-]+(/[\w.*-]+)+/?|\w+/", span) and span.split("/")[0] in ROOMS | {
            "service",
            "docs",
            "tests",
            "loadtests",
            "docker",
            "deploy",
        }:
            places = [ROOT / span, ROOT / "service" / span, ROOT / "service" / f"{span}.py"]
            if not any(place.exists() or list(place.parent.glob(place.name)) for place in places):
                missing.append(span)
    return missing


@pytest.mark.parametrize("page", PAGES)
def test_paths_exist(page: str) -> None:
    text = PAGES[page]
    assert missing_paths(text) == []


def test_a_missing_path_is_seen() -> None:
    assert missing_paths("`api/sse` `api/delivery` `service/nothing.py` `docs/http.md` `a/b`") == ["api/sse", "service/nothing.py"]


# Flags, settings, metrics.


def script_flags(pattern: str = "*") -> set[str]:
    sources = [path.read_text("utf-8") for path in (ROOT / "loadtests").glob(f"{pattern}.py")]
    return {flag for source in sources for flag in re.findall(r'add_argument\("(--\w+)"', source)}


def known_flags() -> set[str]:
    own = {flag for parser in PARSERS.values() for flag in parser().known_flags()}
    return own | script_flags() | FOREIGN_FLAGS


def without_foreign(text: str) -> str:
    """A page without other programs' commands and without the first column of its tables of their names."""
    head, *parts = FOREIGN_COMMAND.sub("", text).split("<!-- foreign -->\n")
    tables = (part.partition("\n\n") for part in parts)
    return head + "".join(re.sub(r"^\|[^|]*\|", "|", table, flags=re.MULTILINE) + rest for table, _, rest in tables)


@pytest.mark.parametrize("page", PAGES)
def test_flags_exist(page: str) -> None:
    used = set(re.findall(r"(?<![\w-])--[a-z][\w-]*", without_foreign(PAGES[page])))
    assert used - known_flags() - {"--check", "--nproc_per_node", "--no-python"} == set()


def test_commands_take_the_flags_that_examples_give_them() -> None:
    seen = 0
    for block in blocks():
        for line in FOREIGN_COMMAND.sub("", block.text.replace("\\\n", " ")).splitlines():
            for command in PARSERS.keys() & set(re.split(r"[\s/]", line)):
                wrong = set(re.findall(r"(?<![\w-])--[a-z]\w*", line)) - set(PARSERS[command]().known_flags())
                assert not wrong, (block.place, wrong)
                seen += 1
    assert seen >= 5


def targets() -> set[str]:
    return set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE))


def wrong_commands(text: str) -> list[str]:
    """Commands named in sentences, as inline code, that do not exist or do not take the flag that they are named with."""
    wrong = []
    for span in code_spans(text):
        word, _, rest = span.partition(" ")
        if word == "make":
            wrong += [span] if rest and rest.split()[0] not in targets() else []
        elif word.startswith("deepseek-") and re.fullmatch(r"[a-z-]+", word) and (rest or word in PARSERS):
            known = PARSERS[word]().known_flags() if word in PARSERS else []
            flags = {flag.replace("-", "_").replace("__", "--", 1) for flag in re.findall(r"(?<![\w-])--[a-z][\w-]*", rest)}
            wrong += [span] if word not in PARSERS or flags - set(known) else []
    return wrong


@pytest.mark.parametrize("page", PAGES)
def test_commands_in_sentences_exist(page: str) -> None:
    assert wrong_commands(PAGES[page]) == []


def test_a_wrong_command_in_a_sentence_is_seen() -> None:
    text = "`make serve` `make tea` `deepseek-serve --model DIR` `deepseek-serve --batch-size 4` `deepseek-serve --tea` `deepseek-tea --x`"
    assert wrong_commands(text) == ["make tea", "deepseek-serve --tea", "deepseek-tea --x"]
    assert wrong_commands("`deepseek-benchmark --drain_s 3`") == ["deepseek-benchmark --drain_s 3"]


def test_scripts_take_the_flags_that_pages_give_them() -> None:
    calls = [call for text in PAGES.values() for call in re.findall(r"python -m loadtests\.(\w+)([^\n`]*)", text)]
    assert len(calls) >= 5
    for script, arguments in calls:
        assert (ROOT / "loadtests" / f"{script}.py").is_file(), script
        assert set(re.findall(r"--\w+", arguments)) <= script_flags(script), script


@pytest.mark.parametrize("page", PAGES)
def test_environment_variables_exist(page: str) -> None:
    known = {f"DEEPSEEK_{name.upper()}" for name in (*Definition.model_fields, "config", "name")}
    # What Kubernetes sets, and the bare prefix.
    used = set(re.findall(r"\bDEEPSEEK_\w*", PAGES[page])) - {"DEEPSEEK_", "DEEPSEEK_SERVICE_HOST"}
    assert used - known == set()


@pytest.mark.parametrize("page", PAGES)
def test_metric_names_exist(page: str) -> None:
    known = {NAMESPACE + metric.name for metric in METRICS}
    known |= {f"{NAMESPACE}{m.name}_{part}" for m in METRICS if m.kind == "histogram" for part in ("bucket", "sum", "count")}
    assert set(re.findall(r"\bdeepseek_\w+", PAGES[page])) - known == set()


def test_the_metrics_table_is_the_table() -> None:
    listed = [(code_spans(row[0])[0], row[1], tuple(code_spans(row[2])), row[3]) for row in table_after("docs/http.md", "metrics")]
    assert listed == [(NAMESPACE + m.name, m.kind, m.labels, m.help) for m in METRICS]


def test_the_map_of_vllms_metrics_is_the_map() -> None:
    listed = {
        code_spans(ours)[0].removeprefix(NAMESPACE): code_spans(theirs)[0]
        for theirs, ours in table_after("docs/migration.md", "vllm metrics")
    }
    assert listed == {ours: VLLM_NAMESPACE + theirs for ours, theirs in VLLM_NAMES.items()}


def test_only_the_first_column_of_a_foreign_table_is_left_out() -> None:
    assert without_foreign("a\n<!-- foreign -->\n| `--x` | `--y` |\n\n--z | --w |") == "a\n| `--y` |--z | --w |"


# http.md.


def errors(base: type[ServiceError] = ServiceError) -> Iterator[type[ServiceError]]:
    for kind in base.__subclasses__():
        yield kind
        yield from errors(kind)


def test_every_error_is_listed() -> None:
    listed = {(int(row[0]), code_spans(row[1])[0], code_spans(row[2])[0]) for row in table_after("docs/http.md", "errors")}
    assert listed == {(kind.status, kind.code, kind.kind) for kind in errors() if kind.__module__ == "service.types.errors"}


def test_every_limit_is_listed_with_its_default() -> None:
    listed = {code_spans(row[0])[0].removeprefix("--"): row[1] for row in table_after("docs/http.md", "limits")}
    assert set(listed) == {field.name for field in fields(HttpLimits)}
    for name, shown in listed.items():
        default = default_text(LimitSection.model_fields[name])
        assert shown == (f"{float(default):g} s" if name.endswith("_s") else default), name


SCHEMAS = [kind for kind in vars(schemas).values() if inspect.isclass(kind) and issubclass(kind, schemas.StrictModel) and kind.model_fields]


def bounds(value: Any) -> Iterator[float]:
    """Every bound in a JSON schema, without following references."""
    keys = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "minLength", "maxLength", "minItems", "maxItems", "maxProperties")
    if isinstance(value, dict):
        yield from (value[key] for key in keys if key in value)
        for inner in value.values():
            yield from bounds(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from bounds(inner)


def as_written(bound: float) -> str:
    size = abs(bound)
    text = f"2^{round(math.log2(size))}" if size >= 1 << 31 else f"{size:g}"
    return "−" + text if bound < 0 else text


@pytest.mark.parametrize("schema", SCHEMAS, ids=lambda schema: schema.__name__)
def test_every_field_is_listed_with_its_bounds(schema: type[BaseModel]) -> None:
    parent = schema.__mro__[1].model_fields if schema.__mro__[1] is schemas.SamplingBody else {}
    own = [name for name in schema.model_fields if name not in parent]
    rows = {code_spans(row[0])[0]: row[1] for row in table_after("docs/http.md", f"schema: {schema.__name__}")}
    assert list(rows) == own
    properties = schema.model_json_schema()["properties"]
    for name in own:
        assert ("required" in rows[name]) == schema.model_fields[name].is_required(), name
        for bound in set(bounds(properties[name])) - ({0} if "token ids" in rows[name] else set()):
            assert re.search(rf"(?<![\w.−^]){re.escape(as_written(bound))}(?![\d^])", rows[name]), (name, bound)


def test_every_schema_is_seen() -> None:
    assert {"ChatBody", "CompletionBody", "TokenizeBody", "DetokenizeBody", "StreamOptions"} <= {schema.__name__ for schema in SCHEMAS}
    assert list(bounds(schemas.SamplingBody.model_json_schema()["properties"]["temperature"])) == [0, 2]


def test_every_field_that_is_not_served_is_named() -> None:
    part = PAGES["docs/http.md"].split("### Fields of the protocols that are not served")[1].split("\n## ")[0]
    accepted, refused = part.split("Refused by name")
    assert set(code_spans(accepted)) == HARMLESS
    assert {*UNSUPPORTED, *MESSAGE_UNSUPPORTED} <= set(code_spans(refused))
    assert FOREIGN_PARTS and "every content part that is neither text nor image" in refused


def test_every_route_is_listed() -> None:
    listed = set(re.findall(r"^\| `((?:GET|POST) [^`]+)` \|", PAGES["docs/http.md"], re.MULTILINE))
    assert listed == {f"{row.method} {row.path}" for row in ROUTES}


# checkpoints.md and operations.md.


def test_families_lines_and_ropes_are_listed() -> None:
    text = PAGES["docs/checkpoints.md"]
    assert all(f"| `{name}` | `{family.classes}ForCausalLM` |" in text for name, family in FAMILIES.items())
    assert all(f"| {line.label} |" in text for line in LINES)
    assert all(f"| `{kind.value}` |" in text for kind in RopeScaling)


def logged() -> dict[str, set[str]]:
    """Every event that the code logs, with its fields; `**name` counts the keys of the dictionaries assigned to that name."""
    events: dict[str, set[str]] = {}
    for path in (ROOT / "service").rglob("*.py"):
        tree = ast.parse(path.read_text("utf-8"))
        for node in ast.walk(tree):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "log_event"):
                continue
            found = events.setdefault(ast.literal_eval(node.args[0]), set())
            for keyword in node.keywords:
                found |= {keyword.arg} if keyword.arg else keys_assigned(tree, ast.unparse(keyword.value))
    return events


def keys_assigned(tree: ast.AST, name: str) -> set[str]:
    values = [node.value for node in ast.walk(tree) if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == name]
    dictionaries = [inner for value in values for inner in ast.walk(value) if isinstance(inner, ast.Dict)]
    return {key.value for each in dictionaries for key in each.keys if isinstance(key, ast.Constant)}


def test_every_log_event_is_listed_with_its_fields() -> None:
    listed = {code_spans(row[0])[0]: set(code_spans(row[1])) for row in table_after("docs/operations.md", "events")}
    assert listed == logged()
    assert "prompt_tokens" in listed["request"]


# Numbers.


def numbers_in(value: Any) -> Iterator[float]:
    if isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from numbers_in(inner)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield float(value)


def unfounded(cell: str, row_file: Path) -> list[str]:
    """Numbers of a cell that no number of a row file rounds to."""
    known = [number for line in row_file.read_text("utf-8").splitlines() for number in numbers_in(json.loads(line))]
    wrong = []
    for text in re.findall(r"(?<![\w.])\d[\d,]*(?:\.\d+)?", cell):
        places = len(text.partition(".")[2])
        if not any(round(number, places) == float(text.replace(",", "")) for number in known):
            wrong.append(text)
    return wrong


def test_every_measured_number_comes_from_its_row() -> None:
    for what, result, link in table_after("README.md", "measured:begin"):
        file = ROOT / re.findall(r"\]\(([^)]+)\)", link)[0]
        assert file.suffix == ".jsonl" and unfounded(result, file) == [], what


def test_the_numbers_of_tuning_come_from_their_rows() -> None:
    listed = table_after("docs/tuning.md", "measured")
    assert len(listed) >= 8
    for what, result, link in listed:
        file = ROOT / "docs" / re.findall(r"\]\(([^)]+)\)", link)[0]
        assert file.suffix == ".jsonl" and unfounded(result, file) == [], what


def test_every_flag_is_weighed() -> None:
    weighed = set(re.findall(r"`--(\w+)", PAGES["docs/tuning.md"]))
    assert set(Definition.model_fields) - weighed == set()


def test_an_unfounded_number_is_seen(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"p99_ms": 1.6173, "steps": 2000, "passed": true}\n')
    assert unfounded("1.62 ms of 2,000", tmp_path / "rows.jsonl") == []
    assert unfounded("1.63 ms", tmp_path / "rows.jsonl") == ["1.63"]
