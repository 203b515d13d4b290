"""Reading argument lists: a parser on which `_` and `-` are the same, that never abbreviates and whose errors are one sentence.

It does not know which flags exist; `deepseek-serve`, `deepseek-benchmark` and `deepseek-train` build theirs on it.
Invariant: whatever is wrong with an argument list ends in a `SettingsError` that names the flag.
"""

from __future__ import annotations

import argparse
import difflib
import os
import re
import sys
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import NoReturn

from service.types.errors import SettingsError

_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?)(i?)(b?)\s*", re.IGNORECASE)
_POWERS = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4}


def parse_bytes(text: str) -> int:
    """`512MiB`, `2GB`, `1.5g` or `4096` as bytes; `i` counts in 1024, without it in 1000. Raises ValueError."""
    match = _SIZE.fullmatch(text)
    if match is None or (match[3] and not match[2]):
        raise ValueError(f"{text!r} is not a size")
    unit: int = (1024 if match[3] else 1000) ** _POWERS[match[2].lower()]
    return round(float(match[1]) * unit)


def canonical(argument: str) -> str:
    """An argument with the dashes inside its flag name turned into underscores; values are left alone."""
    if not argument.startswith("--") or argument == "--":
        return argument
    name, equals, value = argument[2:].partition("=")
    return "--" + name.replace("-", "_") + equals + value


def wants_text(arguments: Sequence[str]) -> bool:
    """Whether the argument list only asks for text (`--help`, `-h`, `--about`), so that nothing need be started."""
    return any(argument in ("-h", "--help", "--about") for argument in arguments)


def likely_backend(arguments: Sequence[str], environment: Mapping[str, str] | None = None) -> str:
    """The backend that flags or environment name, for a worker that is started before they are checked: onnx, or else torch."""
    environment = os.environ if environment is None else environment
    named = dict(canonical(argument).partition("=")[::2] for argument in arguments)
    for argument, following in pairwise((*arguments, "")):
        if canonical(argument) == "--backend":
            named["--backend"] = following
    for backend, short in (
        (named.get("--backend"), "--onnx_runtime" in named),
        (environment.get("DEEPSEEK_BACKEND"), "DEEPSEEK_ONNX_RUNTIME" in environment),
    ):
        if backend or short:
            return "torch" if backend in ("torch", "auto") else "onnx"
    return "torch"


class FlagParser(argparse.ArgumentParser):
    """argparse without abbreviations, positionals or exits on error. `--help` and `--about` print and exit with code 0."""

    def __init__(self, program: str, description: str, version: str) -> None:
        width = min(110, max(60, int(os.get_terminal_size().columns) if sys.stdout.isatty() else 100))
        super().__init__(
            prog=program,
            description=description,
            usage=f"{program} [flags]",
            allow_abbrev=False,
            add_help=False,
            formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=30, width=width),
        )
        about = self.add_argument_group("About")
        about.add_argument("-h", "--help", action="help", help="show this text and exit")
        about.add_argument("--about", action="version", version=f"{program} {version}", help="show the program's version and exit")

    def read(self, arguments: Sequence[str]) -> dict[str, object]:
        """The flags that were given, by name. Raises SettingsError."""
        return vars(self.parse_args([canonical(argument) for argument in arguments]))

    def known_flags(self) -> list[str]:
        """Every flag in its documented spelling."""
        return [option for action in self._actions for option in action.option_strings if option.startswith("--")]

    def table(self) -> str:
        """The flags as a Markdown table, in the order of their definition."""
        rows = ["| flag | value | default | meaning |", "|---|---|---|---|"]
        for action in self._actions:
            flags = [option for option in action.option_strings if option.startswith("--")]
            if flags and action.help is not argparse.SUPPRESS and flags[0] not in ("--help", "--about"):
                rows.append(_row(flags[0], action))
        return "\n".join(rows)

    def parse_args(self, args: Sequence[str] | None = None, namespace: object = None) -> argparse.Namespace:  # type: ignore[override]
        """Like argparse's, but an unknown flag is answered with the nearest known one."""
        parsed, rest = self.parse_known_args(args, None)
        if rest:
            self._refuse_unknown(rest[0])
        return parsed

    def error(self, message: str) -> NoReturn:
        """Turn argparse's complaint into a SettingsError."""
        raise SettingsError(message.removeprefix("argument ").rstrip(".") + f"; see {self.prog} --help.")

    def _refuse_unknown(self, argument: str) -> NoReturn:
        name = argument.partition("=")[0]
        if not name.startswith("-"):
            raise SettingsError(f"{_shown(name)} does not belong to any flag; see {self.prog} --help.")
        near = difflib.get_close_matches(name, self.known_flags(), n=1)
        advice = f"did you mean {near[0]}?" if near else f"see {self.prog} --help."
        raise SettingsError(f"{_shown(name)} is not a flag of {self.prog}; {advice}")


def _row(flag: str, action: argparse.Action) -> str:
    value = "\\|".join(map(str, action.choices)) if action.choices else str(action.metavar or "")
    default = "" if action.default in (None, "", False) or action.nargs == 0 else str(action.default)
    meaning = re.sub(r" \(default (%\(default\)s|[^)]*)\)", "", action.help or "").replace("%%", "%").replace("|", "\\|")
    return f"| `{flag}` | {value} | {default} | {meaning} |"


def _shown(text: str) -> str:
    return text if len(text) <= 80 else text[:77] + "..."
