"""Run a compiled kernel: all programs of a grid, thread by thread, on memory of this process.

Threads that stand at the same block go through it together. Of several blocks the first in the text comes next, so threads that parted meet
again; at a barrier they wait for all others of their program. What is copied or multiplied asynchronously is done at once. Invariant: the
result is that of a device on which no warp and no copy is late, so a race between them is not seen; what it would not define is refused.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tests.kernels.gpu.ptx.arithmetic import VALUES, kinds, refuse
from tests.kernels.gpu.ptx.lanes import WARP, Lanes, Mask, Threads
from tests.kernels.gpu.ptx.memory import Memory, Refused
from tests.kernels.gpu.ptx.program import Instruction, Program
from tests.kernels.gpu.ptx.warps import TOGETHER, registers

# Threads that are computed side by side.
SIDE_BY_SIDE = 4096
# Copies and products are done at once and warps go together, so these have nothing to do.
NOTHING = (
    *(("cp", "async", how) for how in ("commit_group", "wait_group", "wait_all")),
    *(("wgmma", how) for how in ("fence", "commit_group", "wait_group")),
    *(("fence",), ("membar",), ("bar", "warp")),
)
ATOMIC: dict[str, Any] = {"add": np.add, "or": np.bitwise_or, "and": np.bitwise_and, "min": np.minimum, "max": np.maximum}
# Modifiers that would change a value.
UNKNOWN = {"sat", "relu", "cc"}
# More than any kernel takes: one that never ends is a fault.
MOST_BLOCKS = 1 << 22
ALL = slice(None)
# Instructions of warps that were executed since the process began, by kernel; those whose predicate is false count, since they are issued.
EXECUTED: Counter[str] = Counter()


def launch(program: Program, shared_bytes: int, grid: tuple[int, int, int], parameters: bytes, memory: Memory) -> None:
    """Run all programs of a grid. Raises Refused, with the instruction, for what a device would not do."""
    x, y, z = grid
    places = np.stack([np.arange(x * y * z) % x, np.arange(x * y * z) // x % y, np.arange(x * y * z) // (x * y)], 1)
    together = max(1, SIDE_BY_SIDE // program.threads)
    for start in range(0, len(places), together):
        threads = Threads(program, places[start : start + together], grid, shared_bytes)
        Run(program, threads, parameters, memory).to_the_end()


class Run:
    """Some programs of a grid on their way."""

    def __init__(self, program: Program, threads: Threads, parameters: bytes, memory: Memory) -> None:
        self._program, self._threads, self._parameters, self._memory = program, threads, parameters, memory
        self._entries = {block.label: number for number, block in enumerate(program.blocks) if block.label}
        self._next = np.zeros(threads.count, np.int64)
        self._waiting = np.zeros(threads.count, bool)
        self._others: dict[str, Callable[[Instruction, Mask], None]] = {
            "ld": self._load, "st": self._store, "red": self._change, "atom": self._change, "cp": self._copy,
            "bar": self._wait, "barrier": self._wait,
        }  # fmt: skip

    def to_the_end(self) -> None:
        """Go on until every thread has returned."""
        end = len(self._program.blocks)
        for _ in range(MOST_BLOCKS):
            left = self._next < end
            ready = left & ~self._waiting
            if ready.any():
                block = int(self._next[ready].min())
                self._block(block, ready & (self._next == block))
            elif left.any():
                self._release(left)
            else:
                return
        raise Refused(f"{self._program.name} does not end")

    def _release(self, left: NDArray[np.bool_]) -> None:
        """All wait: those of one program at the same barrier, and none has returned."""
        each = self._next.reshape(-1, self._program.threads)
        if (left.reshape(each.shape).any(1) & (each != each[:, :1]).any(1)).any():
            raise Refused(f"{self._program.name}: threads of a program wait at different barriers, or some have returned")
        self._waiting[:] = False

    def _block(self, number: int, there: NDArray[np.bool_]) -> None:
        block, warps = self._program.blocks[number], there.reshape(-1, WARP).any(1).sum()
        EXECUTED[self._program.name] += int(warps) * len(block.instructions)
        following = np.full(self._threads.count, number + 1)
        mask = None if there.all() else there
        for instruction in block.instructions:
            try:
                with np.errstate(all="ignore"):
                    following = self._step(instruction, mask, following)
            except (Refused, KeyError, ValueError, IndexError, TypeError) as error:
                raise Refused(f"{self._program.name}: {instruction.text}: {error}") from error
        self._next = np.where(there, following, self._next)

    def _step(self, instruction: Instruction, mask: Mask, following: NDArray[np.int64]) -> NDArray[np.int64]:
        threads, base = self._threads, instruction.name[0]
        if instruction.predicate:
            taken = threads.read(instruction.predicate, "pred") != instruction.negated
            taken = taken if mask is None else mask & taken
            if not taken.any():
                return following
            mask = None if taken.all() else taken
        if base in ("bra", "ret", "exit"):
            to = self._entries[instruction.operands[0]] if base == "bra" else len(self._program.blocks)
            return np.where(True if mask is None else mask, to, following)
        if any(instruction.name[: len(name)] == name for name in NOTHING):
            return following
        if base in TOGETHER:
            TOGETHER[base](threads, instruction, mask)
        elif base in self._others:
            self._others[base](instruction, mask)
        else:
            self._compute(instruction, mask)
        return following

    def _compute(self, instruction: Instruction, mask: Mask) -> None:
        if not UNKNOWN.isdisjoint(instruction.name):
            raise Refused("a modifier that is not known here")
        value = VALUES.get(instruction.name[0], refuse)(self._threads, instruction)
        targets = registers(instruction.operands[0])
        if len(targets) == 1:
            self._threads.write(targets[0], value, mask)
            return
        # A move of one register to several smaller ones.
        pieces = np.ascontiguousarray(value).view(f"u{value.itemsize // len(targets)}").reshape(-1, len(targets))
        for target, piece in zip(targets, pieces.T, strict=True):
            self._threads.write(target, np.ascontiguousarray(piece), mask)

    def _wait(self, instruction: Instruction, mask: Mask) -> None:
        if instruction.operands != ("0",):
            raise Refused("barriers have no names here")
        self._waiting |= True if mask is None else mask

    def _load(self, instruction: Instruction, mask: Mask) -> None:
        target, source = instruction.operands
        kind, targets = kinds(instruction)[-1], registers(target)
        size = int(kind[1:]) // 8
        if "param" in instruction.name:
            at = self._program.offsets[int(source.strip("[]").rpartition("_")[2])]
            found: list[Lanes] = [np.full(self._threads.count, np.frombuffer(self._parameters, f"u{size}", 1, at))]
        else:
            there = ALL if mask is None else mask
            memory, addresses = self._place(instruction, self._threads.addresses(source)[there], size * len(targets), there)
            found = [self._spread(part, there) for part in memory.load(addresses, size, len(targets))]
        for register, value in zip(targets, found, strict=True):
            self._threads.write(register, value.view(f"i{size}") if kind[0] == "s" else value, mask)

    def _spread(self, values: Lanes, there: slice | NDArray[np.bool_]) -> Lanes:
        """Values of some threads as values of all."""
        spread = np.zeros(self._threads.count, values.dtype)
        spread[there] = values
        return spread

    def _store(self, instruction: Instruction, mask: Mask) -> None:
        target, source = instruction.operands
        size, sources = int(kinds(instruction)[-1][1:]) // 8, registers(source)
        there = ALL if mask is None else mask
        memory, addresses = self._place(instruction, self._threads.addresses(target)[there], size * len(sources), there)
        memory.store(addresses, size, [self._threads.read_all(register, f"b{8 * size}")[there] for register in sources])

    def _change(self, instruction: Instruction, mask: Mask) -> None:
        """`red` and `atom`: read, compute, write, one thread after the other."""
        kind, how = kinds(instruction)[-1], instruction.name[-2]
        *before, target, source = instruction.operands
        size = int(kind[1:]) // 8
        addresses, values = self._threads.addresses(target), self._threads.read_all(source, kind)
        found = np.zeros_like(values)
        for thread in np.arange(self._threads.count)[ALL if mask is None else mask]:
            one = slice(thread, thread + 1)
            memory, place = self._place(instruction, addresses[one], size, one)
            found[one] = memory.load(place, size, 1)[0].view(values.dtype)
            memory.store(place, size, [ATOMIC[how](found[one], values[one]).view(f"u{size}")])
        for register in before:
            self._threads.write(register, found, mask)

    def _place(
        self, instruction: Instruction, addresses: NDArray[np.int64], size: int, there: slice | NDArray[np.bool_]
    ) -> tuple[Memory, NDArray[np.uint64]]:
        """The memory that an instruction names and where addresses of some threads lie in it."""
        if "global" in instruction.name:
            return self._memory, addresses.astype(np.uint64)
        if not any(part.startswith("shared") for part in instruction.name):
            raise Refused("an address in no space that is known here")
        return self._threads.shared, self._threads.shared_addresses(addresses, size, self._threads.program[there])

    def _copy(self, instruction: Instruction, mask: Mask) -> None:
        """`cp.async`: bytes from a tensor to shared memory, or zeros where none are to be read."""
        threads, (target, source, size) = self._threads, instruction.operands[:3]
        there, total = (ALL if mask is None else mask), int(size, 0)
        given = threads.read_all(instruction.operands[3], "u32")[there] if len(instruction.operands) > 3 else None
        places = threads.shared_addresses(threads.addresses(target)[there], total, threads.program[there])
        reads = np.ones(len(places), bool) if given is None else given > 0
        if given is not None and not np.isin(given, (0, total)).all():
            raise Refused("part of a copy")
        words = [np.zeros(len(places), np.uint32) for _ in range(total // 4)]
        for word, found in zip(
            words, self._memory.load(threads.addresses(source)[there][reads].astype(np.uint64), 4, len(words)), strict=True
        ):
            word[reads] = found
        threads.shared.store(places, 4, list(words))
