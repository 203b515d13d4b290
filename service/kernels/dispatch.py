"""One table: operation -> implementations with their conditions, best first; `choices.py` chooses, once per process.

Whoever builds a model asks `resolve` and keeps the function: no lookup happens per call, only the count of the call. It does not know
models. Invariant: every implementation of an operation has the same signature, and the condition of the last automatic one always holds.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache, wraps
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from service.kernels import (
    cross_attention,
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
from service.kernels.choices import Dispatch, Implementation, Kernel, Place
from service.kernels.native import attention as native_attention
from service.kernels.native import binding as native
from service.kernels.native import cross_attention as native_cross_attention
from service.kernels.native import decoder as native_decoder
from service.kernels.native import elementwise as native_elementwise
from service.kernels.native import far_store as native_far_store
from service.kernels.native import linear as native_linear
from service.kernels.native import quantised as native_quantised
from service.kernels.native import window_sparse as native_window_sparse


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


def _native_is_faster(place: Place) -> str | None:
    return _native(place) or native_linear.slower(place.dtype)


def _native_layers(place: Place) -> str | None:
    other = next((name for name in WHOLE_LAYERS if _PROCESS.forced(name) not in (None, "native")), None)
    return _native_quantised(place) or (f"{other} is forced to {_PROCESS.forced(other)}" if other else None)


@cache
def _triton() -> bool:
    return find_spec("triton") is not None


def _triton_gpu(place: Place) -> str | None:
    if place.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return f"it computes bfloat16, float16 and float32 only, not {place.dtype}"
    if place.device != "cuda":
        return f"it runs on a GPU only, not on {place.device}"
    return None if _triton() else "triton is not installed"


def _gpu(like: Kernel, room: str, name: str = "", *, label: str = "triton", steady: bool = True) -> Implementation:
    """What is called like that (or `name`) in service.kernels.gpu.<room>, imported at its first call: triton may be missing."""

    @cache
    def found() -> Kernel:
        kernel: Kernel = getattr(import_module(f"service.kernels.gpu.{room}"), name or like.__name__)
        return kernel

    @wraps(like)
    def call(*args: Any, **kwargs: Any) -> Any:
        return found()(*args, **kwargs)

    return Implementation(label, call, _triton_gpu, steady)


def _needs_no_plan(place: Place) -> str | None:
    return _native(place) if place.device == "cpu" else None


def plan_decode(context_lengths: Tensor, *, most_tokens: int, window: int | None) -> None:
    """None: the kernels read lengths on the host, so a step cannot be recorded."""
    del context_lengths, most_tokens, window


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


# What the call for all layers computes in the place of these.
WHOLE_LAYERS = ("rms_norm", "add_rms_norm", "rotate", "swiglu", "head_gate", "write_kv", "paged_attention", "pack_quantised")

TABLE: Mapping[str, tuple[Implementation, ...]] = {
    "rms_norm": (
        Implementation("native", native_elementwise.rms_norm, _native, steady=True),
        _gpu(reference.rms_norm, "elementwise"),
        Implementation("torch", elementwise.rms_norm, _anywhere),
        Implementation("reference", reference.rms_norm, _anywhere),
    ),
    "add_rms_norm": (
        Implementation("native", native_elementwise.add_rms_norm, _native, steady=True),
        _gpu(reference.add_rms_norm, "elementwise"),
        Implementation("torch", elementwise.add_rms_norm, _anywhere),
        Implementation("reference", reference.add_rms_norm, _anywhere),
    ),
    "rotate": (
        Implementation("native", native_elementwise.rotate, _native, steady=True),
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
        Implementation("native", native_elementwise.swiglu, _native, steady=True),
        _gpu(reference.swiglu, "elementwise"),
        Implementation("torch", elementwise.swiglu, _anywhere),
        Implementation("reference", reference.swiglu, _anywhere),
    ),
    "head_gate": (
        Implementation("native", native_elementwise.head_gate, _native, steady=True),
        _gpu(reference.head_gate, "elementwise"),
        Implementation("torch", elementwise.head_gate, _anywhere),
        Implementation("reference", reference.head_gate, _anywhere),
    ),
    "attend_images": (
        _gpu(cross_attention.attend_images, "cross_attention"),
        Implementation("torch", cross_attention.attend_images, _anywhere),
        Implementation("native", native_cross_attention.attend_images, _native, steady=True),
    ),
    "write_kv": (
        _gpu(reference.write_kv, "kv_store"),
        Implementation("torch", kv_store.write_kv, _anywhere, steady=True),
        Implementation("reference", reference.write_kv, _anywhere),
    ),
    # Rotation and K/V write in one; where there is none, two calls.
    "rotate_write": (
        _gpu(reference.rotate_write, "kv_store"),
        Implementation("separate", reference.rotate_write, _anywhere, steady=True),
    ),
    "paged_attention": (
        Implementation("native", native_attention.paged_attention, _native, steady=True),
        Implementation("cpu", paged_attention.paged_attention, _on_cpu),
        _gpu(reference.paged_attention, "paged_attention"),
        Implementation("reference", reference.paged_attention, _anywhere),
    ),
    "demote": (
        Implementation("native", native_far_store.demote, _native, steady=True),
        _gpu(reference_sparse.demote, "far_store"),
        Implementation("torch", far_store.demote, _anywhere, steady=True),
        Implementation("reference", reference_sparse.demote, _anywhere),
    ),
    "choose_far": (
        Implementation("native", native_window_sparse.choose_far, _native, steady=True),
        Implementation("cpu", far_store.choose_far, _on_cpu),
        _gpu(reference_sparse.choose_far, "choose_far"),
        Implementation("reference", reference_sparse.choose_far, _anywhere),
    ),
    "window_sparse_attention": (
        Implementation("native", native_window_sparse.window_sparse_attention, _native, steady=True),
        Implementation("cpu", window_sparse.window_sparse_attention, _on_cpu),
        _gpu(reference_sparse.window_sparse_attention, "window_sparse"),
        Implementation("reference", reference_sparse.window_sparse_attention, _anywhere),
    ),
    "plan_attention": (
        _gpu(paged_attention.plan_attention, "paged_attention", steady=False),
        _gpu(paged_attention.plan_attention, "paged_attention", "plan_tiles", label="tiles"),
        Implementation("none", _no_plan, _needs_no_plan, steady=True),
        Implementation("cpu", paged_attention.plan_attention, _on_cpu),
    ),
    "plan_sparse": (
        _gpu(window_sparse.plan_sparse, "window_sparse", steady=False),
        _gpu(window_sparse.plan_sparse, "window_sparse", "plan_sparse_tiles", label="tiles"),
        Implementation("none", _no_plan, _needs_no_plan, steady=True),
        Implementation("cpu", window_sparse.plan_sparse, _on_cpu),
    ),
    # What a step that is recorded in a CUDA graph is told; none where the kernels read lengths on the host.
    "plan_decode": (
        _gpu(plan_decode, "decode_plan", steady=False),
        _gpu(plan_decode, "decode_plan", "plan_decode_tiles", label="tiles"),
        Implementation("none", plan_decode, _anywhere, steady=True),
    ),
    "sample": (
        _gpu(reference_sampling.sample, "sampling"),
        Implementation("reference", reference_sampling.sample, _anywhere),
    ),
    "linear": (
        Implementation("onednn", linear.onednn_linear, _onednn_float32),
        Implementation("widened", linear.widened_linear, _onednn_sixteen_bits),
        Implementation("torch", linear.torch_linear, _anywhere),
        Implementation("ordered", native_linear.ordered_linear, _native, steady=True),
        _gpu(reference.linear, "ordered_linear", "ordered_linear", label="triton_ordered"),
        Implementation("reference", reference.linear, _anywhere),
    ),
    "decoder_layers": (
        Implementation("native", native_decoder.decoder_layers, _native_layers, steady=True),
        Implementation("separate", native_decoder.layer_by_layer, _anywhere, steady=True),
    ),
    "pack_linear": (
        Implementation("ordered", native_linear.OrderedLinear, _native_is_faster, steady=True),
        Implementation("onednn", linear.PackedLinear, _onednn_float32),
        Implementation("widened", linear.WidenedLinear, _onednn_sixteen_bits),
        Implementation("plain", linear.PlainLinear, _anywhere),
        Implementation("ordered", native_linear.OrderedLinear, _native, steady=True),
        _gpu(linear.PlainLinear, "ordered_linear", "OrderedLinear", label="triton_ordered"),
    ),
    "pack_small_linear": (
        Implementation("ordered", native_linear.OrderedLinear, _native_is_faster, steady=True),
        Implementation("plain", linear.PlainLinear, _anywhere),
        Implementation("ordered", native_linear.OrderedLinear, _native, steady=True),
        _gpu(linear.PlainLinear, "ordered_linear", "OrderedLinear", label="triton_ordered"),
    ),
    "pack_quantised": (
        Implementation("native", native_quantised.NativeQuantisedLinear, _native_quantised, steady=True),
        Implementation("torch", quantised.TorchQuantisedLinear, _on_cpu),
        _gpu(quantised.TorchQuantisedLinear, "int8_linear", "GpuQuantisedLinear"),
        Implementation("reference", quantised.ReferenceQuantisedLinear, _anywhere),
    ),
}


_PROCESS = Dispatch(TABLE)
resolve = _PROCESS.resolve
force = _PROCESS.force
require_steady = _PROCESS.require_steady
unsteady = _PROCESS.unsteady
chosen = _PROCESS.chosen
passed_over = _PROCESS.passed_over
chosen_name = _PROCESS.chosen_name
take_counts = _PROCESS.take_counts
apart = _PROCESS.apart
again = _PROCESS.again
