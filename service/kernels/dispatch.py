"""One table: operation -> implementations with their conditions, best first; the choice is made once per process, recorded, forceable.

Whoever builds a model asks `resolve` and keeps the function: no lookup happens per call, only the count of the call. It does not know
models; every implementation of an operation has the same signature. Invariant: an automatic choice falls back to the next one whose
condition holds, and the last one always does; a forced choice that cannot hold raises.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, wraps
from importlib import import_module
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch

from service.kernels import (
    elementwise,
    far_store,
    kv_store,
    linear,
    paged_attention,
    quantised,
    reference,
    reference_sampling,
    reference_sparse,
    window_sparse,
)
from service.kernels.native import attention as native_attention
from service.kernels.native import binding as native
from service.kernels.native import elementwise as native_elementwise
from service.kernels.native import quantised as native_quantised
from service.kernels.native import window_sparse as native_window_sparse

Kernel = Callable[..., Any]
Condition = Callable[["Place"], str | None]


class Place(NamedTuple):
    """Where an operation runs: device type (`cpu`, `cuda`) and the type of its activations."""

    device: str
    dtype: torch.dtype


class DispatchError(ValueError):
    """A forced implementation is unknown or its condition does not hold here."""


@dataclass(frozen=True, slots=True)
class Implementation:
    """One way to compute an operation; `refuses` says why it cannot be used in a place, or None."""

    name: str
    kernel: Kernel
    refuses: Condition


def _anywhere(place: Place) -> str | None:
    return None


def _on_cpu(place: Place) -> str | None:
    return None if place.device == "cpu" else f"it runs on a CPU only, not on {place.device}"


def _native(place: Place) -> str | None:
    if place.dtype not in native.ELEMENTS:
        return f"it computes float32, bfloat16 and float16 only, not {place.dtype}"
    return _on_cpu(place) or native.absent()


def _native_quantised(place: Place) -> str | None:
    return _on_cpu(place) or native_quantised.unsupported()


@cache
def _triton() -> bool:
    return find_spec("triton") is not None


def _triton_gpu(place: Place) -> str | None:
    if place.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return f"it computes bfloat16, float16 and float32 only, not {place.dtype}"
    if place.device != "cuda":
        return f"it runs on a GPU only, not on {place.device}"
    return None if _triton() else "triton is not installed"


def _gpu(like: Kernel, room: str, name: str = "") -> Implementation:
    """What is called like that (or `name`) in service.kernels.gpu.<room>, imported at its first call: triton may be missing."""

    @cache
    def found() -> Kernel:
        kernel: Kernel = getattr(import_module(f"service.kernels.gpu.{room}"), name or like.__name__)
        return kernel

    @wraps(like)
    def call(*args: Any, **kwargs: Any) -> Any:
        return found()(*args, **kwargs)

    return Implementation("triton", call, _triton_gpu)


def _needs_no_plan(place: Place) -> str | None:
    return _native(place) if place.device == "cpu" else None


def _no_plan(*tables: Any, **rule: Any) -> None:
    """What a step's attention is told beyond its tables: nothing, where the kernel reads the tables itself."""
    del tables, rule


@cache
def _onednn() -> bool:
    return linear.onednn_available()


def _onednn_float32(place: Place) -> str | None:
    if place.dtype != torch.float32:
        return f"it computes float32 only, not {place.dtype}"
    return _on_cpu(place) or (None if _onednn() else "this torch has no oneDNN linear")


def _onednn_sixteen_bits(place: Place) -> str | None:
    if place.dtype not in (torch.bfloat16, torch.float16):
        return f"it computes 16-bit types only, not {place.dtype}"
    if place.dtype == torch.bfloat16 and linear.computes_bfloat16():
        return "this CPU multiplies bfloat16 itself, which takes half the time"
    return _on_cpu(place) or (None if _onednn() else "this torch has no oneDNN linear")


TABLE: Mapping[str, tuple[Implementation, ...]] = {
    "rms_norm": (
        Implementation("native", native_elementwise.rms_norm, _native),
        _gpu(reference.rms_norm, "elementwise"),
        Implementation("torch", elementwise.rms_norm, _anywhere),
        Implementation("reference", reference.rms_norm, _anywhere),
    ),
    "add_rms_norm": (
        Implementation("native", native_elementwise.add_rms_norm, _native),
        _gpu(reference.add_rms_norm, "elementwise"),
        Implementation("torch", elementwise.add_rms_norm, _anywhere),
        Implementation("reference", reference.add_rms_norm, _anywhere),
    ),
    "rotate": (
        Implementation("native", native_elementwise.rotate, _native),
        _gpu(reference.rotate, "elementwise"),
        Implementation("torch", elementwise.rotate, _anywhere),
        Implementation("reference", reference.rotate, _anywhere),
    ),
    "apply_rope": (
        _gpu(reference.apply_rope, "elementwise"),
        Implementation("torch", elementwise.apply_rope, _anywhere),
        Implementation("reference", reference.apply_rope, _anywhere),
    ),
    "swiglu": (
        Implementation("native", native_elementwise.swiglu, _native),
        _gpu(reference.swiglu, "elementwise"),
        Implementation("torch", elementwise.swiglu, _anywhere),
        Implementation("reference", reference.swiglu, _anywhere),
    ),
    "head_gate": (
        _gpu(reference.head_gate, "elementwise"),
        Implementation("torch", elementwise.head_gate, _anywhere),
        Implementation("reference", reference.head_gate, _anywhere),
    ),
    "write_kv": (
        _gpu(reference.write_kv, "kv_store"),
        Implementation("torch", kv_store.write_kv, _anywhere),
        Implementation("reference", reference.write_kv, _anywhere),
    ),
    "paged_attention": (
        Implementation("native", native_attention.paged_attention, _native),
        Implementation("cpu", paged_attention.paged_attention, _on_cpu),
        _gpu(reference.paged_attention, "paged_attention"),
        Implementation("reference", reference.paged_attention, _anywhere),
    ),
    "demote": (
        _gpu(reference_sparse.demote, "far_store"),
        Implementation("torch", far_store.demote, _anywhere),
        Implementation("reference", reference_sparse.demote, _anywhere),
    ),
    "choose_far": (
        Implementation("native", native_window_sparse.choose_far, _native),
        Implementation("cpu", far_store.choose_far, _on_cpu),
        _gpu(reference_sparse.choose_far, "far_store"),
        Implementation("reference", reference_sparse.choose_far, _anywhere),
    ),
    "window_sparse_attention": (
        Implementation("native", native_window_sparse.window_sparse_attention, _native),
        Implementation("cpu", window_sparse.window_sparse_attention, _on_cpu),
        _gpu(reference_sparse.window_sparse_attention, "window_sparse"),
        Implementation("reference", reference_sparse.window_sparse_attention, _anywhere),
    ),
    "plan_attention": (
        _gpu(paged_attention.plan_attention, "paged_attention"),
        Implementation("none", _no_plan, _needs_no_plan),
        Implementation("cpu", paged_attention.plan_attention, _on_cpu),
    ),
    "plan_sparse": (
        _gpu(window_sparse.plan_sparse, "window_sparse"),
        Implementation("none", _no_plan, _needs_no_plan),
        Implementation("cpu", window_sparse.plan_sparse, _on_cpu),
    ),
    "sample": (
        _gpu(reference_sampling.sample, "sampling"),
        Implementation("reference", reference_sampling.sample, _anywhere),
    ),
    "linear": (
        Implementation("onednn", linear.onednn_linear, _onednn_float32),
        Implementation("widened", linear.widened_linear, _onednn_sixteen_bits),
        Implementation("torch", linear.torch_linear, _anywhere),
        Implementation("reference", reference.linear, _anywhere),
    ),
    "pack_linear": (
        Implementation("onednn", linear.PackedLinear, _onednn_float32),
        Implementation("widened", linear.WidenedLinear, _onednn_sixteen_bits),
        Implementation("plain", linear.PlainLinear, _anywhere),
    ),
    "pack_quantised": (
        Implementation("native", native_quantised.NativeQuantisedLinear, _native_quantised),
        Implementation("torch", quantised.TorchQuantisedLinear, _on_cpu),
        _gpu(quantised.TorchQuantisedLinear, "int8_linear", "GpuQuantisedLinear"),
        Implementation("reference", quantised.ReferenceQuantisedLinear, _anywhere),
    ),
}


class Counted:
    """A chosen kernel and how often it was called since the counts were last taken."""

    def __init__(self, operation: str, implementation: Implementation) -> None:
        self.operation = operation
        self.name = implementation.name
        self.calls = 0
        kernel = implementation.kernel

        @wraps(kernel)
        def call(*args: Any, **kwargs: Any) -> Any:
            self.calls += 1
            return kernel(*args, **kwargs)

        self.call: Kernel = call


class Dispatch:
    """The choices of one process. The module's `resolve`, `force`, `chosen` and `take_counts` are those of its one instance."""

    def __init__(self, table: Mapping[str, tuple[Implementation, ...]]) -> None:
        self._table = table
        self._forced: dict[str, str] = {}
        self._choices: dict[tuple[str, Place], Counted] = {}

    def resolve(self, operation: str, device: str | torch.device, dtype: torch.dtype) -> Kernel:
        """The function that computes `operation` in that place; the same one each time until another is forced."""
        place = Place(torch.device(device).type, dtype)
        key = (operation, place)
        if key not in self._choices:
            self._choices[key] = Counted(operation, self._choose(operation, place))
        return self._choices[key].call

    def force(self, operation: str, name: str | None) -> None:
        """Use implementation `name` of `operation` from the next `resolve` on, or choose freely again (None)."""
        names = [implementation.name for implementation in self._implementations(operation)]
        if name is None:
            self._forced.pop(operation, None)
        elif name in names:
            self._forced[operation] = name
        else:
            raise DispatchError(f"{operation} has no implementation {name!r}; there are: {', '.join(names)}")
        for key in [key for key in self._choices if key[0] == operation]:
            del self._choices[key]

    def chosen(self) -> dict[str, str]:
        """What was resolved so far, for logs and metrics: `operation[device,dtype]` -> implementation."""
        return {
            f"{operation}[{place.device},{str(place.dtype).removeprefix('torch.')}]": choice.name
            for (operation, place), choice in sorted(self._choices.items(), key=str)
        }

    def passed_over(self) -> dict[str, str]:
        """Better implementations that could not be used, and why: `operation[device,dtype] name` -> sentence; none where forced."""
        found = {}
        for operation, place in sorted(self._choices, key=str):
            chosen_name = self._choices[operation, place].name
            for implementation in () if operation in self._forced else self._implementations(operation):
                if implementation.name == chosen_name:
                    break
                key = f"{operation}[{place.device},{str(place.dtype).removeprefix('torch.')}] {implementation.name}"
                found[key] = implementation.refuses(place) or ""
        return found

    def take_counts(self) -> dict[tuple[str, str], int]:
        """Calls per (operation, implementation) since the last take; only those that were called."""
        counts: dict[tuple[str, str], int] = {}
        for choice in self._choices.values():
            if choice.calls:
                key = (choice.operation, choice.name)
                counts[key] = counts.get(key, 0) + choice.calls
                choice.calls = 0
        return counts

    def _implementations(self, operation: str) -> tuple[Implementation, ...]:
        if operation not in self._table:
            raise DispatchError(f"no operation {operation!r}; there are: {', '.join(self._table)}")
        return self._table[operation]

    def _choose(self, operation: str, place: Place) -> Implementation:
        forced = self._forced.get(operation)
        for implementation in self._implementations(operation):
            if forced is not None and implementation.name != forced:
                continue
            refusal = implementation.refuses(place)
            if refusal is None:
                return implementation
            if forced is not None:
                raise DispatchError(f"{operation}: {forced} was asked for, but {refusal}")
        raise DispatchError(f"{operation}: nothing computes it on {place.device} in {place.dtype}")


_PROCESS = Dispatch(TABLE)
resolve = _PROCESS.resolve
force = _PROCESS.force
chosen = _PROCESS.chosen
passed_over = _PROCESS.passed_over
take_counts = _PROCESS.take_counts
