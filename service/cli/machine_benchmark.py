"""The part of `deepseek-benchmark` that starts engines on this machine: tiers, quality of quantised weights, versions, as table and row.

It does not know how they are measured. Invariant: a row carries where and with what it was made, like those of servers.
"""

from __future__ import annotations

import importlib
import json
import sys
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from service.cli.backends import KINDS, keep_table, measure_backends
from service.cli.quality import FORMS, measure_quality
from service.cli.server_load import surroundings
from service.cli.tiers import MEASUREMENTS, measure_tier
from service.cli.version_comparison import Comparison, compare_versions
from service.cli.version_table import version_table
from service.config.bundled import bundled_source, listed_sources, registry_path
from service.config.flags import FlagParser
from service.train.corpus import read_corpus
from service.types.errors import SettingsError

if TYPE_CHECKING:
    from rich.table import Table

# Modules of the standard library whose sources are scored when no text is named: every machine has them.
TEXT_MODULES = ("statistics", "textwrap", "heapq", "bisect")


def add_machine_flags(parser: FlagParser, count: Callable[[str], int], whole: Callable[[str], int]) -> None:
    """The flags of these measurements; `count` reads a number from 1 up, `whole` one from 0 up."""
    machine = parser.add_argument_group("This machine (starts engines itself; --url and the load's flags do not matter)")
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
        "--directory", metavar="DIR", default="", help="checkpoint of --tier, --quality and --backends; the bundled one when left out"
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
    """Refuse what cannot be measured. Raises SettingsError."""
    asked = [flag for flag in ("tier", "quality", "versions", "backends") if getattr(given, flag)]
    if len(asked) > 1:
        raise SettingsError(f"--{asked[0]} and --{asked[1]} are two measurements: give only one of them.")
    for kind in filter(None, given.quality.split(",")):
        if kind not in FORMS:
            raise SettingsError(f"--quality must name {', '.join(FORMS)}, or some of them by comma, not {kind[:40]!r}.")
    for kind in filter(None, given.backends.split(",")):
        if kind not in KINDS:
            raise SettingsError(f"--backends must name {', '.join(KINDS)}, or some of them by comma, not {kind[:40]!r}.")
    if given.keep_table and not given.backends:
        raise SettingsError("--keep_table belongs to --backends: give it too.")
    if given.directory and not (given.tier or given.quality or given.backends):
        raise SettingsError("--directory belongs to --tier, --quality and --backends: give one of these too.")
    if given.text and not (given.quality or given.versions):
        raise SettingsError("--text belongs to --quality and --versions: give one of these too.")


def measures_machine(given: Namespace) -> bool:
    """Whether the flags ask for one of these measurements."""
    return bool(given.tier or given.quality or given.versions or given.backends)


async def measure_machine(given: Namespace) -> dict[str, Any]:
    """The row that the flags ask for. Raises StartupError."""
    row = surroundings(given.label)
    if given.versions:
        sources = listed_sources(given.versions.split(","), registry_path(""), "--versions")
        asked = Comparison(given.prompt_tokens, given.output_tokens, given.rounds, given.threads)
        text = _text(given.text) if given.text else _held_out_text()
        return row | await compare_versions(sources, text, given.text_tokens, asked)
    directory = Path(given.directory or bundled_source("").directory)
    row["directory"] = directory.name
    if given.tier:
        lengths = given.prompt_tokens, given.output_tokens
        return row | await measure_tier(given.tier, directory, given.threads, given.rounds, lengths)
    if given.backends:
        forms = tuple(dict.fromkeys(filter(None, given.backends.split(","))))
        row |= await measure_backends(directory, forms, given.threads, given.rounds, (given.prompt_tokens, given.output_tokens))
        if given.keep_table:
            keep_table(Path(given.keep_table), row)
        return row
    kinds = tuple(dict.fromkeys(filter(None, given.quality.split(","))))
    return row | await measure_quality(directory, kinds, _text(given.text), given.text_tokens, given.threads)


def finish(given: Namespace, row: dict[str, Any]) -> int:
    """Print the table and the row, keep it where `--out` says; the exit code is 1 where a quality bound did not hold."""
    _print(row)
    line = json.dumps(row)
    if given.out:
        try:
            with Path(given.out).open("a", encoding="utf-8") as file:
                file.write(line + "\n")
        except OSError as error:
            raise SettingsError(f"--out {given.out} cannot be written: {error.strerror}.") from None
    print(line, flush=True)
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
