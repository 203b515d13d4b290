"""Every kernel compiles for sm_80, sm_87 and sm_90 within registers and shared memory, and Hopper multiplies by warp group where it can."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import cache
from typing import Any

import pytest

pytest.importorskip("triton")

from service.kernels.gpu.compiling import UNALIGNED, VARYING
from tests.house.source import ROOT
from tests.kernels.gpu.compile_gate import repeats, serialized
from tests.kernels.gpu.kernel_shapes import SHAPES, Shape
from tests.kernels.gpu.ptx.driver import SHARED_BYTES

# Registers of one multiprocessor.
REGISTER_FILE = 65536
# Enough to see that kernels still compile in the quick suite; all of them are built by `make test-all`.
QUICK = ("decode-bf16-d64-g4-w0", "prefill-bf16-d128-g4-w2048", "quantise-rows")


# What Triton made of a prefill tile of 64 rows and 128 values for two warp groups: both compute all of its scores.
TWICE = """
#mma = #ttg.nvidia_mma<{versionMajor = 3, versionMinor = 0, warpsPerCTA = [8, 1], instrShape = [16, 32, 16]}>
#mma1 = #ttg.nvidia_mma<{versionMajor = 3, versionMinor = 0, warpsPerCTA = [4, 2], instrShape = [16, 64, 16]}>
%b_scores_177 = ttng.warp_group_dot %b_query_59, %b_scores, %cst_5 {isAsync = true} : !ttg.memdesc<64x128xbf16, #shared, #smem> \
* !ttg.memdesc<128x64xbf16, #shared1, #smem, mutable> -> tensor<64x64xf32, #mma> loc(#loc339)
%b_acc_195 = ttng.warp_group_dot %b_acc_194, %b_values_176, %b_acc_193 {isAsync = true} : tensor<64x64xbf16, #ttg.dot_op<{opIdx = 0}>> \
* !ttg.memdesc<64x128xbf16, #shared, #smem, mutable> -> tensor<64x128xf32, #mma1> loc(#loc353)
"""


@cache
def gate(capability: int, pattern: str = "") -> dict[str, dict[str, Any]]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | {"TRITON_DEFAULT_FP_FUSION": "1"}
    command = [sys.executable, "-m", "tests.kernels.gpu.compile_gate", str(capability), pattern]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return {row["name"]: row for row in map(json.loads, done.stdout.splitlines())}


def faults(shape: Shape, row: dict[str, Any]) -> list[str]:
    found = []
    if row["stack_bytes"] > shape.stack_bytes or row["local_bytes"]:
        found.append(f"{shape.name}: {row['stack_bytes']} bytes of stack, {row['local_bytes']} local")
    if row["shared_bytes"] > SHARED_BYTES[row["capability"]]:
        found.append(f"{shape.name}: {row['shared_bytes']} bytes of shared memory")
    # Handed out to warps in eights for each thread.
    if -(-row["registers"] // 8) * 8 * 32 * shape.warps > REGISTER_FILE:
        found.append(f"{shape.name}: {row['registers']} registers in each of {shape.warps} warps")
    if shape.wgmma and row["capability"] == 90 and not row["wgmma"]:
        found.append(f"{shape.name}: no wgmma")
    if row["repeats"] > 1:
        found.append(f"{shape.name}: a product is computed {row['repeats']} times")
    if row["serialized"]:
        found.append(f"{shape.name}: each product of a warp group waits for the one before")
    if row["fused_rounding"]:
        found.append(f"{shape.name}: what is rounded is fused with the product before it")
    return found


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("capability", [80, 87, 90])
def test_every_kernel_fits_the_chip(capability: int) -> None:
    rows = gate(capability)
    shapes = [shape for shape in SHAPES if capability in shape.capabilities]
    assert {shape.name for shape in shapes} == set(rows)
    assert [fault for shape in shapes for fault in faults(shape, rows[shape.name])] == []


@pytest.mark.parametrize("name", QUICK)
def test_a_few_kernels_fit_hopper(name: str) -> None:
    shape = next(shape for shape in SHAPES if shape.name == name and 90 in shape.capabilities)
    assert faults(shape, gate(90, name)[name]) == []


def test_the_gate_sees_faults() -> None:
    shape = next(shape for shape in SHAPES if shape.wgmma)
    assert shape.warps == 8
    nothing = dict.fromkeys(("stack_bytes", "local_bytes", "fused_rounding", "serialized"), 0)
    sound = nothing | {"registers": 255, "shared_bytes": 1000, "capability": 90, "wgmma": True, "repeats": 1}
    assert faults(shape, sound) == []
    changes: dict[str, Any] = {"stack_bytes": 8, "local_bytes": 4, "shared_bytes": 228 << 10, "registers": 257, "wgmma": False}
    changes |= {"fused_rounding": True, "serialized": True, "repeats": 2}
    for name, value in changes.items():
        assert len(faults(shape, sound | {name: value})) == 1
    assert faults(shape, sound | {"wgmma": False, "capability": 80}) == []


def test_scores_that_are_computed_twice_are_seen() -> None:
    once = TWICE.replace("warpsPerCTA = [8, 1]", "warpsPerCTA = [4, 2]")
    rows, columns = TWICE.replace("<64x64xf32, #mma>", "<32x64xf32, #mma>"), TWICE.replace("<64x128xf32", "<64x64xf32")
    assert [repeats(text) for text in (TWICE, once, rows, columns, "")] == [2, 1, 4, 2, 1]


def test_products_that_wait_for_each_other_are_seen() -> None:
    product, wait = "HGMMA.64x64x16.F32.BF16 R88, gdesc[UR12], R88 ;\n", "WARPGROUP.DEPBAR.LE gsb0, 0x0 ;\n"
    codes = ((product + wait) * 3, product * 3 + wait, product + wait, "HMMA.16816.F32 R4, R8, R12, R4 ;", "")
    found = [serialized(code) for code in codes]
    assert found == [True, False, False, False, False]


# Integers that a model and its settings fix.
FIXED = {"inputs", "outputs", "hidden", "heads", "query_heads", "vocabulary"}


def test_what_changes_from_step_to_step_makes_no_variants() -> None:
    """Every integer of a kernel is of the model, a stride of something of the model, or of those that no variant is compiled for."""
    for shape in SHAPES:
        names = shape.function().arg_names
        integers = {name for name in names if shape.types.get(name) == "i32"}
        assert {name for name in integers if not name.startswith("stride_")} <= FIXED | set(VARYING), shape.name
        moving = {name for name in integers if name.startswith("stride_") and name.endswith(("table", "choice_anchor", "choice_head"))}
        pointers = {name for name in names if shape.types.get(name) in ("*i32", "*i64")}
        assert moving <= set(VARYING) and pointers <= set(UNALIGNED) | WHOLE, shape.name


# Integers that have memory of their own, or begin at a row's end.
WHOLE = {"p_visits", "p_marks", "p_kept", "p_near_ids", "p_far_ids", "p_top_k", "p_tokens"}
