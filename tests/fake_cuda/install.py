"""The device of `device.py` put into torch for a while: factories, `torch.cuda`, graphs and Triton's launches.

What imports it can then use `cuda` everywhere. It does not know kernels: they are interpreted, or compiled and emulated, as the process has
chosen (`tests/conftest.py`).
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.fake_cuda.device import CUDA, DEVICE, Device, Graph, OnDevice, held_by, poison

if "EMULATE_SM" in os.environ:
    from tests.kernels.gpu.ptx.driver import Launcher as Launching
else:
    from triton.runtime.interpreter import GridExecutor as Launching

FREE_BYTES, TOTAL_BYTES = 1 << 30, 2 << 30
# Values and number of c10::DeviceType.
CUDA_TYPE, META_TYPE, DEVICE_TYPES = 1, 14, 22
# Factories that torch has for each device alone, or that resize what another made.
FACTORIES = ("empty.memory_format", "empty_strided.default", "arange.default", "arange.start", "arange.start_step")


class Capture:
    """torch.cuda.graph"""

    def __init__(self, graph: Graph, pool: object = None, stream: object = None, capture_error_mode: str = "global") -> None:
        self._graph = graph

    def __enter__(self) -> None:
        DEVICE.begin(self._graph)

    def __exit__(self, *error: object) -> None:
        DEVICE.end()


class Event:
    """torch.cuda.Event"""

    def __init__(self, enable_timing: bool = False) -> None:
        """There is no time."""

    def elapsed_time(self, end: Event) -> float:
        return 1.0

    def record(self) -> None:
        """There is one stream."""

    def synchronize(self) -> None:
        DEVICE.wait("event")


class Numbers(torch.Generator):
    """torch.Generator of any device: those of the CPU."""

    def __new__(cls, device: object = "cpu") -> Numbers:
        return super().__new__(cls)


def _factory(name: str) -> Callable[..., Tensor]:
    packet, overload = name.split(".")
    on_cpu = getattr(getattr(torch.ops.aten, packet), overload)

    def make(*args: Any, **kwargs: Any) -> Tensor:
        kwargs = {key: value for key, value in kwargs.items() if key != "pin_memory"} | {"device": "cpu"}
        with torch.inference_mode(False), torch.no_grad():
            held = on_cpu(*args, **kwargs)
            if packet.startswith("empty"):
                poison(held)
            DEVICE.note(on_cpu, (args, kwargs), [held], [])
            return OnDevice(held)

    return make


@contextmanager
def fake_cuda(capability: tuple[int, int] = (9, 0)) -> Iterator[Device]:
    """torch with a device of `capability`, on which nothing lies yet."""
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libc10.so"))
    guards = (ctypes.c_void_p * DEVICE_TYPES).in_dll(library, "_ZN3c104impl26device_guard_impl_registryE")
    before, torch_only_lifts = guards[CUDA_TYPE], torch._C._only_lift_cpu_tensors()
    # A build for CPUs has no guard for CUDA devices: the one of `meta`, which does nothing, stands for it.
    guards[CUDA_TYPE] = guards[META_TYPE]
    torch._C._set_only_lift_cpu_tensors(True)
    DEVICE.reset()
    factories = torch.library.Library("aten", "IMPL")
    for name in FACTORIES:
        factories.impl(name.removesuffix(".default"), _factory(name), "CUDA")
    try:
        with pytest.MonkeyPatch.context() as patch:
            _put_into_torch(patch, capability)
            patch.setattr(Launching, "__call__", _checked(Launching.__call__))
            yield DEVICE
    finally:
        factories._destroy()
        DEVICE.reset()
        torch._C._set_only_lift_cpu_tensors(torch_only_lifts)
        guards[CUDA_TYPE] = before


def _put_into_torch(patch: pytest.MonkeyPatch, capability: tuple[int, int]) -> None:
    empty = torch.empty

    def pinned(*size: Any, pin_memory: bool = False, **options: Any) -> Tensor:
        made = empty(*size, **options)
        if pin_memory:
            DEVICE.pinned.add(made.untyped_storage().data_ptr())
        return made

    patch.setattr(torch, "empty", pinned)
    patch.setattr(Tensor, "pin_memory", lambda tensor: pinned(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor))
    patch.setattr(torch, "Generator", Numbers)
    for place, name in ((Tensor, "to"), (torch, "tensor"), (torch, "as_tensor")):
        patch.setattr(place, name, _with_number(getattr(place, name)))
    properties = SimpleNamespace(multi_processor_count=1, total_memory=TOTAL_BYTES)
    for name, value in {
        "_lazy_init": lambda: None,
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "current_device": lambda: 0,
        "device_count": lambda: 1,
        "get_device_capability": lambda device=None: capability,
        "get_device_name": lambda device=None: "a device that is not there",
        "get_device_properties": lambda device=None: properties,
        "mem_get_info": lambda device=None: (FREE_BYTES, TOTAL_BYTES),
        "is_bf16_supported": lambda including_emulation=True: True,
        "synchronize": lambda device=None: DEVICE.wait("synchronize"),
        "empty_cache": lambda: None,
        "graph_pool_handle": lambda: (0, 0),
        "Event": Event,
        "CUDAGraph": Graph,
        "graph": Capture,
    }.items():
        patch.setattr(torch.cuda, name, value)


def _with_number(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The same, told the device by its number, for which it would ask a guard that does not know."""

    def numbered(value: Any) -> Any:
        return CUDA if isinstance(value, str | torch.device) and str(value) == "cuda" else value

    def call(*args: Any, **kwargs: Any) -> Tensor:
        return function(*map(numbered, args), **{name: numbered(value) for name, value in kwargs.items()})

    return call


def _checked(launch: Callable[..., None]) -> Callable[..., None]:
    """A launch takes tensors of the device only."""

    def held(value: Any) -> Any:
        if isinstance(value, Tensor) and not isinstance(value, OnDevice):
            raise ValueError("Pointer argument cannot be accessed from Triton (cpu tensor?)")
        return held_by(value)

    def checked(launcher: Any, *args: Any, **kwargs: Any) -> None:
        on_values = [held(value) for value in args], {name: held(value) for name, value in kwargs.items()}
        DEVICE.launch(lambda: launch(launcher, *on_values[0], **on_values[1]))

    return checked


@contextmanager
def device_or_fake(capability: tuple[int, int] = (9, 0)) -> Iterator[None]:
    """The machine's own device where it has one."""
    with nullcontext() if torch.cuda.is_available() else fake_cuda(capability):
        yield
