"""What the 32 threads of a warp, or the 128 of four, do together: exchange registers, move tiles, multiply them.

Fragments lie over the threads as the PTX manual draws them. A matrix product is summed in float64 and rounded to float32 once for each
instruction and 16 elements of K: how a device rounds inside one, and whether `mma` and `wgmma` do so alike, is not modelled.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tests.kernels.gpu.ptx.arithmetic import widen_bf16
from tests.kernels.gpu.ptx.lanes import WARP, Lanes, Mask, Threads
from tests.kernels.gpu.ptx.memory import Refused
from tests.kernels.gpu.ptx.program import Instruction


def registers(operand: str) -> list[str]:
    """The registers in braces."""
    return [part.strip() for part in operand.strip("{} ").split(",")]


def whole(threads: Threads, mask: Mask, size: int = WARP) -> NDArray[np.int64]:
    """The groups of `size` threads that take part. Raises Refused where one takes part with some of its threads only."""
    if mask is None:
        return np.arange(threads.count // size)
    groups = mask.reshape(-1, size)
    if (groups.any(1) != groups.all(1)).any():
        raise Refused("some threads of a warp are missing from what all of it must do")
    return np.flatnonzero(groups.any(1))


def shuffle(threads: Threads, instruction: Instruction, mask: Mask) -> None:
    """`shfl`: each thread takes the register of another of its warp, or its own where that lies beyond the clamp."""
    whole(threads, mask)
    target, source, by, clamp, _ = instruction.operands
    if "|" in target:
        raise Refused(f"a predicate besides the value: {instruction.text}")
    value = threads.read(source, "b32")
    lane = np.arange(threads.count) % WARP
    offset, limits = threads.read(by, "u32").astype(np.int64), threads.read(clamp, "u32").astype(np.int64)
    segment = limits >> 8 & 31
    low, high = lane & segment, (lane & segment) | (limits & 31 & ~segment)
    how = instruction.name[2]
    other = {"bfly": lane ^ offset, "up": lane - offset, "down": lane + offset, "idx": low | (offset & ~segment)}[how]
    inside = other >= high if how == "up" else other <= high
    other = np.where(inside, other, lane)
    if (other < 0).any() or (other >= WARP).any():
        raise Refused(f"a lane beyond the warp: {instruction.text}")
    threads.write(target, value[np.arange(threads.count) - lane + other], mask)


def reduce_warp(threads: Threads, instruction: Instruction, mask: Mask) -> None:
    """`redux`: one value of all threads of a warp."""
    whole(threads, mask)
    target, source, members = instruction.operands
    whole_warp = threads.read(members, "u32") == 0xFFFFFFFF
    if not (whole_warp if mask is None else whole_warp | ~mask).all():
        raise Refused(f"only part of a warp: {instruction.text}")
    kinds = {"add": np.add, "min": np.minimum, "max": np.maximum, "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}
    value = threads.read(source, instruction.name[3]).reshape(-1, WARP)
    function: Any = kinds[instruction.name[2]]
    threads.write(target, np.repeat(function.reduce(value, 1, dtype=value.dtype), WARP), mask)


def _tile_rows(threads: Threads, instruction: Instruction, operand: str, warps: NDArray[np.int64], count: int) -> NDArray[np.uint64]:
    """The addresses of the rows of `count` 8 × 8 tiles, [warps, count, 8]."""
    addresses = threads.addresses(operand).reshape(-1, WARP)[warps, : 8 * count]
    programs = threads.program.reshape(-1, WARP)[warps, : 8 * count]
    if (addresses % 16).any():
        raise Refused(f"not aligned: {instruction.text}")
    return threads.shared_addresses(addresses.ravel(), 16, programs.ravel()).reshape(len(warps), count, 8)


def load_tiles(threads: Threads, instruction: Instruction, mask: Mask) -> None:
    """`ldmatrix`: tiles of 8 rows of 8 elements of 16 bits, two a thread, as they are or transposed."""
    warps, targets = whole(threads, mask), registers(instruction.operands[0])
    rows = _tile_rows(threads, instruction, instruction.operands[1], warps, len(targets))
    tiles = np.stack(threads.shared.load(rows.ravel(), 2, 8), 1).reshape(*rows.shape, 8)  # type: ignore[arg-type]
    if "trans" in instruction.name:
        tiles = tiles.swapaxes(-1, -2)
    for number, target in enumerate(targets):
        pairs = np.ascontiguousarray(tiles[:, number]).view(np.uint32).reshape(len(warps), WARP)
        _write_warps(threads, target, pairs, warps, mask)


def store_tiles(threads: Threads, instruction: Instruction, mask: Mask) -> None:
    """`stmatrix`: the way back."""
    warps, sources = whole(threads, mask), registers(instruction.operands[1])
    rows = _tile_rows(threads, instruction, instruction.operands[0], warps, len(sources))
    held = [threads.read(source, "b32").reshape(-1, WARP)[warps] for source in sources]
    tiles = np.stack([np.ascontiguousarray(pairs).view(np.uint16).reshape(len(warps), 8, 8) for pairs in held], 1)
    if "trans" in instruction.name:
        tiles = tiles.swapaxes(-1, -2)
    flat = tiles.reshape(-1, 8)
    threads.shared.store(rows.ravel(), 2, [np.ascontiguousarray(flat[:, column]) for column in range(8)])


def _write_warps(threads: Threads, register: str, values: Lanes, warps: NDArray[np.int64], mask: Mask) -> None:
    """Give a register of some warps [warps, 32] its value."""
    if mask is None:
        threads.write(register, values.ravel(), None)
        return
    spread = np.zeros((threads.count // WARP, WARP), values.dtype)
    spread[warps] = values
    threads.write(register, spread.ravel(), mask)


def _elements(bits: Lanes, kind: str) -> Lanes:
    """Registers of 32 bits [..., n] as their elements [..., n, 2 or 4], widened for products."""
    bits = np.ascontiguousarray(bits)[..., None]
    if kind == "bf16":
        return widen_bf16(bits.view(np.uint16)).astype(np.float64)
    return bits.view({"f16": np.float16, "s8": np.int8}[kind]).astype(np.float64)


def _left(threads: Threads, operand: str, kind: str, warps: NDArray[np.int64]) -> Lanes:
    """16 rows of the left matrix of each warp, [warps, 16, K]: two registers hold the first half of K for a row and that 8 below."""
    held = np.stack([threads.read(register, "b32").reshape(-1, WARP)[warps] for register in registers(operand)], -1)
    parts = _elements(held.reshape(len(warps), 8, 4, 4), kind)  # [warps, row, quad, register, elements]
    ordered = parts.reshape(len(warps), 8, 4, 2, 2, -1).transpose(0, 4, 1, 3, 2, 5)  # register: [half of k, half of rows]
    return ordered.reshape(len(warps), 16, -1)


def multiply_tiles(threads: Threads, instruction: Instruction, mask: Mask) -> None:
    """`mma.sync`: 16 × K times K × 8 for each warp, added to 16 × 8."""
    warps, name = whole(threads, mask), instruction.name
    kind, out = name[-3], name[-4]
    left = _left(threads, instruction.operands[1], kind, warps)
    held = np.stack([threads.read(register, "b32").reshape(-1, WARP)[warps] for register in registers(instruction.operands[2])], -1)
    parts = _elements(held.reshape(len(warps), 8, 4, 2), kind)  # [warps, column, quad, half of k, elements]
    right = parts.transpose(0, 1, 3, 2, 4).reshape(len(warps), 8, -1)
    added = np.stack([threads.read(register, out).reshape(-1, WARP)[warps] for register in registers(instruction.operands[3])], -1)
    before = added.reshape(len(warps), 8, 4, 2, 2).transpose(0, 3, 1, 2, 4).reshape(len(warps), 16, 8)
    total = left @ right.swapaxes(1, 2) + before
    _write_product(threads, registers(instruction.operands[0]), total, out, warps, mask)


def _write_product(threads: Threads, targets: list[str], total: Lanes, out: str, warps: NDArray[np.int64], mask: Mask) -> None:
    """16 × N of each warp to registers: in each 8 columns two of a row, then two of the row 8 further down."""
    if out not in ("f32", "s32"):
        raise Refused(f"accumulators of {out}")
    columns = total.shape[2] // 8
    spread = total.reshape(len(warps), 2, 8, columns, 4, 2).transpose(3, 1, 5, 0, 2, 4).reshape(4 * columns, len(warps), WARP)
    kept = spread.astype(np.float32).view(np.uint32) if out == "f32" else spread.astype(np.int64).astype(np.uint32)
    for target, value in zip(targets, kept, strict=True):
        _write_warps(threads, target, value, warps, mask)


def _described(threads: Threads, descriptor: str, groups: NDArray[np.int64], rows: int, size: int, across: bool) -> NDArray[np.uint64]:
    """Addresses [groups, rows, K] of a matrix in shared memory that a descriptor tells; `across`: rows, not K, lie side by side.

    Tiles are 8 lines of one swizzle's width; the address bits above pick which 16 bytes of a line change places.
    """
    bits = threads.read(descriptor, "u64").reshape(-1, 128)[groups]
    if (bits != bits[:, :1]).any():
        raise Refused(f"threads of a warp group disagree on {descriptor}")
    told = bits[:, 0].astype(np.int64)
    start, leading, stride = (told >> at & 0x3FFF for at in (0, 16, 32))
    modes = np.unique(bits[:, 0] >> np.uint64(62))
    if len(modes) != 1 or (told >> 49 & 7).any():
        raise Refused("warp groups swizzle alike, from whole tiles on")
    line = {0: 16, 1: 128, 2: 64, 3: 32}[int(modes[0])]
    wide = line // size
    row, k = np.arange(rows)[:, None], np.arange(32 // size)[None, :]
    start, leading, stride = (16 * part[:, None, None] for part in (start, leading, stride))
    if across:
        local = start + row // wide * leading + k // 8 * stride + k % 8 * line + row % wide * size
        if line == 16:
            local = start + row // wide * stride + k // 8 * leading + k % 8 * line + row % wide * size
    elif line == 16:
        local = start + row // 8 * stride + row % 8 * 16 + k * size // 16 * leading + k * size % 16
    else:
        local = start + row // 8 * stride + row % 8 * line + k * size
    local = local ^ (local >> 7 & (line // 16 - 1)) << 4
    programs = threads.program.reshape(-1, 128)[groups, 0]
    flat = threads.shared_addresses(local.ravel(), size, np.repeat(programs, local[0].size))
    return flat.reshape(local.shape)


def _shared_matrix(threads: Threads, descriptor: str, groups: NDArray[np.int64], rows: int, kind: str, across: bool) -> Lanes:
    size = 1 if kind == "s8" else 2
    places = _described(threads, descriptor, groups, rows, size, across)
    (held,) = threads.shared.load(places.ravel(), size, 1)
    if kind == "bf16":
        return widen_bf16(held).astype(np.float64).reshape(places.shape)
    return held.view({"f16": np.float16, "s8": np.int8}[kind]).astype(np.float64).reshape(places.shape)


def multiply_group(threads: Threads, instruction: Instruction, mask: Mask) -> None:
    """`wgmma`: 64 × K times K × N for each group of four warps; the right matrix, and the left one or not, lie in shared memory."""
    groups, name = whole(threads, mask, 128), instruction.name
    kind, out = name[-1], name[-3]
    columns = int(name[4].partition("n")[2].partition("k")[0])
    targets, left, right, keep, *scales = instruction.operands
    inner = left.startswith("{")
    if any(int(scale) != 1 for scale in scales[:2]):
        raise Refused(f"signs of products are not known here: {instruction.text}")
    turned = [int(flag) == 1 for flag in scales[2:]]
    warps = (4 * groups[:, None] + np.arange(4)).ravel()
    if inner:
        rows = _left(threads, left, kind, warps).reshape(len(groups), 64, -1)
        across = bool(turned and turned[0])
    else:
        rows = _shared_matrix(threads, left, groups, 64, kind, bool(turned and turned[0]))
        across = len(turned) > 1 and turned[1]
    other = _shared_matrix(threads, right, groups, columns, kind, across)
    total = rows @ other.swapaxes(1, 2)
    names = registers(targets)
    held = np.stack([threads.read(register, out).reshape(-1, WARP)[warps] for register in names], -1)
    before = held.reshape(len(warps), 8, 4, columns // 8, 2, 2).transpose(0, 4, 1, 3, 2, 5).reshape(len(groups), 64, columns)
    kept = threads.read(keep, "pred")
    if kept.ndim:
        kept = kept.reshape(-1, 128)[groups, 0][:, None, None]
    total = total + np.where(kept, before, 0)
    _write_product(threads, names, total.reshape(len(warps), 16, columns), out, warps, mask)


TOGETHER: dict[str, Callable[[Threads, Instruction, Mask], None]] = {
    "shfl": shuffle, "redux": reduce_warp, "ldmatrix": load_tiles, "stmatrix": store_tiles, "mma": multiply_tiles,
    "wgmma": multiply_group,
}  # fmt: skip
