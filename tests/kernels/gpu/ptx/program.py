"""The text of one compiled kernel (PTX) as basic blocks of instructions.

It knows the grammar that Triton's NVIDIA backend writes, not what instructions do. Invariant: blocks stand in the order of the text, and a
block ends behind a branch, a return, or a barrier that all threads of a program wait at.
"""

from __future__ import annotations

import re
from typing import NamedTuple

WIDTHS = {"pred": 1, "b8": 8, "s8": 8, "b16": 16, "f16": 16, "b32": 32, "f32": 32, "b64": 64, "f64": 64}
ENDS = ("bra", "ret", "exit", "bar", "barrier")


class Instruction(NamedTuple):
    """One instruction: predicate register or "", whether it is negated, parts of the name, operands as written, and its text."""

    predicate: str
    negated: bool
    name: tuple[str, ...]
    operands: tuple[str, ...]
    text: str


class Block(NamedTuple):
    """Instructions with one entry and one exit."""

    label: str
    instructions: tuple[Instruction, ...]


class Program(NamedTuple):
    """One kernel: its name, threads of a program, sizes in bytes of its parameters and where these begin, registers with their widths, and
    blocks."""

    name: str
    threads: int
    sizes: tuple[int, ...]
    offsets: tuple[int, ...]
    registers: dict[str, int]
    blocks: tuple[Block, ...]


def parse(text: str) -> Program:
    """The one kernel of a PTX module. Raises ValueError for what is not understood."""
    entry = re.search(r"\.visible \.entry (\w+)\((.*?)\)\s*(.*?)\n\{\n(.*?)\n\$L__func_end", text, re.DOTALL)
    threads = re.search(r"\.reqntid (\d+)", text)
    if entry is None or threads is None:
        raise ValueError("no kernel was found in this PTX")
    sizes = tuple(int(bits) // 8 for bits in re.findall(r"\.param \.[a-z](\d+)", entry[2]))
    offsets = [0]
    for size, following in zip(sizes, (*sizes[1:], 1), strict=True):  # each at a multiple of its size
        offsets.append(-(-(offsets[-1] + size) // following) * following)
    registers: dict[str, int] = {}
    blocks, label, found = [], "", []
    for statement in statements(entry[4]):
        if statement.endswith(":"):
            blocks.append(Block(label, tuple(found)))
            label, found = statement[:-1], []
        elif statement.startswith(".reg"):
            declare(statement, registers)
        elif not statement.startswith("."):
            found.append(instruction(statement))
            if found[-1].name[0] in ENDS:
                blocks.append(Block(label, tuple(found)))
                label, found = "", []
    blocks.append(Block(label, tuple(found)))
    return Program(entry[1], int(threads[1]), sizes, tuple(offsets), registers, tuple(blocks))


def statements(body: str) -> list[str]:
    """Labels, declarations and instructions, without comments, scopes and line numbers."""
    found, rest = [], ""
    for line in body.split("\n"):
        bare = line.split("//")[0].strip()
        if bare in ("", "{", "}") or bare.startswith((".loc", ".file")):
            continue
        if bare.endswith(":") and not rest:
            found.append(bare)
            continue
        *whole, rest = f"{rest} {bare}".split(";")
        found += [statement for statement in map(str.strip, whole) if statement]
        rest = rest.strip()
    if rest:
        raise ValueError(f"an instruction without an end: {rest[:200]}")
    return found


def declare(statement: str, registers: dict[str, int]) -> None:
    """Add the registers of a `.reg` statement; one of a scope may come again with the same width."""
    kind, names = re.fullmatch(r"\.reg \.(\w+)\s+(.*)", statement).groups()  # type: ignore[union-attr]
    for name in names.split(","):
        stem, count = re.fullmatch(r"\s*([%\w]+?)(?:<(\d+)>)?\s*", name).groups()  # type: ignore[union-attr]
        for one in [stem] if count is None else [f"{stem}{number}" for number in range(int(count))]:
            if registers.setdefault(one, WIDTHS[kind]) != WIDTHS[kind]:
                raise ValueError(f"register {one} has two widths")


def instruction(statement: str) -> Instruction:
    """One instruction from its text."""
    match = re.fullmatch(r"(?:@(!?)([%\w]+)\s+)?([\w.:]+)\s*(.*)", statement)
    if match is None:
        raise ValueError(f"not understood: {statement}")
    return Instruction(match[2] or "", match[1] == "!", tuple(match[3].split(".")), split_operands(match[4]), statement)


def split_operands(text: str) -> tuple[str, ...]:
    """Operands at commas outside braces and brackets, without blanks."""
    return tuple(part for part in re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^,\s]+", text.replace("\t", " ")) if part)
