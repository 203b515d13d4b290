"""The threads of several programs of one kernel, side by side: their registers, as arrays with one element a thread.

Registers are kept as unsigned integers of their width, predicates as bool; an instruction reads them as the type that it names. Invariant:
arrays are never changed in place, so registers may share one; threads outside the mask keep what they had.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from tests.kernels.gpu.ptx.memory import UNSIGNED, Memory, Refused
from tests.kernels.gpu.ptx.program import Program

Lanes = NDArray[Any]
# Threads that take part, or None for all of them.
Mask = NDArray[np.bool_] | None
WARP = 32
KINDS = {
    **{f"u{8 * size}": kind for size, kind in UNSIGNED.items()},
    **{f"b{8 * size}": kind for size, kind in UNSIGNED.items()},
    **{"s8": np.int8, "s16": np.int16, "s32": np.int32, "s64": np.int64, "f16": np.float16, "f32": np.float32, "f64": np.float64},
}


class Threads:
    """Those of the programs at places [n, 3] of a grid, each with `shared_bytes` of memory of its own."""

    def __init__(self, program: Program, programs: NDArray[np.int64], grid: tuple[int, int, int], shared_bytes: int) -> None:
        threads = program.threads
        self.count = len(programs) * threads
        self.widths = program.registers
        self.values: dict[str, Lanes] = {}
        self.special = {"%tid.x": np.tile(np.arange(threads, dtype=np.uint32), len(programs))}
        for axis, name in enumerate("xyz"):
            self.special[f"%ctaid.{name}"] = np.repeat(programs[:, axis], threads).astype(np.uint32)
            self.special[f"%nctaid.{name}"] = np.full(self.count, grid[axis], np.uint32)
        self.program = np.repeat(np.arange(len(programs)), threads)
        # Programs begin apart by a multiple of what swizzles look at, and more than they have, so that none reaches into the next.
        self.shared_bytes, self._apart = shared_bytes, -(-(shared_bytes + 1) // 1024) * 1024
        self.shared = Memory([(0, np.full(self._apart * len(programs), 0xFF, np.uint8))])

    def shared_addresses(self, addresses: NDArray[np.int64], size: int, programs: NDArray[np.int64]) -> NDArray[np.uint64]:
        """Where `size` bytes at addresses within programs lie in `shared`."""
        if len(addresses) and (addresses.min() < 0 or addresses.max() + size > self.shared_bytes):
            raise Refused(f"shared memory has {self.shared_bytes} bytes, not {int(addresses.max()) + size}")
        return (addresses + programs * self._apart).astype(np.uint64)

    def read(self, operand: str, kind: str) -> Lanes:
        """A register, special register or literal as elements of a type: an array, or a scalar for a literal."""
        if operand in self.widths:
            held = self.values.get(operand)
            if held is None:  # Undefined; what is read of it must not matter.
                kept = np.bool_ if self.widths[operand] == 1 else UNSIGNED[self.widths[operand] // 8]
                held = self.values[operand] = np.full(self.count, -1).astype(kept)
            return held if kind == "pred" else as_kind(held, kind)
        if operand in self.special:
            return as_kind(self.special[operand], kind)
        return literal(operand, kind)

    def read_all(self, operand: str, kind: str) -> Lanes:
        """The same with one element for each thread, of a literal too."""
        return np.broadcast_to(self.read(operand, kind), self.count)

    def write(self, register: str, value: Lanes, mask: Mask) -> None:
        """Give a register a value of any type, extended by its sign; only in the threads of a mask."""
        if register == "_":
            return
        width = self.widths[register]
        if width > 1:
            value = to_bits(value, width)
        if value.ndim == 0:
            value = np.full(self.count, value)
        if mask is not None:
            before = self.values.get(register)
            value = np.where(mask, value, np.full(self.count, -1).astype(value.dtype) if before is None else before)
        self.values[register] = value

    def addresses(self, operand: str) -> NDArray[np.int64]:
        """The addresses `[register + offset]` of all threads."""
        base, _, literal_offset = operand.strip("[] ").partition("+")
        base, offset = base.strip(), int(literal_offset or "0", 0)
        if base == "global_smem":
            return np.full(self.count, offset, np.int64)
        if self.widths[base] == 64:
            return self.read(base, "s64") + offset
        return self.read(base, "u32").astype(np.int64) + offset & 0xFFFFFFFF


def as_kind(held: Lanes, kind: str) -> Lanes:
    """Bits of a register as elements of a type; of a wider register the low bits."""
    wanted = KINDS[kind]
    size = np.dtype(wanted).itemsize
    if held.dtype == bool:
        raise Refused(f"a predicate was read as {kind}")
    if held.itemsize > size:
        held = held.astype(UNSIGNED[size])
    elif held.itemsize < size:
        raise Refused(f"a register of {8 * held.itemsize} bits was read as {kind}")
    return held.view(wanted)


def to_bits(value: Lanes, width: int) -> Lanes:
    """The bits of elements in a register of `width` bits: integers extended by their sign or cut, others of the same size."""
    size, value = width // 8, np.asarray(value)
    if value.dtype == bool:
        raise Refused("a predicate was written to a register of bits")
    if value.dtype.kind == "f":
        if value.itemsize != size:
            raise Refused(f"{value.dtype} was written to {width} bits")
        return value.view(UNSIGNED[size])
    return value.astype(UNSIGNED[size])


def literal(operand: str, kind: str) -> Lanes:
    """A number as written: decimal, hexadecimal, or the bits of a float after 0f or 0d."""
    if kind == "pred":
        return np.asarray(int(operand, 0) != 0)
    wanted = np.dtype(KINDS[kind])
    if operand == "global_smem":
        return np.asarray(0, wanted)
    if operand[:2] in ("0f", "0F", "0d", "0D"):
        bits = np.asarray(int(operand[2:], 16), np.uint32 if operand[1] in "fF" else np.uint64)
        return as_kind(bits, kind)
    number = int(operand.rstrip("U"), 0)
    return np.asarray(number & ((1 << 8 * wanted.itemsize) - 1), UNSIGNED[wanted.itemsize]).view(wanted)
