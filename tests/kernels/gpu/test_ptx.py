"""Compiled kernels that are run without a device: what the machine computes and refuses, by small programs, and our own kernels on it.

All kernels on it, for each chip: `make test-all`, or `EMULATE_SM=90 pytest tests/kernels/gpu`.
"""

from __future__ import annotations

import os
import struct
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.house.source import ROOT
from tests.kernels.gpu.conftest import COMPILED
from tests.kernels.gpu.ptx import machine
from tests.kernels.gpu.ptx.machine import launch
from tests.kernels.gpu.ptx.memory import Memory, Refused
from tests.kernels.gpu.ptx.program import parse

pytestmark = pytest.mark.skipif(COMPILED, reason="says nothing of a device, and starts the emulated tests itself")

# Two arrays, x and y; %rd3 and %rd4 are the addresses of this thread's element in them, %r1 is x's element.
FRAME = """
.visible .entry small_kernel(
	.param .u64 .ptr .global .align 1 small_kernel_param_0,
	.param .u32 small_kernel_param_1,
	.param .u64 .ptr .global .align 1 small_kernel_param_2
)
.reqntid THREADS
{
	.reg .pred 	%p<9>;
	.reg .b16 	%rs<9>;
	.reg .b32 	%r<40>;
	.reg .b64 	%rd<9>;
$L__func_begin0:
	.loc	1 17 0                          // a.py:17:0
	ld.param.b64 	%rd1, [small_kernel_param_0];
	ld.param.b32 	%r9, [small_kernel_param_1];
	ld.param.b64 	%rd2, [small_kernel_param_2];
	mov.u32 	%r8, %tid.x;
	mov.u32 	%r7, %ctaid.x;
	mad.lo.s32 	%r6, %r7, THREADS, %r8;
	mad.wide.s32 	%rd3, %r6, 4, %rd1;
	mad.wide.s32 	%rd4, %r6, 4, %rd2;
	ld.global.b32 	%r1, [%rd3];
BODY
	ret;
$L__func_end0:
}
"""
STORE = "\tst.global.b32 \t[%rd4], %r2;\n"


def run(body: str, x: Tensor, *, threads: int = 32, number: int = 0, shared_bytes: int = 1024, store: str = STORE) -> Tensor:
    """y after `body` and a store of %r2 for each element of x, in programs of `threads` threads."""
    program = parse(FRAME.replace("THREADS", str(threads)).replace("BODY", body + store))
    y = torch.zeros_like(x)
    parameters = struct.pack("=QixxxxQ", x.data_ptr(), number, y.data_ptr())
    launch(program, shared_bytes, (len(x) // threads, 1, 1), parameters, Memory.of_tensors([x, y]))
    return y


def integers(count: int = 64) -> Tensor:
    return torch.from_numpy(np.random.default_rng(0).integers(-(2**31), 2**31, count).astype(np.int32))


# Instructions on %r1 (x) and %r9 (13, or a float's bits), and what they leave in %r2.
SCALARS: dict[str, Any] = {
    "add.s32 %r2, %r1, %r9;": lambda x: x + 13,
    "mul.lo.s32 %r2, %r1, %r9;": lambda x: x * 13,
    "mul.hi.u32 %r2, %r1, %r9;": lambda x: ((x.long() & 0xFFFFFFFF) * 13 >> 32).int(),
    "mad.lo.s32 %r2, %r1, -3, %r9;": lambda x: x * -3 + 13,
    "shl.b32 %r2, %r1, 4;": lambda x: x << 4,
    "shl.b32 %r2, %r1, 32;": lambda x: x * 0,
    "shr.u32 %r2, %r1, 3;": lambda x: ((x.long() & 0xFFFFFFFF) >> 3).int(),
    "shr.s32 %r2, %r1, 40;": lambda x: x >> 31,
    "bfe.u32 %r2, %r1, 3, 5;": lambda x: (x >> 3) & 31,
    "bfe.s32 %r2, %r1, 3, 5;": lambda x: ((x >> 3 & 31) ^ 16) - 16,
    "bfi.b32 %r2, %r1, 0x12345678, 8, 5;": lambda x: (x & 31) << 8 | (0x12345678 & ~0x1F00),
    "prmt.b32 %r2, %r1, 0, 0x3120U;": lambda x: (x & 255) | (x >> 16 & 255) << 8 | (x >> 8 & 255) << 16 | (x & -(1 << 24)),
    "prmt.b32 %r2, %r1, 0, 0xaaa2U;": lambda x: (x >> 16 & 255) | torch.where(x >> 23 & 1 == 1, -256, 0).int(),
    "setp.lt.u32 %p1, %r1, %r9; selp.b32 %r2, 1, 7, %p1;": lambda x: torch.where((x.long() & 0xFFFFFFFF) < 13, 1, 7).int(),
    "setp.gt.s32 %p1, %r1, %r9; @!%p1 mov.b32 %r2, 5; @%p1 mov.b32 %r2, %r1;": lambda x: torch.where(x > 13, x, 5).int(),
    "mov.b32 {%rs1, %rs2}, %r1; mov.b32 %r2, {%rs2, %rs1};": lambda x: (x << 16) | (x >> 16 & 0xFFFF),
    "cvt.s16.s8 %rs2, %rs1; cvt.u16.u32 %rs1, %r1; cvt.s16.s8 %rs2, %rs1; cvt.s32.s16 %r2, %rs2;": lambda x: x.to(torch.int8).int(),
    "cvt.s64.s32 %rd5, %r1; shr.s64 %rd5, %rd5, 7; cvt.u32.u64 %r2, %rd5;": lambda x: x >> 7,
    "cvt.s64.s32 %rd5, %r1; mul.hi.u64 %rd6, %rd5, -1; cvt.u32.u64 %r2, %rd6;": lambda x: x - (x != 0).int(),
    "popc.b32 %r2, %r1;": lambda x: torch.tensor([bin(int(one) & 0xFFFFFFFF).count("1") for one in x], dtype=torch.int32),
    "min.s32 %r2, %r1, %r9;": lambda x: x.clamp(max=13),
    "rem.s32 %r2, %r1, %r9;": lambda x: torch.fmod(x, 13),
    "div.s32 %r2, %r1, %r9;": lambda x: torch.div(x, 13, rounding_mode="trunc"),
}  # fmt: skip


@pytest.mark.parametrize("body", SCALARS)
def test_integers(body: str) -> None:
    x = integers()
    assert torch.equal(run(body + "\n", x, number=13), SCALARS[body](x))


FLOATS: dict[str, Any] = {
    "fma.rn.f32 %r2, %r1, %r1, 0f3F800000;": lambda x: (x.double() * x.double() + 1).float(),
    "max.f32 %r2, %r1, 0f3F000000;": lambda x: torch.fmax(x, torch.full_like(x, 0.5)),
    "ex2.approx.ftz.f32 %r2, %r1;": lambda x: torch.exp2(x.double()).float(),
    "cvt.rn.bf16x2.f32 %r2, %r1, 0f3F800000;": lambda x: pairs(torch.ones_like(x), x, torch.bfloat16),
    "cvt.rn.f16x2.f32 %r2, 0f3F800000, %r1;": lambda x: pairs(x, torch.ones_like(x), torch.float16),
    "cvt.rzi.s32.f32 %r2, %r1;": lambda x: x.nan_to_num(nan=0.0).trunc().int().view(torch.float32),
    "setp.neu.f32 %p1, %r1, %r1; selp.f32 %r2, 0f3F800000, 0f00000000, %p1;": lambda x: x.isnan().float(),
    "setp.ne.f32 %p1, %r1, 0f40000000; selp.f32 %r2, 0f3F800000, 0f00000000, %p1;": lambda x: (~x.isnan() & (x != 2)).float(),
}  # fmt: skip


def pairs(low: Tensor, high: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.stack((low.to(dtype), high.to(dtype)), 1).view(torch.float32)[:, 0]


@pytest.mark.parametrize("body", FLOATS)
def test_floats(body: str) -> None:
    """Bits, but for NaN, of which there are many."""
    x = torch.cat((torch.linspace(-9, 9, 59), torch.tensor([float("nan"), 2.0, 0.0, 1e-3, -0.0])))
    found, expected = run(body + "\n", x), FLOATS[body](x)
    same = found.view(torch.int32) == expected.view(torch.int32)
    assert (same | x.isnan()).all() if "setp" not in body else same.all()


def test_threads_of_a_warp_exchange_and_add() -> None:
    x = integers()
    assert torch.equal(run("shfl.sync.bfly.b32 %r2, %r1, 5, 31, -1;\n", x), x.view(2, 32)[:, torch.arange(32) ^ 5].flatten())
    up = run("shfl.sync.up.b32 %r2, %r1, 3, 0, -1;\n", x).view(2, 32)
    assert torch.equal(up[:, 3:], x.view(2, 32)[:, :-3]) and torch.equal(up[:, :3], x.view(2, 32)[:, :3])
    added = run("mov.b32 %r3, -1; redux.sync.add.s32 %r2, %r1, %r3;\n", x).view(2, 32)
    assert torch.equal(added, x.view(2, 32).sum(1, dtype=torch.int32)[:, None].expand(2, 32))


# Each thread leaves its element in shared memory and takes that of the thread opposite.
TURN = """	shl.b32 	%r3, %r8, 2;
	sub.s32 	%r4, 252, %r3;
	st.shared.b32 	[%r3], %r1;
	bar.sync 	0;
	ld.shared.b32 	%r2, [%r4];
"""


def test_threads_wait_for_each_other_and_programs_share_nothing() -> None:
    x = integers(256)
    assert torch.equal(run(TURN, x, threads=64, shared_bytes=256), x.view(4, 64).flip(1).flatten())


def test_instructions_are_counted_by_warp() -> None:
    """Eleven of each warp, a load, a copy and a return besides the frame's nine; the first warp of each program goes on for two more."""
    before = machine.EXECUTED["small_kernel"]
    run("mov.b32 %r2, %r1;\n", integers(128), threads=64)
    plain = machine.EXECUTED["small_kernel"] - before
    run(
        "mov.b32 %r2, %r1; setp.ge.u32 %p1, %r8, 32; @%p1 bra $L__BB0_9; mov.b32 %r2, 1; mov.b32 %r2, 2;\n$L__BB0_9:\n",
        integers(128),
        threads=64,
    )
    assert machine.EXECUTED["small_kernel"] - before - plain == plain + 4 * 2 + 2 * 2


def test_threads_part_and_meet() -> None:
    """Each counts down from its low bits; odd ones then take another way."""
    body = """	and.b32 	%r3, %r1, 15;
	mov.b32 	%r2, 0;
$L__BB0_1:
	setp.eq.b32 	%p1, %r3, 0;
	@%p1 bra 	$L__BB0_2;
	add.s32 	%r2, %r2, %r3;
	add.s32 	%r3, %r3, -1;
	bra.uni 	$L__BB0_1;
$L__BB0_2:
	and.b32 	%r4, %r1, 1;
	setp.eq.b32 	%p2, %r4, 0;
	@%p2 bra 	$L__BB0_3;
	neg.s32 	%r2, %r2;
$L__BB0_3:
	shfl.sync.idx.b32 	%r2, %r2, %r8, 31, -1;
"""
    x = integers()
    low = x & 15
    assert torch.equal(run(body, x), torch.where(x & 1 == 1, -1, 1) * (low * (low + 1) // 2))


REFUSALS = {
    "beyond a tensor": ("add.s64 %rd3, %rd3, 256; ld.global.b32 %r2, [%rd3];", {}),
    "lies in no tensor": ("mov.b64 %rd3, 64; ld.global.b32 %r2, [%rd3];", {}),
    "not aligned": ("ld.global.v2.b32 {%r2, %r3}, [%rd1+4];", {}),
    "shared memory has 64": ("shl.b32 %r3, %r8, 2; st.shared.b32 [%r3], %r1;", {"shared_bytes": 64}),
    "not known here": ("sin.approx.f32 %r2, %r1;", {}),
    "different barriers": ("setp.lt.u32 %p1, %r8, 32; @%p1 bra $L__BB0_9; bar.sync 0;\n$L__BB0_9:\n", {"threads": 64}),
    "missing from what all": (
        "setp.lt.u32 %p1, %r8, 8; @%p1 bra $L__BB0_9; shfl.sync.bfly.b32 %r2, %r1, 1, 31, -1;\n$L__BB0_9:\n", {},
    ),
    "does not end": ("$L__BB0_9:\n bra.uni $L__BB0_9;", {}),
}  # fmt: skip


@pytest.mark.parametrize("words", REFUSALS)
def test_what_a_device_would_not_do_is_refused(words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "MOST_BLOCKS", 1000)
    body, options = REFUSALS[words]
    ends = "bar.sync 0;\n" if words == "different barriers" else ""
    with pytest.raises(Refused, match=words):
        run(body + "\n", integers(), **options, store="\tbar.sync \t0;\n" + STORE if ends else STORE)


def emulated(capability: int, *arguments: str) -> None:
    """Run tests of kernels in a process of their own in which they are compiled."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"EMULATE_SM": str(capability), "TRITON_DEFAULT_FP_FUSION": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]


PLACE = "tests/kernels/gpu"
SUMS = f"{PLACE}/test_paged_attention.py::test_the_order_of_sums_is_the_same_in_every_kernel"
TWO_STORES = f"{PLACE}/test_window_sparse.py::test_sixteen_bits"


@pytest.mark.timeout(300)
@pytest.mark.parametrize(("capability", "tests"), [(80, (f"{SUMS}[64-4]",)), (90, (SUMS, f"{TWO_STORES}[int8-dtype1]"))])
def test_a_few_compiled_kernels_compute_what_they_must(capability: int, tests: tuple[str, ...]) -> None:
    emulated(capability, *tests)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("capability", [80, 87, 90])
def test_every_compiled_kernel_computes_what_it_must(capability: int) -> None:
    """Serving shapes, most of the time that it takes, for one of them."""
    left_out = [f"--deselect={PLACE}/test_{name}.py" for name in ("compile_gate", *(("serving_shapes",) if capability != 90 else ()))]
    emulated(capability, "-n", "2", "-m", "not slow", PLACE, "tests/test_graph_parity.py", *left_out)
