"""Compile every GPU kernel for a chip that need not be here, and report registers, spills, shared memory and the kind of matrix product.

Run as `python -m tests.kernels.gpu.compile_gate 90`: one JSON object a line and kernel, kept with --keep. It needs no GPU; the tests run it
as a child, because in their own process kernels are interpreted.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from loadtests.rows import keep, surroundings
from service.kernels.gpu.choose_far import select_registers
from service.kernels.gpu.paged_attention import REGISTERS
from tests.kernels.gpu.kernel_shapes import SHAPES, Shape
from tests.kernels.gpu.ptx.driver import SHARED_BYTES

# What kernels add and take off again to round half to even.
ROUNDING = 12582912


class Compiled(NamedTuple):
    """What was made of one kernel: registers a thread, bytes of stack (spills), shared bytes, whether it multiplies by warp group, whether
    the sum that rounds half to even is fused with a product, which would round otherwise, how often its most repeated matrix product is
    computed (see `repeats`), and whether each product of a warp group waits for the one before."""

    name: str
    capability: int
    registers: int
    stack_bytes: int
    local_bytes: int
    shared_bytes: int
    wgmma: bool
    mma: bool
    fused_rounding: bool
    repeats: int
    serialized: bool


def compile_shape(shape: Shape, capability: int) -> Compiled:
    """Compile one kernel for sm_`capability`. Raises what the compiler raises."""
    function = shape.function()
    signature = {name: shape.types.get(name, "constexpr") for name in function.arg_names}
    constants = {name: value for name, value in shape.constants.items() if name in signature}
    unaligned = {param.name for param in function.params if param.do_not_specialize or param.do_not_specialize_on_alignment}
    aligned = [name for name in shape.aligned(signature) if name not in unaligned]
    attributes = {(function.arg_names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    source = ASTSource(function, signature, constants, attributes)
    options = {"num_warps": shape.warps, "num_stages": shape.stages, "enable_fp_fusion": shape.fusion}
    if shape.module in ("dense_tiles", "dense_rows", "sparse_tiles", "sparse_rows"):
        options["maxnreg"] = REGISTERS
    if shape.kernel == "select_kernel":
        options["maxnreg"] = select_registers(shape.warps)
    made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    cubin, ptx = made.asm["cubin"], made.asm["ptx"]
    code = dumped(cubin, "--dump-sass")
    fused = re.search(rf"FFMA.* {ROUNDING}", code) is not None
    kinds = "wgmma.mma_async" in ptx, "mma.sync" in ptx
    used = *resource_usage(cubin), made.metadata.shared
    return Compiled(shape.name, capability, *used, *kinds, fused, repeats(made.asm["ttgir"]), serialized(code))


def repeats(ttgir: str) -> int:
    """How often a program computes its most repeated matrix product: warps laid beyond its rows or columns compute again what others do."""
    layouts = {
        name: [int(number) for number in numbers]
        for name, *numbers in re.findall(r"(#mma\d*) = .*warpsPerCTA = \[(\d+), (\d+)\], instrShape = \[(\d+), (\d+)", ttgir)
    }
    found = 1
    for rows, columns, name in re.findall(r"(?:tt\.dot|warp_group_dot) .*-> tensor<(\d+)x(\d+)x\w+, (#mma\d*)>", ttgir):
        down, across, height, width = layouts[name]
        found = max(found, max(1, down * height // int(rows)) * max(1, across * width // int(columns)))
    return found


def serialized(code: str) -> bool:
    """Whether ptxas put a wait behind every product of a warp group, which it does where it cannot follow their accumulators."""
    products, waits = len(re.findall(r"[HIQ]GMMA", code)), code.count("WARPGROUP.DEPBAR")
    return products > 1 and waits >= products


def dumped(cubin: bytes, what: str) -> str:
    """What cuobjdump says of a cubin."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([str(tool), what, file.name], capture_output=True, text=True, check=True).stdout


def resource_usage(cubin: bytes) -> tuple[int, int, int]:
    """(registers, stack bytes, local bytes) of the one kernel in a cubin."""
    said = dumped(cubin, "--dump-resource-usage")
    found = re.search(r"REG:(\d+) STACK:(\d+) .*?LOCAL:(\d+)", said)
    if found is None:
        raise ValueError(f"cuobjdump said nothing of registers: {said[-500:]}")
    return int(found[1]), int(found[2]), int(found[3])


def compile_all(capability: int, pattern: str = "") -> Iterator[Compiled]:
    """Every shape whose name contains `pattern`, two at a time."""
    shapes = [shape for shape in SHAPES if pattern in shape.name and capability in shape.capabilities]
    with ProcessPoolExecutor(2) as pool:
        yield from pool.map(compile_shape, shapes, [capability] * len(shapes))


def main() -> None:
    """Compile, print, and keep where asked."""
    parser = argparse.ArgumentParser(description="Compile every GPU kernel for a chip that need not be here.")
    parser.add_argument("capability", type=int, choices=tuple(SHARED_BYTES))
    parser.add_argument("pattern", nargs="?", default="")
    parser.add_argument("--keep", action="store_true", help="append the rows to loadtests/results/gpu_compiled.jsonl")
    options = parser.parse_args()
    for row in compile_all(options.capability, options.pattern):
        print(json.dumps(row._asdict()), flush=True)
        if options.keep:
            keep("gpu_compiled", {**surroundings(), "triton": triton.__version__, **row._asdict()})


if __name__ == "__main__":
    main()
