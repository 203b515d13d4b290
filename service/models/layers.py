"""The small layers of a decoder: linear, embedding, RMSNorm and the SwiGLU feed-forward, over the kernels they are given.

Activations are flat, [tokens, features]; there is no batch dimension. The file does not know attention, caches or files.
Invariant: a module computes with plain differentiable torch until `Decoder.use` hands it the kernels chosen for serving.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from service.kernels import cross_attention, elementwise, fake_quant, linear
from service.kernels.choices import Kernel
from service.kernels.dispatch import resolve
from service.kernels.native.decoder import layer_by_layer
from service.kernels.quantised import QuantisedWeight
from service.types.model_spec import DenseMlp

# Below this size a packed product loses: oneDNN's call costs some 20 µs more than F.linear's (2 cores, AVX2), which computes 512 x 256 at
# 1 row in 15 µs against 37 µs, 1408 x 256 in 53 against 59, and 4096 x 256 in 155 against 139.
PACK_ELEMENTS = 1 << 19


@dataclass(frozen=True, slots=True)
class Kernels:
    """The functions that a decoder calls, with the signatures of `service.kernels`."""

    rms_norm: Kernel
    add_rms_norm: Kernel
    rotate: Kernel
    swiglu: Kernel
    head_gate: Kernel
    linear: Kernel
    attend_images: Kernel
    decoder_layers: Kernel

    @classmethod
    def resolve(cls, device: torch.device | str, dtype: torch.dtype) -> Self:
        """What the dispatch table chooses for serving there; not necessarily differentiable."""
        names = ("rms_norm", "add_rms_norm", "rotate", "swiglu", "head_gate", "linear", "attend_images", "decoder_layers")
        return cls(*(resolve(name, device, dtype) for name in names))


DIFFERENTIABLE = Kernels(
    rms_norm=elementwise.rms_norm,
    add_rms_norm=elementwise.add_rms_norm,
    rotate=elementwise.rotate,
    swiglu=elementwise.swiglu,
    head_gate=elementwise.head_gate,
    linear=linear.torch_linear,
    attend_images=cross_attention.attend_images,
    decoder_layers=layer_by_layer,
)
# The same with every matrix product as int8 would compute it: quantisation-aware training.
FAKE_INT8 = replace(DIFFERENTIABLE, linear=fake_quant.fake_quantised_linear)


class PackedWeight(Protocol):
    """A weight in the form in which it serves."""

    @property
    def bytes(self) -> int:
        """Bytes that it takes."""

    def apply(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x [T, in] -> [T, out]."""


class QuantisedRows(PackedWeight, Protocol):
    """A quantised weight, whose rows can be read too."""

    def rows(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        """Rows ids [T], [T, in] in `dtype`."""


class Computed(nn.Module):
    """A module that computes with `kernels`; differentiable ones until others are set."""

    kernels: Kernels

    def __init__(self) -> None:
        super().__init__()
        self.kernels = DIFFERENTIABLE


class Linear(Computed):
    """y = x · weightᵀ + bias; `weight` [out, in], `bias` [out] or absent. Parameters are left uninitialised."""

    weight: nn.Parameter | None
    bias: nn.Parameter | None

    def __init__(self, inputs: int, outputs: int, bias: bool, device: torch.device | str, dtype: torch.dtype) -> None:
        super().__init__()
        self.packed: PackedWeight | None = None
        self.weight = nn.Parameter(torch.empty(outputs, inputs, device=device, dtype=dtype))
        if bias:
            self.bias = nn.Parameter(torch.empty(outputs, device=device, dtype=dtype))
        else:
            self.register_parameter("bias", None)

    def forward(self, x: Tensor) -> Tensor:
        """[tokens, in] -> [tokens, out]."""
        if self.packed is not None:
            return self.packed.apply(x, self.bias)
        y: Tensor = self.kernels.linear(x, self.weight, self.bias)
        return y

    def pack(self) -> None:
        """Turn the weight into the form that serves fastest: `weight` is None afterwards, and there are no gradients."""
        weight = self.weight
        if weight is not None:
            operation = "pack_linear" if weight.numel() >= PACK_ELEMENTS else "pack_small_linear"
            self.packed = resolve(operation, weight.device, weight.dtype)(weight)
            self.weight = None

    def take(self, weight: QuantisedWeight, device: torch.device, dtype: torch.dtype) -> None:
        """Compute with a quantised weight on activations of `dtype` instead of `weight`, which is None afterwards."""
        self.packed = resolve("pack_quantised", device, dtype)(weight)
        self.weight = None


class Embedding(nn.Module):
    """Rows of `weight` [vocab, dim] by token id, or of a quantised weight that a tied head multiplies with too."""

    weight: nn.Parameter | None

    def __init__(self, rows: int, dim: int, device: torch.device | str, dtype: torch.dtype) -> None:
        super().__init__()
        self.packed: QuantisedRows | None = None
        self._dtype = dtype
        self.weight = nn.Parameter(torch.empty(rows, dim, device=device, dtype=dtype))

    def forward(self, tokens: Tensor) -> Tensor:
        """[tokens] int64 -> [tokens, dim]."""
        if self.packed is not None:
            return self.packed.rows(tokens, self._dtype)
        if self.weight is None:
            raise RuntimeError("the embedding has neither a weight nor a quantised one")
        return F.embedding(tokens, self.weight)

    def take(self, weight: QuantisedWeight, device: torch.device, dtype: torch.dtype) -> None:
        """Read rows of a quantised weight instead of `weight`, which is None afterwards; they come in `dtype`."""
        self.packed, self._dtype = resolve("pack_quantised", device, dtype)(weight), dtype
        self.weight = None


class RmsNorm(Computed):
    """Root mean square norm (Zhang and Sennrich 2019) over the last dimension, with `weight` [dim]."""

    def __init__(self, dim: int, eps: float, device: torch.device | str, dtype: torch.dtype) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(dim, device=device, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        """[..., dim] -> [..., dim] in the dtype of `x`."""
        y: Tensor = self.kernels.rms_norm(x, self.weight, self.eps)
        return y

    def add(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """(norm(x + residual), x + residual): the step between two sublayers."""
        pair: tuple[Tensor, Tensor] = self.kernels.add_rms_norm(x, residual, self.weight, self.eps)
        return pair


class SwigluMlp(Computed):
    """down(silu(gate(x)) * up(x)) with gate and up in one matrix `gate_up` [2 · hidden, dim], gate first."""

    def __init__(self, spec: DenseMlp, dim: int, device: torch.device | str, dtype: torch.dtype) -> None:
        super().__init__()
        self.gate_up = Linear(dim, 2 * spec.hidden, spec.bias, device, dtype)
        self.down = Linear(spec.hidden, dim, spec.bias, device, dtype)

    def forward(self, x: Tensor) -> Tensor:
        """[tokens, dim] -> [tokens, dim]."""
        y: Tensor = self.down(self.kernels.swiglu(self.gate_up(x)))
        return y
