"""`python -m service.cli.docs`: write docs/cli.md from the commands' own definitions; with `--check` only say whether it is current.

It knows no flag by name. Invariant: the page is a function of the definitions; nothing in it is written by hand.
"""

from __future__ import annotations

import sys
from pathlib import Path

import service
from service.cli.benchmark import benchmark_parser
from service.cli.convert import convert_parser
from service.cli.train import build_parser
from service.cli.versions import versions_parser
from service.config.describe import settings_tables
from service.config.flags import FlagParser
from service.config.load import DESCRIPTION, PROGRAM

DOCUMENT = Path(service.__file__).parents[1] / "docs" / "cli.md"

_HEAD = f"""# Commands

Made by `python -m service.cli.docs`; edit the definitions, not this page.
In flags `_` and `-` are the same. `--help` prints a command's flags, `--about` its version. A wrong flag, value or file ends with one
sentence and exit code 2.

## {PROGRAM}

{DESCRIPTION}

Flags go before the environment, the environment before the file of `--config` (or `DEEPSEEK_CONFIG`), the file before the defaults.
Lists are separated by commas in the environment. Sizes may be written like `512MiB` or `2GB`. A switch takes `true` or `false`; `--name`
alone is true and `--no_name` is false.
"""


def render() -> str:
    """The page."""
    parts = [
        _HEAD,
        settings_tables(),
        _command(benchmark_parser()),
        _command(build_parser()),
        _command(convert_parser()),
        _command(versions_parser()),
    ]
    return "\n\n".join(part.strip("\n") for part in parts) + "\n"


def main() -> int:
    """Write or check the page; returns the exit code."""
    text = render()
    if "--check" in sys.argv[1:]:
        current = DOCUMENT.is_file() and DOCUMENT.read_text("utf-8") == text
        print(f"{DOCUMENT.name} is {'current' if current else 'out of date: run python -m service.cli.docs'}")
        return 0 if current else 1
    DOCUMENT.write_text(text, "utf-8")
    return 0


def _command(parser: FlagParser) -> str:
    return f"## {parser.prog}\n\n{parser.description}\n\n{parser.table()}"


if __name__ == "__main__":
    sys.exit(main())
