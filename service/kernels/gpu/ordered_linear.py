"""Linear layers on a GPU whose tile never depends on the number of rows: a row has the same bits alone and in any batch.

Libraries choose tiles, and with them the order of sums, by shape. It does not know layers. Invariant: every output is summed over the
inputs upwards by one program, INPUTS at a time, in float32; nothing is split along the inputs.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from service.kernels.gpu.compiling import kernel
from service.kernels.linear import PlainLinear


class OrderedTile(NamedTuple):
    """Rows, outputs and inputs of a tile, its warps and stages: by type alone, since they are part of the arithmetic."""

    rows: int
    outputs: int
    inputs: int
    warps: int
    stages: int


def ordered_tile(dtype: torch.dtype) -> OrderedTile:
    """64 rows are the fewest that Hopper multiplies by warp group; 64 outputs leave a small batch enough programs to read weights with."""
    return OrderedTile(32, 32, 32, 4, 2) if dtype == torch.float32 else OrderedTile(64, 64, 64, 4, 4)


@kernel
def ordered_kernel(
    p_x, p_weight, p_bias, p_out, rows, outputs, inputs, stride_row, stride_output,
    ROWS: tl.constexpr, OUTPUTS: tl.constexpr, INPUTS: tl.constexpr, BIAS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program owns a tile [ROWS, OUTPUTS] of x [rows, inputs] times weight [outputs, inputs] transposed and loops over the inputs; the
    sums stay in registers.
    """
    o_row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    o_output, o_input = tl.program_id(1) * OUTPUTS + tl.arange(0, OUTPUTS), tl.arange(0, INPUTS)
    m_row, m_output = o_row < rows, o_output < outputs
    p_rows = p_x + o_row.to(tl.int64)[:, None] * stride_row
    p_outputs = p_weight + o_output.to(tl.int64)[:, None] * stride_output
    b_sum = tl.zeros([ROWS, OUTPUTS], tl.float32)
    for i_from in range(0, inputs, INPUTS):
        m_at = (i_from + o_input < inputs)[None, :]
        b_x = tl.load(p_rows + (i_from + o_input)[None, :], mask=m_row[:, None] & m_at, other=0.0)  # [ROWS, INPUTS]
        b_weight = tl.load(p_outputs + (i_from + o_input)[None, :], mask=m_output[:, None] & m_at, other=0.0)  # [OUTPUTS, INPUTS]
        b_sum = tl.dot(b_x, tl.trans(b_weight), b_sum, input_precision=PRECISION)
    if BIAS:
        b_sum += tl.load(p_bias + o_output, mask=m_output, other=0.0).to(tl.float32)[None, :]
    o_out = o_row.to(tl.int64)[:, None] * outputs + o_output[None, :]
    tl.store(p_out + o_out, b_sum, mask=m_row[:, None] & m_output[None, :])


def ordered_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [T, in] times weight [out, in] of the same type transposed, plus bias [out]: [T, out] in that type.

    2 · T · in · out FLOPs; reads the weight once for each 64 rows. Raises ValueError for shapes or types that do not fit.
    """
    (rows, inputs), outputs = x.shape, weight.shape[0]
    if inputs != weight.shape[1] or x.dtype != weight.dtype or (bias is not None and bias.shape != (outputs,)):
        raise ValueError(f"rows {tuple(x.shape)} {x.dtype} do not fit a weight {tuple(weight.shape)} {weight.dtype}, or its bias")
    x, weight = (tensor if tensor.stride(1) == 1 else tensor.contiguous() for tensor in (x, weight))
    out = x.new_empty(rows, outputs)
    if rows:
        tile = ordered_tile(x.dtype)
        ordered_kernel[(triton.cdiv(rows, tile.rows), triton.cdiv(outputs, tile.outputs))](
            x, weight, bias, out, rows, outputs, inputs, x.stride(0), weight.stride(0),
            ROWS=tile.rows, OUTPUTS=tile.outputs, INPUTS=tile.inputs, BIAS=bias is not None,
            PRECISION="ieee" if x.dtype == torch.float32 else "tf32", num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
    return out


class OrderedLinear(PlainLinear):
    """A weight kept as it is and multiplied by `ordered_linear`."""

    def apply(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x [T, in] -> [T, out] in the type of x."""
        return ordered_linear(x, self._weight, bias)
