"""The pages of the documentation as their tests read them: texts by path, fenced blocks, tables, inline code."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

import service

ROOT = Path(service.__file__).parents[1]
PAGES = {path.relative_to(ROOT).as_posix(): path.read_text("utf-8") for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]}


class Block(NamedTuple):
    """A fenced block: the page and line where it starts, its language, whether it is marked to be run, and its text."""

    place: str
    language: str
    run: bool
    text: str


def blocks() -> list[Block]:
    found = []
    for page, text in PAGES.items():
        for match in re.finditer(r"^```(\w*)( run)?\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
            line = text.count("\n", 0, match.start()) + 1
            found.append(Block(f"{page}:{line}", match[1], bool(match[2]), match[3]))
    return found


def table_after(page: str, marker: str) -> list[list[str]]:
    """The cells of the table that follows a comment, without its head."""
    rows = PAGES[page].split(f"<!-- {marker} -->\n", 1)[1].split("\n\n", 1)[0].splitlines()
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", row)[1:-1]] for row in rows[2:] if row.startswith("|")]


def code_spans(text: str) -> list[str]:
    return re.findall(r"`([^`\n]+)`", text)
