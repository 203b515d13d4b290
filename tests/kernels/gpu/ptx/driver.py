"""A driver for Triton without a device: kernels are compiled for a chip as always, and what was compiled is run by `machine.py`.

`use(90)` makes it the active one: from then on `kernel[grid](…)` takes CPU tensors. `tests/conftest.py` does so where the environment
has EMULATE_SM=90.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase

from tests.kernels.gpu.ptx.machine import launch
from tests.kernels.gpu.ptx.memory import Memory
from tests.kernels.gpu.ptx.program import Program, parse

# Shared memory that a program may have, by capability.
SHARED_BYTES = {80: 163 << 10, 87: 163 << 10, 90: 227 << 10}
FORMATS = {
    "i1": "b",
    "i8": "b",
    "u8": "B",
    "i16": "h",
    "u16": "H",
    "i32": "i",
    "u32": "I",
    "i64": "q",
    "u64": "Q",
    "fp32": "f",
    "fp64": "d",
}


class Handle:
    """What stands for a loaded kernel; its program is there once Triton has told where its text lies."""

    def __init__(self, shared_bytes: int) -> None:
        self.shared_bytes = shared_bytes
        self.program: Program | None = None


class Utilities:
    """What Triton asks of a driver's library."""

    def __init__(self, capability: int) -> None:
        self._capability = capability

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": SHARED_BYTES[self._capability], "multiprocessor_count": 1, "warpSize": 32, "max_num_regs": 65536}

    def load_binary(self, name: str, kernel: bytes, shared: int, device: int) -> tuple[Any, Handle, int, int, int]:
        handle = Handle(shared)
        return handle, handle, 0, 0, 1024

    def unload_module(self, module: Any) -> None:
        """Nothing is loaded."""


class Launcher:
    """Calls one compiled kernel."""

    def __init__(self, source: Any, metadata: Any) -> None:
        self._signature: Mapping[str, str] = source.signature

    def __call__(self, *given: Any) -> None:
        grid, handle, arguments = given[:3], given[4], given[9:]
        values = [(kind, value) for kind, value in zip(self._signature.values(), arguments, strict=True) if kind != "constexpr"]
        assert handle.program is not None
        parameters = bytearray(handle.program.offsets[-1])
        # Two pointers to scratch memory, which our kernels do not have, come last.
        for at, (kind, value) in zip(handle.program.offsets, values, strict=False):
            struct.pack_into(
                *(("=Q", parameters, at, value.data_ptr()) if kind[0] == "*" else (f"={FORMATS[kind]}", parameters, at, value))
            )
        memory = Memory.of_tensors(value for _, value in values if isinstance(value, Tensor))
        launch(handle.program, handle.shared_bytes, grid, bytes(parameters), memory)


class Driver(DriverBase):
    """sm_`capability`, without the device."""

    def __init__(self, capability: int) -> None:
        self.capability = capability
        self.utils = Utilities(capability)
        self.launcher_cls = Launcher

    @staticmethod
    def is_active() -> bool:
        return True

    def get_current_device(self) -> int:
        return 0

    def set_current_device(self, device: int) -> None:
        """There is one."""

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def map_python_to_cpp_type(self, ty: str) -> str:
        return ty

    def get_benchmarker(self) -> Any:
        raise NotImplementedError("nothing is timed here")


def loaded(module: Any, handle: Handle, name: str, files: Mapping[str, str], digest: str) -> None:
    """Triton's word that a kernel was loaded, with the files that were compiled."""
    path = next(path for file, path in files.items() if file.endswith(".ptx"))
    handle.program = parse(Path(path).read_text())


def use(capability: int) -> None:
    """Make this driver the active one of the process, and host functions choose as for that chip. Before kernels are imported. Raises
    ValueError for a chip that it does not know."""
    if capability not in SHARED_BYTES:
        raise ValueError(f"sm_{capability} is not known here: emulate one of {', '.join(map(str, SHARED_BYTES))}")
    from service.kernels.gpu import paged_attention

    paged_attention.capability = lambda device: capability  # type: ignore[assignment]
    triton.runtime.driver.set_active(Driver(capability))
    triton.knobs.runtime.kernel_load_end_hook.add(loaded)
