"""Quantised weights of linear layers and embeddings: how they are made, and their products in plain torch.

int8: one symmetric scale for each output. int4: one symmetric float16 scale for each output and GROUP inputs, chosen for the least squared
error of the weights (`calibrated.py` looks at their inputs, too). Activations are quantised to int8 on the way, one scale a row. It does
not know layers or files. Invariants: a product is exact in its integers, so that every implementation gives the same up to float32
rounding, and a row's result does not depend on the rows beside it; a row that holds NaN or infinity gives no finite result.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from service.kernels import reference

GROUP = 32
# Divisors tried for a group's scale: its largest value lands on −8 or, clipped, beyond.
DIVISORS = (-8.0, -7.5, -7.0, -6.5)
# Outputs unpacked or quantised at once: bounds what is held beside the weights.
OUTPUTS = 512
# Products of int8 are summed in int32: 255 · 127 · 65,536 still fits.
MOST_INPUTS = 1 << 16


@dataclass(frozen=True, slots=True)
class QuantisedWeight:
    """A weight [outputs, inputs] in `kind` int8 or int4, in the order of its rows; what the disk cache keeps.

    int8: values int8 [outputs, inputs], scales float32 [outputs]. int4: values uint8 [outputs, groups · GROUP / 2] where byte j holds
    inputs 2j (low half) and 2j + 1, each + 8, and scales float16 [outputs, groups]; inputs past the end are 0.
    """

    kind: str
    inputs: int
    values: Tensor
    scales: Tensor

    @property
    def outputs(self) -> int:
        """Rows of the weight."""
        return self.values.shape[0]


def stored_layout(kind: str, outputs: int, inputs: int) -> tuple[tuple[torch.dtype, tuple[int, ...]], tuple[torch.dtype, tuple[int, ...]]]:
    """(dtype, shape) of the values and of the scales of a quantised weight."""
    if kind == "int8":
        return (torch.int8, (outputs, inputs)), (torch.float32, (outputs,))
    groups = -(-inputs // GROUP)
    return (torch.uint8, (outputs, groups * GROUP // 2)), (torch.float16, (outputs, groups))


def quantise_weight(weight: Tensor, kind: str) -> QuantisedWeight:
    """Quantise a CPU weight [outputs, inputs] of finite values to `kind`. Raises ValueError for another kind or too many inputs."""
    outputs, inputs = weight.shape
    require_inputs(inputs, kind)
    (value_type, value_shape), (scale_type, scale_shape) = stored_layout(kind, outputs, inputs)
    values, scales = torch.empty(value_shape, dtype=value_type), torch.empty(scale_shape, dtype=scale_type)
    for start in range(0, outputs, OUTPUTS):
        rows = slice(start, start + OUTPUTS)
        values[rows], scales[rows] = _QUANTISERS[kind](weight[rows].detach().float())
    return QuantisedWeight(kind, inputs, values, scales)


def require_inputs(inputs: int, kind: str) -> None:
    """Raise ValueError where a weight of so many inputs cannot be quantised to `kind`."""
    if kind not in _QUANTISERS or inputs > MOST_INPUTS:
        raise ValueError(f"a weight of {inputs} inputs cannot be quantised to {kind!r}: int8 and int4 up to {MOST_INPUTS} inputs can")


def _to_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    scales = weight.abs().amax(dim=1) / 127
    divisors = torch.where(scales > 0, scales, 1.0)
    return (weight / divisors[:, None]).round_().clamp_(-127, 127).to(torch.int8), scales


def _to_int4(weight: Tensor) -> tuple[Tensor, Tensor]:
    groups = -(-weight.shape[1] // GROUP)
    padded = torch.nn.functional.pad(weight, (0, groups * GROUP - weight.shape[1])).view(len(weight), groups, GROUP)
    steps, scales = fit_int4(padded)
    return pack_int4(steps.view(len(weight), -1)), scales.squeeze(2)


def fit_int4(groups: Tensor) -> tuple[Tensor, Tensor]:
    """Steps −8 … 7 [..., GROUP] and scales float16 [..., 1] of weights float32 [..., GROUP].

    Of the scales that DIVISORS give, refined by least squares, the one with the smallest squared error in float16.
    """
    peak = groups.gather(-1, groups.abs().argmax(dim=-1, keepdim=True))
    best = torch.full_like(peak, float("inf"))
    values, scales = torch.zeros_like(groups), torch.zeros_like(peak)
    for divisor in DIVISORS:
        scale = peak / divisor
        steps = (groups / torch.where(scale == 0, 1.0, scale)).round_().clamp_(-8, 7)
        fitted = (groups * steps).sum(-1, keepdim=True) / steps.square().sum(-1, keepdim=True).clamp_(min=1.0)
        fitted = fitted.to(torch.float16).float()
        error = (steps * fitted - groups).square_().sum(-1, keepdim=True)
        better = error < best
        best = torch.where(better, error, best)
        values, scales = torch.where(better, steps, values), torch.where(better, fitted, scales)
    return values, scales.to(torch.float16)


def pack_int4(steps: Tensor) -> Tensor:
    """Steps −8 … 7 [rows, even] as pairs uint8 [rows, half], the first in the low half."""
    codes = (steps + 8).to(torch.uint8).view(len(steps), -1, 2)
    return codes[..., 0] | codes[..., 1] << 4


_QUANTISERS = {"int8": _to_int8, "int4": _to_int4}


def dequantise(weight: QuantisedWeight, rows: Tensor | slice) -> Tensor:
    """Some rows of the weight in float32, [rows, inputs]."""
    values, scales = weight.values[rows], weight.scales[rows].float()
    if weight.kind == "int8":
        return values.float() * scales[:, None]
    return (unpack_int4(values).view(len(values), -1, GROUP) * scales[:, :, None]).view(len(values), -1)[:, : weight.inputs]


def unpack_int4(values: Tensor) -> Tensor:
    """Steps −8 … 7 in float32, [rows, inputs padded], from pairs uint8 [rows, …]."""
    return torch.stack((values & 15, values >> 4), dim=-1).view(len(values), -1).float().sub_(8)


def quantise_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """(whole numbers −127 … 127 in the type of x [T, inputs], scales [T, 1]); a row with NaN or infinity has such a scale."""
    largest = x.abs().amax(dim=1, keepdim=True)
    # Not 127 / largest: torch makes that a reciprocal times 127, which rounds twice.
    inverse = torch.where(largest > 0, torch.full_like(largest, 127.0) / largest, 0.0)
    return (x * inverse).round_(), largest / 127


@cache
def exact_integer_products() -> bool:
    """Whether torch's product of int8 is exact on this CPU.

    Where x86 has no dot products of bytes (VNNI), libraries add pairs of products in 16 bits, and large ones saturate.
    """
    counts = (1, 4, 32)
    weight = torch.full((64, 64), 127, dtype=torch.int8)
    found = (torch._int_mm(torch.full((rows, 64), 127, dtype=torch.int8), weight) for rows in counts)
    return all(bool((product == 64 * 127 * 127).all()) for product in found)


class TorchQuantisedLinear:
    """A quantised weight kept in the order of its rows: int8 through torch's own integer product where that is exact, all else widened
    piece by piece.
    """

    def __init__(self, weight: QuantisedWeight) -> None:
        self._weight = weight
        self.outputs, self.inputs = weight.outputs, weight.inputs

    @property
    def bytes(self) -> int:
        """Bytes of values and scales."""
        return self._weight.values.nbytes + self._weight.scales.nbytes

    def apply(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x [T, in] -> [T, out] in the type of x, computed in float32."""
        steps, row_scales = quantise_rows(x.float())
        if self._weight.kind == "int8" and exact_integer_products():
            # A row that is not finite has garbage for steps; its scale makes the result not finite again.
            whole = torch._int_mm(steps.nan_to_num_(0.0, 0.0, 0.0).to(torch.int8), self._weight.values.t())
            out = whole.float() * (row_scales * self._weight.scales)
        else:
            out = torch.cat([steps @ piece.t() for piece in self._pieces()], dim=1) * row_scales
        return (out if bias is None else out + bias).to(x.dtype)

    def _pieces(self) -> Iterator[Tensor]:
        for start in range(0, self.outputs, OUTPUTS):
            yield dequantise(self._weight, slice(start, start + OUTPUTS))

    def rows(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        """Rows ids [T] of the weight, [T, in] in `dtype`."""
        return dequantise(self._weight, ids).to(dtype)


class ReferenceQuantisedLinear(TorchQuantisedLinear):
    """The same weight multiplied as `reference.quantised_linear` says: for every device, slow, and for comparison."""

    def apply(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x [T, in] -> [T, out] in the type of x, computed in float32."""
        weight, wide = self._weight, x.float()
        if weight.kind == "int8":
            steps, scales = weight.values, weight.scales[:, None]
        else:
            steps, scales = unpack_int4(weight.values), weight.scales
            wide = torch.nn.functional.pad(wide, (0, steps.shape[1] - self.inputs))
        return reference.quantised_linear(wide, steps, scales, bias).to(x.dtype)
