"""The part of `deepseek-benchmark` that starts engines on this machine: tiers, quality of quantised weights, versions, backends.

It does not know how they are measured. Invariant: a row carries where and with what it was made, like those of servers.
"""

from __future__ import annotations

import importlib
import sys
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from service.cli.backends import KINDS, keep_table, kept_table, measure_backends, newest_computed
from service.cli.benchmark_results import tell_row
from service.cli.quality import FORMS, measure_quality
from service.cli.server_load import surroundings
from service.cli.tiers import MEASUREMENTS, measure_tier
from service.cli.version_comparison import Comparison, compare_versions
from service.cli.version_table import version_table
from service.config.bundled import bundled_source, listed_sources, named_directory, registry_path
from service.config.flags import FlagParser
from service.train.corpus import read_corpus
from service.types.errors import SettingsError

if TYPE_CHECKING:
    from rich.table import Table

# Modules of the standard library whose sources are scored when no text is named: every machine has them.
TEXT_MODULES = ("statistics", "textwrap", "heapq", "bisect")


def add_machine_flags(parser: FlagParser, count: Callable[[str], int], whole: Callable[[str], int]) -> None:
    """The flags of these measurements; `count` reads a number from 1 up, `whole` one from 0 up."""
    machine = parser.add_argument_group("This machine (starts engines itself; no flags of a server or its load but the lengths)")
    machine.add_argument(
        "--tier", choices=tuple(MEASUREMENTS), default=None, help="what the flags recommended for a tier gain over float32 without them"
    )
    machine.add_argument(
        "--quality",
        metavar="KINDS",
        default="",
        help=f"weights or caches in {', '.join(FORMS)}, some by comma, against float32; or far, against full attention",
    )
    machine.add_argument(
        "--versions",
        metavar="LIST",
        default="",
        help="versions by name, DIR or NAME=DIR, by comma: quality, speed, memory and cost of each",
    )
    machine.add_argument(
        "--backends",
        metavar="KINDS",
        default="",
        help="torch beside ONNX Runtime, with weights none, int8, int4 or some by comma, at 1, 8 and 32",
    )
    machine.add_argument("--keep_table", metavar="FILE", default="", help="table of --backend auto into which --backends enters its result")
    machine.add_argument(
        "--directory",
        metavar="DIR",
        default="",
        help="checkpoint of --tier, --quality and --backends, or a version by name such as v3.5; when left out the newest bundled one, of "
        "--backends the newest that the ONNX graph computes",
    )
    machine.add_argument("--threads", metavar="N", type=whole, default=0, help="CPU threads of each engine (default 0, all cores)")
    machine.add_argument(
        "--rounds",
        metavar="N",
        type=count,
        default=5,
        help="alternating rounds of --tier, --versions, --backends and --compare (default %(default)s)",
    )
    machine.add_argument(
        "--text", metavar="FILE", default="", help="text of --quality and --versions; sources of the standard library when left out"
    )
    machine.add_argument(
        "--text_tokens",
        metavar="N",
        type=count,
        default=16384,
        help="most of its tokens, for --versions of 4 characters (default %(default)s)",
    )


def check_machine(given: Namespace) -> None:
    """Refuse what cannot be measured, or not be kept. Raises SettingsError."""
    for flag, known, other in (("quality", FORMS, ", or far alone"), ("backends", KINDS, "")):
        asked = getattr(given, flag)
        wrong = [kind for kind in _listed(asked) if kind not in known]
        if wrong or (asked and not _listed(asked)):
            shown = wrong[0] if wrong else asked
            raise SettingsError(f"--{flag} must name {', '.join(known)}, or some of them by comma{other}, not {shown[:40]!r}.")
    if given.keep_table:
        kept_table(Path(given.keep_table))


def _listed(kinds: str) -> tuple[str, ...]:
    """Kinds by comma, each once."""
    return tuple(dict.fromkeys(filter(None, kinds.split(","))))


async def measure_machine(given: Namespace) -> dict[str, Any]:
    """The row that the flags ask for. Raises StartupError."""
    row = surroundings(given.label)
    if given.versions:
        sources = listed_sources(given.versions.split(","), registry_path(""), "--versions")
        asked = Comparison(given.prompt_tokens, given.output_tokens, given.rounds, given.threads)
        text = _text(given.text) if given.text else _held_out_text()
        return row | await compare_versions(sources, text, given.text_tokens, asked)
    directory = _directory(given)
    row["directory"] = directory.name
    if given.tier:
        lengths = given.prompt_tokens, given.output_tokens
        return row | await measure_tier(given.tier, directory, given.threads, given.rounds, lengths)
    if given.backends:
        lengths = given.prompt_tokens, given.output_tokens
        return row | await measure_backends(directory, _listed(given.backends), given.threads, given.rounds, lengths)
    return row | await measure_quality(directory, _listed(given.quality), _text(given.text), given.text_tokens, given.threads)


def _directory(given: Namespace) -> Path:
    if given.directory:
        return named_directory(given.directory, registry_path(""), "--directory")
    return newest_computed(_listed(given.backends)) if given.backends else Path(bundled_source("").directory)


def finish(given: Namespace, row: dict[str, Any]) -> int:
    """Print the table and the row, keep it where `--out` and `--keep_table` say; the exit code is 1 where a quality bound did not hold."""
    _print(row)
    tell_row(given.out, row)
    if given.keep_table:
        keep_table(Path(given.keep_table), row)
    return 0 if all(form["within_bound"] for form in row.get("forms", {}).values() if "within_bound" in form) else 1


def _text(path: str) -> str:
    if not path:
        files = (importlib.import_module(name).__file__ for name in TEXT_MODULES)
        return "".join(Path(file).read_text(encoding="utf-8") for file in files if file)
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"--text {path} cannot be read: {getattr(error, 'strerror', None) or 'it is not UTF-8 text'}.") from None


def _held_out_text() -> str:
    """The standard library's files that every recipe holds out: no bundled line was trained on them."""
    return "\n".join(read_corpus(chat_share=0.0).held_out)


def _print(row: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(width=None if sys.stdout.isatty() else 110)
    if row["kind"] == "versions":
        console.print(version_table(row))
        return
    table = Table(title=f"{row['directory']} · {row.get('tier') or row['kind']} · {row['cores']} cores", title_justify="left")
    if row["kind"] == "quality":
        for column in ("form", "perplexity", "over float32", "same likeliest token"):
            table.add_column(column, justify="left" if column == "form" else "right")
        table.add_row("float32", f"{row['float32_perplexity']:.4f}", "", "")
        for kind, form in row["forms"].items():
            table.add_row(kind, f"{form['perplexity']:.4f}", f"{form['ratio'] - 1:+.2%}", f"{form['agreement']:.1%}")
        console.print(table)
        return
    if row["kind"] == "backends":
        _fill_backends(table, row)
        console.print(table)
        return
    for column in ("", "median", "least", "most"):
        table.add_column(column, justify="right" if column else "left")
    named = {"float32, tokens/s": "baseline_tokens_per_s", f"{row['flags']}, tokens/s": "tokens_per_s", "ratio": "ratio"}
    for name, key in named.items():
        table.add_row(name, *(f"{row[key][part]:.2f}" for part in ("median", "min", "max")))
    for flags, ratio in row["between"].items():
        table.add_row(f"ratio to {flags}", *(f"{ratio[part]:.2f}" for part in ("median", "min", "max")))
    console.print(table)
    shares = row["share_of_limit"]
    console.print(f"claim {row['claim']}x; of the machine's limit: prefill {shares['prefill']:.0%}, decode {shares['decode']:.0%}.")


def _fill_backends(table: Table, row: dict[str, Any]) -> None:
    for column in ("weights", "sequences", "torch, tokens/s", "onnx, tokens/s", "ratio", "least", "most"):
        table.add_column(column, justify="left" if column == "weights" else "right")
    for kind, form in row["forms"].items():
        for batch, found in form["batches"].items():
            speeds = (f"{found[side]['median']:.1f}" for side in ("torch", "onnx"))
            table.add_row(kind, batch, *speeds, *(f"{found['ratio'][part]:.2f}" for part in ("median", "min", "max")))
