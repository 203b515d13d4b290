"""What single threads compute: integers, floats, comparisons, conversions, and moves between registers.

Each function takes the threads, an instruction and the types in its name, and gives one value for each thread, which the machine writes to
the first operand. A fused product and sum is computed in float64 and rounded once more, which differs from the device in the last bit at
most, and never between two kernels.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce
from typing import Any

import numpy as np
import torch

from tests.kernels.gpu.ptx.lanes import KINDS, Lanes, Threads
from tests.kernels.gpu.ptx.memory import Refused
from tests.kernels.gpu.ptx.program import Instruction

Value = Callable[[Threads, Instruction], Lanes]
TYPES = frozenset((*KINDS, "pred", "bf16", "bf16x2", "f16x2", "s16x2", "u16x2", "e4m3x2"))
WIDER = {"s16": "s32", "u16": "u32", "s32": "s64", "u32": "u64"}
COMPARE: dict[str, Callable[[Any, Any], Any]] = {
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal,
    "lo": np.less, "ls": np.less_equal, "hi": np.greater, "hs": np.greater_equal,
}  # fmt: skip


def kinds(instruction: Instruction) -> list[str]:
    """The types in an instruction's name."""
    return [part for part in instruction.name[1:] if part in TYPES]


def widen_bf16(bits: Lanes) -> Lanes:
    """bfloat16 as float32."""
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def round_bf16(value: Lanes) -> Lanes:
    """float32 rounded to the nearest bfloat16, ties to even, as bits."""
    bits = np.ascontiguousarray(value, np.float32).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(value), np.uint32(0x7FFF), rounded).astype(np.uint16)


def read(threads: Threads, operand: str, kind: str) -> Lanes:
    """An operand; bfloat16 as float32."""
    return widen_bf16(threads.read(operand, "b16")) if kind == "bf16" else threads.read(operand, kind)


def halves(threads: Threads, operand: str) -> tuple[Lanes, Lanes]:
    """The lower and upper 16 bits of a 32-bit operand."""
    bits = threads.read(operand, "b32")
    return (bits & np.uint32(0xFFFF)).astype(np.uint16), (bits >> np.uint32(16)).astype(np.uint16)


def pack(low: Lanes, high: Lanes) -> Lanes:
    """Two times 16 bits as 32."""
    return low.view(np.uint16).astype(np.uint32) | (high.view(np.uint16).astype(np.uint32) << np.uint32(16))


def elementwise(function: Callable[..., Any]) -> Value:
    """An operation on operands of one type, also on the two halves of a register."""

    def compute(threads: Threads, instruction: Instruction) -> Lanes:
        kind, sources = kinds(instruction)[-1], instruction.operands[1:]
        if kind.endswith("x2"):
            each = zip(*(halves(threads, source) for source in sources), strict=True)
            return pack(*(narrow(function(*(widen(part, kind[:-2]) for part in parts)), kind[:-2]) for parts in each))
        return narrow(function(*(read(threads, source, kind) for source in sources)), kind)

    return compute


def widen(bits: Lanes, kind: str) -> Lanes:
    return widen_bf16(bits) if kind == "bf16" else bits.view(KINDS[kind])


def narrow(value: Lanes, kind: str) -> Lanes:
    if kind == "pred":
        return value
    return round_bf16(value) if kind == "bf16" else np.asarray(value).astype(KINDS[kind], copy=False)


def extreme(exact: Callable[[Any, Any], Any], number: Callable[[Any, Any], Any]) -> Value:
    """Minimum or maximum: of a number and NaN the number, unless the name says NaN."""

    def compute(threads: Threads, instruction: Instruction) -> Lanes:
        return elementwise(exact if "NaN" in instruction.name else number)(threads, instruction)

    return compute


def fused(left: Lanes, right: Lanes, added: Lanes) -> Lanes:
    return (left.astype(np.float64) * right.astype(np.float64) + added.astype(np.float64)).astype(left.dtype)


def divide(left: Lanes, right: Lanes) -> Lanes:
    if left.dtype.kind == "f":
        return left / right
    whole = np.abs(left) // np.maximum(np.abs(right), 1)  # toward zero
    return np.where((left < 0) != (right < 0), -whole, whole) if left.dtype.kind == "i" else whole


def multiply(threads: Threads, instruction: Instruction) -> Lanes:
    """Products, and with a third operand sums of them; of integers the low half, the high half, or all."""
    kind, sources = kinds(instruction)[-1], instruction.operands[1:]
    if "hi" in instruction.name and len(sources) > 2:
        return refuse(threads, instruction)
    if "hi" in instruction.name and kind == "u64":
        return high_half(*(threads.read(source, kind) for source in sources))
    if "wide" in instruction.name or "hi" in instruction.name:
        wide = WIDER[kind]
        product = np.multiply(*(threads.read(source, kind).astype(KINDS[wide]) for source in sources[:2]))
        if "hi" in instruction.name:
            return (product >> np.asarray(8 * np.dtype(KINDS[kind]).itemsize, product.dtype)).astype(KINDS[kind])
        return product if len(sources) == 2 else product + threads.read(sources[2], wide)
    factors = [read(threads, source, kind) for source in sources]
    product = np.multiply(*factors[:2])
    return narrow(product if len(sources) == 2 else product + factors[2], kind)


def high_half(left: Lanes, right: Lanes) -> Lanes:
    """The upper 64 bits of products of 64-bit numbers."""
    half, low = np.uint64(32), np.uint64(0xFFFFFFFF)
    cross = (left & low) * (right >> half) + ((left & low) * (right & low) >> half)
    other = (left >> half) * (right & low) + (cross & low)
    return (left >> half) * (right >> half) + (cross >> half) + (other >> half)


def shift(threads: Threads, instruction: Instruction) -> Lanes:
    """Shifts; by more than the width all bits are shifted out."""
    kind = kinds(instruction)[-1]
    value, by = threads.read(instruction.operands[1], kind), threads.read(instruction.operands[2], "u32")
    width = 8 * value.itemsize
    left = instruction.name[0] == "shl"
    most = by if left or kind[0] != "s" else np.minimum(by, width - 1)
    moved = (np.left_shift if left else np.right_shift)(value, np.minimum(most, width - 1).astype(value.dtype))
    return np.where(most >= width, np.zeros_like(moved), moved)


def extract(threads: Threads, instruction: Instruction) -> Lanes:
    """`bfe`: a field of bits, extended by its sign where the type has one."""
    kind = kinds(instruction)[-1]
    value = threads.read(instruction.operands[1], kind)
    start, length = (int(operand, 0) for operand in instruction.operands[2:])
    width = 8 * value.itemsize
    return (value << np.asarray(width - start - length, value.dtype)) >> np.asarray(width - length, value.dtype)


def insert(threads: Threads, instruction: Instruction) -> Lanes:
    """`bfi`: the low bits of one value in the place of a field of another."""
    kind = kinds(instruction)[-1]
    field, value = (threads.read(operand, kind) for operand in instruction.operands[1:3])
    start, length = (int(operand, 0) for operand in instruction.operands[3:])
    mask = np.asarray(((1 << length) - 1) << start, value.dtype)
    return (value & ~mask) | (field << np.asarray(start, value.dtype) & mask)


def permute(threads: Threads, instruction: Instruction) -> Lanes:
    """`prmt`: four bytes picked from eight, or a byte's sign repeated."""
    low, high = (threads.read(operand, "b32").astype(np.uint64) for operand in instruction.operands[1:3])
    selector = int(instruction.operands[3].rstrip("U"), 0)
    both, result = low | (high << np.uint64(32)), np.zeros((), np.uint64)
    for place in range(4):
        pick = selector >> 4 * place & 15
        byte = both >> np.uint64(8 * (pick & 7)) & np.uint64(255)
        if pick & 8:
            byte = (byte >> np.uint64(7)) * np.uint64(255)
        result = result | byte << np.uint64(8 * place)
    return result.astype(np.uint32)


def compare(threads: Threads, instruction: Instruction) -> Lanes:
    """`setp`; names that end in u hold for NaN too."""
    if len(instruction.operands) != 3:
        return refuse(threads, instruction)
    kind, how = kinds(instruction)[-1], instruction.name[1]
    left, right = (read(threads, operand, kind) for operand in instruction.operands[1:3])
    if how in ("nan", "num"):
        return (np.isnan(left) | np.isnan(right)) == (how == "nan")
    plain = how[:-1] if len(how) == 3 and how.endswith("u") else how
    found = COMPARE[plain](left, right)
    if how == "ne" and left.dtype.kind == "f":
        found = found & ~(np.isnan(left) | np.isnan(right))
    return found | np.isnan(left) | np.isnan(right) if how != plain else found


def select(threads: Threads, instruction: Instruction) -> Lanes:
    kind = "b" + kinds(instruction)[-1][1:]
    yes, no = (threads.read(operand, kind) for operand in instruction.operands[1:3])
    return np.where(threads.read(instruction.operands[3], "pred"), yes, no)


def move(threads: Threads, instruction: Instruction) -> Lanes:
    """Moves; several registers become one."""
    kind, source = kinds(instruction)[-1], instruction.operands[1]
    if not source.startswith("{"):
        return threads.read(source, kind)
    parts = [part.strip() for part in source.strip("{}").split(",")]
    whole = KINDS["b" + kind[1:]]
    bits = 8 * np.dtype(whole).itemsize // len(parts)
    pieces = (threads.read(part, f"b{bits}").astype(whole) << np.asarray(bits * place, whole) for place, part in enumerate(parts))
    return reduce(np.bitwise_or, pieces)


def convert(threads: Threads, instruction: Instruction) -> Lanes:
    """`cvt` between the types that the kernels use."""
    to, source = kinds(instruction)
    if to == "f16x2" and source == "e4m3x2":
        return pack(*(read_e4m3(part) for part in bytes_of(threads.read(instruction.operands[1], "b16"))))
    if to.endswith("x2"):
        high, low = (read(threads, operand, source) for operand in instruction.operands[1:3])
        if to == "e4m3x2":
            return write_e4m3(low).astype(np.uint16) | write_e4m3(high).astype(np.uint16) << np.uint16(8)
        return pack(*(round_bf16(part) if to == "bf16x2" else part.astype(np.float16) for part in np.broadcast_arrays(low, high)))
    value = read(threads, instruction.operands[1], source)
    if to == "bf16":
        return round_bf16(value.astype(np.float32))
    wanted = np.dtype(KINDS[to])
    if value.dtype.kind != "f":
        return value.astype(wanted)
    rounded = round_whole(value, instruction.name)
    if wanted.kind == "f":
        return rounded.astype(wanted)
    limits = np.iinfo(wanted)
    return np.clip(np.nan_to_num(rounded.astype(np.float64), nan=0.0), limits.min, limits.max).astype(wanted)


def round_whole(value: Lanes, name: tuple[str, ...]) -> Lanes:
    for rule, function in (("rzi", np.trunc), ("rpi", np.ceil), ("rmi", np.floor), ("rni", np.rint)):
        if rule in name:
            return function(value)
    return value


def bytes_of(pair: Lanes) -> tuple[Lanes, Lanes]:
    return (pair & np.uint16(255)).astype(np.uint8), (pair >> np.uint16(8)).astype(np.uint8)


def read_e4m3(bits: Lanes) -> Lanes:
    """8-bit floats as float16, which holds all of them."""
    return torch.from_numpy(np.ascontiguousarray(bits)).view(torch.float8_e4m3fn).to(torch.float16).numpy()


def write_e4m3(value: Lanes) -> Lanes:
    """float32 to the nearest 8-bit float; what lies beyond becomes the largest."""
    clipped = torch.from_numpy(np.clip(np.ascontiguousarray(value), -448.0, 448.0))
    return clipped.to(torch.float8_e4m3fn).view(torch.uint8).numpy()


def exponential(value: Lanes) -> Lanes:
    """2 to the power of float32; what is too small for a normal number is 0."""
    result = np.exp2(value.astype(np.float64)).astype(np.float32)
    return np.where(np.abs(result) < np.finfo(np.float32).tiny, np.float32(0), result)


def count_bits(value: Lanes) -> Lanes:
    return np.bitwise_count(value).astype(np.uint32)


def refuse(threads: Threads, instruction: Instruction) -> Lanes:
    raise Refused(f"not known here: {instruction.text}")


VALUES: dict[str, Value] = {
    "add": elementwise(np.add), "sub": elementwise(np.subtract), "neg": elementwise(np.negative), "abs": elementwise(np.abs),
    "and": elementwise(np.bitwise_and), "or": elementwise(np.bitwise_or), "xor": elementwise(np.bitwise_xor), "not": elementwise(np.invert),
    "min": extreme(np.minimum, np.fmin), "max": extreme(np.maximum, np.fmax), "div": elementwise(divide), "fma": elementwise(fused),
    "rem": elementwise(np.fmod),
    "mul": multiply, "mad": multiply, "shl": shift, "shr": shift, "bfe": extract, "bfi": insert, "prmt": permute, "setp": compare,
    "selp": select, "mov": move, "cvt": convert, "ex2": elementwise(exponential), "lg2": elementwise(np.log2), "sqrt": elementwise(np.sqrt),
    "rsqrt": elementwise(lambda value: (1 / np.sqrt(value.astype(np.float64))).astype(np.float32)),
    "rcp": elementwise(lambda value: np.float32(1) / value), "popc": lambda threads, instruction: count_bits(
        threads.read(instruction.operands[1], kinds(instruction)[-1])),
}  # fmt: skip
