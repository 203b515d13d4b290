"""Matrix products with int8 weights on a GPU: activations quantised row by row (W8A8), or left in their type (weight-only).

The integers of W8A8 are summed exactly in int32, so neither tiles nor the batch show in its results. It does not know layers or files.
Invariant: both compute in float32 from the sum on and return the type of x; a row that holds NaN or infinity gives no finite result.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from service.kernels.gpu.compiling import kernel
from service.kernels.gpu.paged_attention import capability
from service.kernels.quantised import QuantisedWeight, TorchQuantisedLinear

# Inputs of a row that one pass of the activation kernel holds.
ROW_VALUES = 4096


class ProductTile(NamedTuple):
    """Rows, outputs and inputs of a tile of the product, its warps and stages."""

    rows: int
    outputs: int
    inputs: int
    warps: int
    stages: int


@kernel
def quantise_kernel(p_x, p_steps, p_scales, inputs, stride_row, BLOCK: tl.constexpr):
    """One program owns one row: its largest value, then its steps −127 … 127; the row is read twice, the second time from the cache."""
    i_row = tl.program_id(0).to(tl.int64)
    largest, odd = 0.0, 0.0
    for i_from in range(0, inputs, BLOCK):
        o_at = i_from + tl.arange(0, BLOCK)
        b_x = tl.load(p_x + i_row * stride_row + o_at, mask=o_at < inputs, other=0.0).to(tl.float32)  # [BLOCK]
        largest = tl.maximum(largest, tl.max(tl.abs(b_x), 0))
        odd += tl.sum(b_x * 0.0, 0)  # NaN as soon as one value is not finite
    b_inverse = tl.math.div_rn(tl.full([1], 127.0, tl.float32), tl.where(largest > 0, largest, 1.0) + tl.zeros([1], tl.float32))
    b_inverse = tl.where((largest > 0) & (odd == 0.0), b_inverse, 0.0)
    for i_from in range(0, inputs, BLOCK):
        o_at = i_from + tl.arange(0, BLOCK)
        b_x = tl.load(p_x + i_row * stride_row + o_at, mask=o_at < inputs, other=0.0).to(tl.float32)
        b_x = tl.where(odd == 0.0, b_x * b_inverse, 0.0)
        b_steps = (b_x + 12582912.0) - 12582912.0  # rounded half to even
        tl.store(p_steps + i_row * inputs + o_at, b_steps.to(tl.int8), mask=o_at < inputs)
    b_scale = tl.math.div_rn(largest + odd + tl.zeros([1], tl.float32), 127.0)
    tl.store(p_scales + i_row + tl.arange(0, 1), b_scale)


@kernel
def product_kernel(
    p_x, p_weight, p_row_scales, p_scales, p_bias, p_out, rows, outputs, inputs, stride_row,
    ROWS: tl.constexpr, OUTPUTS: tl.constexpr, INPUTS: tl.constexpr, EXACT: tl.constexpr, BIAS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program owns a tile [ROWS, OUTPUTS] of x [rows, inputs] times weight [outputs, inputs] transposed and loops over the inputs.

    With EXACT x is int8 and the sum int32; else the weight is widened to the type of x and the sum is float32. Programs that follow each
    other share their outputs' weights.
    """
    o_row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    o_output = tl.program_id(1) * OUTPUTS + tl.arange(0, OUTPUTS)
    o_input = tl.arange(0, INPUTS)
    p_rows = p_x + o_row.to(tl.int64)[:, None] * stride_row
    p_outputs = p_weight + o_output.to(tl.int64)[:, None] * inputs
    b_sum = tl.zeros([ROWS, OUTPUTS], tl.int32 if EXACT else tl.float32)
    for i_from in range(0, inputs, INPUTS):
        o_at = i_from + o_input
        m_at = (o_at < inputs)[None, :]
        b_x = tl.load(p_rows + o_at[None, :], mask=(o_row < rows)[:, None] & m_at, other=0)  # [ROWS, INPUTS]
        b_weight = tl.load(p_outputs + o_at[None, :], mask=(o_output < outputs)[:, None] & m_at, other=0)  # [OUTPUTS, INPUTS]
        if EXACT:
            b_sum = tl.dot(b_x, tl.trans(b_weight), b_sum, out_dtype=tl.int32)
        else:
            b_sum = tl.dot(b_x, tl.trans(b_weight.to(b_x.dtype)), b_sum, input_precision=PRECISION)
    b_out = b_sum.to(tl.float32)
    b_scale = tl.load(p_scales + o_output, mask=o_output < outputs, other=0.0)[None, :]
    if EXACT:
        b_scale = tl.load(p_row_scales + o_row, mask=o_row < rows, other=0.0)[:, None] * b_scale
    b_out = b_out * b_scale
    if BIAS:
        b_out += tl.load(p_bias + o_output, mask=o_output < outputs, other=0.0).to(tl.float32)[None, :]
    o_out = o_row.to(tl.int64)[:, None] * outputs + o_output[None, :]
    tl.store(p_out + o_out, b_out, mask=(o_row < rows)[:, None] & (o_output < outputs)[None, :])


def product_tile(rows: int, exact: bool, chip: int) -> ProductTile:
    """The tile for a number of rows on sm_`chip`: few rows are bound by reading weights, so narrow tiles give every processor some.

    The widest is what the compile gate finds free of spills.
    """
    if rows <= 32:
        return ProductTile(16 if rows <= 16 else 32, 32, 256 if exact else 128, 4, 4)
    if rows <= 256 or not exact:
        return ProductTile(64, 128, 128 if exact else 64, 4, 3)
    return ProductTile(128, 256 if chip >= 90 else 128, 128, 8, 3)


def quantise_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """(steps int8 [T, in], scales float32 [T]) of x [T, in] whose rows are contiguous: the steps of `quantised.quantise_rows`.

    A row with NaN or infinity gets steps 0 and a scale that is not finite. Moves 3 elements a value, of which one from the cache.
    """
    rows, inputs = x.shape
    steps = torch.empty((rows, inputs), dtype=torch.int8, device=x.device)
    scales = torch.empty(rows, dtype=torch.float32, device=x.device)
    if rows:
        block = min(ROW_VALUES, max(triton.next_power_of_2(inputs), 16))
        # Without fusion: a fused multiply-add would round the exact product, and not the float32 that the reference rounds.
        options = {"BLOCK": block, "num_warps": 8 if block >= 2048 else 4, "enable_fp_fusion": False}
        quantise_kernel[(rows,)](x, steps, scales, inputs, x.stride(0), **options)
    return steps, scales


def _product(x: Tensor, row_scales: Tensor | None, weight: Tensor, scales: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    (rows, inputs), outputs, exact = x.shape, weight.shape[0], row_scales is not None
    out = torch.empty((rows, outputs), dtype=dtype, device=x.device)
    if rows:
        tile = product_tile(rows, exact, capability(x.device))
        product_kernel[(triton.cdiv(rows, tile.rows), triton.cdiv(outputs, tile.outputs))](
            x, weight, row_scales, scales, bias, out, rows, outputs, inputs, x.stride(0),
            ROWS=tile.rows, OUTPUTS=tile.outputs, INPUTS=tile.inputs, EXACT=exact, BIAS=bias is not None,
            PRECISION="ieee" if x.dtype == torch.float32 else "tf32", num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
    return out


def int8_linear(x: Tensor, weight: Tensor, scales: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [T, in], its rows quantised to int8, times weight int8 [out, in] with scales float32 [out], plus bias: [T, out] in x's type.

    2 · T · in · out integer operations; reads the weight once for each 128 rows.
    """
    steps, row_scales = quantise_rows(x if x.stride(1) == 1 else x.contiguous())
    return _product(steps, row_scales, weight, scales, bias, x.dtype)


def weight_only_linear(x: Tensor, weight: Tensor, scales: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [T, in] in its own type times weight int8 [out, in] with scales float32 [out], plus bias: [T, out]; sums in float32."""
    return _product(x if x.stride(1) == 1 else x.contiguous(), None, weight, scales, bias, x.dtype)


class GpuQuantisedLinear(TorchQuantisedLinear):
    """A quantised weight on a GPU: int8 through the integer product above; int4 widened piece by piece, as torch does it."""

    def __init__(self, weight: QuantisedWeight) -> None:
        """Move a weight to the GPU where there is one; where kernels are interpreted it stays."""
        device = "cuda" if torch.cuda.is_available() else weight.values.device
        values, scales = weight.values.to(device), weight.scales.to(device)
        super().__init__(QuantisedWeight(weight.kind, weight.inputs, values, scales))

    def apply(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x [T, in] -> [T, out] in the type of x."""
        if self._weight.kind != "int8":
            return super().apply(x, bias)
        return int8_linear(x, self._weight.values, self._weight.scales, bias)
