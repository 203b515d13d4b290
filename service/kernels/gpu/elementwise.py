"""Norms, rotary embedding, SwiGLU and the head gate on a GPU: one pass over memory each, computed in float32.

All are bound by memory: a call moves each input and output once (figures in each docstring, in elements of the tensor's type). It does not
know layers. Invariant: results have the type of the input x, no argument is changed, and rows never influence each other.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from service.kernels.gpu.compiling import kernel

# Values that one program holds at once, unless a single row is longer.
TILE_VALUES = 4096


@kernel
def norm_kernel(
    p_x, p_residual, p_weight, p_out, p_total, rows, heads, eps, stride_outer, stride_inner,
    DIM: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, ADD: tl.constexpr,
):  # fmt: skip
    """One program owns ROWS rows of DIM values, row r at (r // heads) · stride_outer + (r % heads) · stride_inner; all stay in registers.

    With ADD the residual [rows, DIM] is added first and the sum, rounded to its type, is stored in p_total and normed.
    """
    o_rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    o_dim = tl.arange(0, BLOCK)
    m_values = (o_rows < rows)[:, None] & (o_dim < DIM)[None, :]
    o_in = (o_rows // heads * stride_outer + o_rows % heads * stride_inner)[:, None] + o_dim[None, :]
    o_out = o_rows[:, None] * DIM + o_dim[None, :]
    b_x = tl.load(p_x + o_in, mask=m_values, other=0.0).to(tl.float32)  # [ROWS, BLOCK]
    if ADD:
        b_x = b_x + tl.load(p_residual + o_out, mask=m_values, other=0.0).to(tl.float32)
        b_rounded = b_x.to(p_total.dtype.element_ty)
        tl.store(p_total + o_out, b_rounded, mask=m_values)
        b_x = b_rounded.to(tl.float32)
    b_inverse = 1.0 / tl.sqrt(tl.sum(b_x * b_x, 1) / DIM + eps)
    b_weight = tl.load(p_weight + o_dim, mask=o_dim < DIM, other=0.0).to(tl.float32)
    tl.store(p_out + o_out, b_x * b_inverse[:, None] * b_weight[None, :], mask=m_values)


@kernel
def rotate_kernel(
    p_x, p_cos, p_sin, p_out, rows, heads, stride_token, stride_head,
    DIM: tl.constexpr, HALF: tl.constexpr, BLOCK_HALF: tl.constexpr, BLOCK_REST: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """One program owns ROWS (token, head) rows; pairs (i, i + HALF) turn, dimensions from 2 · HALF on are copied."""
    o_rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    o_token, o_pair = o_rows // heads, tl.arange(0, BLOCK_HALF)
    m_pairs = (o_rows < rows)[:, None] & (o_pair < HALF)[None, :]
    o_in, o_out = (o_token * stride_token + o_rows % heads * stride_head)[:, None], o_rows[:, None] * DIM
    b_cos = tl.load(p_cos + o_token[:, None] * HALF + o_pair[None, :], mask=m_pairs, other=0.0).to(tl.float32)
    b_sin = tl.load(p_sin + o_token[:, None] * HALF + o_pair[None, :], mask=m_pairs, other=0.0).to(tl.float32)
    b_first = tl.load(p_x + o_in + o_pair[None, :], mask=m_pairs, other=0.0).to(tl.float32)  # [ROWS, BLOCK_HALF]
    b_second = tl.load(p_x + o_in + o_pair[None, :] + HALF, mask=m_pairs, other=0.0).to(tl.float32)
    tl.store(p_out + o_out + o_pair[None, :], b_first * b_cos - b_second * b_sin, mask=m_pairs)
    tl.store(p_out + o_out + o_pair[None, :] + HALF, b_second * b_cos + b_first * b_sin, mask=m_pairs)
    if DIM > 2 * HALF:
        o_rest = 2 * HALF + tl.arange(0, BLOCK_REST)
        m_rest = (o_rows < rows)[:, None] & (o_rest < DIM)[None, :]
        tl.store(p_out + o_out + o_rest[None, :], tl.load(p_x + o_in + o_rest[None, :], mask=m_rest), mask=m_rest)


@kernel
def swiglu_kernel(p_gate_up, p_out, hidden, stride_row, BLOCK: tl.constexpr):
    """One program owns BLOCK outputs of one row."""
    i_row, o_at = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    m_at = o_at < hidden
    b_gate = tl.load(p_gate_up + i_row * stride_row + o_at, mask=m_at, other=0.0).to(tl.float32)  # [BLOCK]
    b_up = tl.load(p_gate_up + i_row * stride_row + hidden + o_at, mask=m_at, other=0.0).to(tl.float32)
    tl.store(p_out + i_row * hidden + o_at, b_gate * tl.sigmoid(b_gate) * b_up, mask=m_at)


@kernel
def gate_kernel(p_x, p_logits, p_out, rows, DIM: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr):
    """One program owns ROWS (token, head) rows of DIM values and one logit each."""
    o_rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    o_dim = tl.arange(0, BLOCK)
    m_values = (o_rows < rows)[:, None] & (o_dim < DIM)[None, :]
    o_values = o_rows[:, None] * DIM + o_dim[None, :]
    b_gate = tl.sigmoid(tl.load(p_logits + o_rows, mask=o_rows < rows, other=0.0).to(tl.float32))
    b_x = tl.load(p_x + o_values, mask=m_values, other=0.0).to(tl.float32)  # [ROWS, BLOCK]
    tl.store(p_out + o_values, b_x * b_gate[:, None], mask=m_values)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Root mean square norm over the last dimension: x [..., D], weight [D] -> [..., D]. Moves 2 elements a value.

    x of two or three dimensions may be a view whose last dimension is contiguous; else it is copied first.
    """
    rows, heads, strides = _rows_of(x)
    x = x if strides else x.contiguous()
    outer, inner = strides or (heads * x.shape[-1], x.shape[-1])
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _norm(x, None, weight, out, None, (rows, heads, eps, outer, inner))
    return out


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(rms_norm(x + residual), x + residual), all [..., D]; the sum is rounded to the type of x, then normed. Moves 4 elements a value."""
    x, residual = x.contiguous(), residual.contiguous()
    out, total = torch.empty_like(x), torch.empty_like(x)
    size = x.shape[-1]
    _norm(x, residual, weight, out, total, (x.numel() // size, 1, eps, size, size))
    return out, total


def _norm(
    x: Tensor, residual: Tensor | None, weight: Tensor, out: Tensor, total: Tensor | None, numbers: tuple[int, int, float, int, int]
) -> None:
    rows, size = numbers[0], x.shape[-1]
    if not rows:
        return
    block = triton.next_power_of_2(size)
    together = _rows_together(block)
    norm_kernel[(triton.cdiv(rows, together),)](
        x, residual, weight, out, total, *numbers,
        DIM=size, BLOCK=block, ROWS=together, ADD=residual is not None, num_warps=_warps(block * together),
    )  # fmt: skip


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding by halves of x [T, H, D], whose last dimension is contiguous; cos and sin [T, rotary_dim / 2]. Moves 2 elements a
    value and the angles once.
    """
    tokens, heads, size = x.shape
    x = x if x.stride(2) == 1 else x.contiguous()
    half = cos.shape[-1]
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if x.numel():
        block = triton.next_power_of_2(half)
        together = _rows_together(block)
        rotate_kernel[(triton.cdiv(tokens * heads, together),)](
            x, cos.contiguous(), sin.contiguous(), out, tokens * heads, heads, x.stride(0), x.stride(1),
            DIM=size, HALF=half, BLOCK_HALF=block, BLOCK_REST=triton.next_power_of_2(max(size - 2 * half, 1)), ROWS=together,
            num_warps=_warps(block * together),
        )  # fmt: skip
    return out


def apply_rope(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """`rotate` of query [T, Hq, D] and key [T, Hkv, D]."""
    return rotate(query, cos, sin), rotate(key, cos, sin)


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) * up: gate_up [..., 2·hidden] (gate first) -> [..., hidden]. Moves 3 elements an output."""
    gate_up = gate_up.contiguous()
    hidden = gate_up.shape[-1] // 2
    out = torch.empty((*gate_up.shape[:-1], hidden), dtype=gate_up.dtype, device=gate_up.device)
    if out.numel():
        block = min(1024, triton.next_power_of_2(hidden))
        swiglu_kernel[(out.numel() // hidden, triton.cdiv(hidden, block))](gate_up, out, hidden, 2 * hidden, BLOCK=block)
    return out


def head_gate(out: Tensor, gate_logits: Tensor) -> Tensor:
    """Attention output out [T, H, D], each head scaled by sigmoid(gate_logits [T, H]). Moves 2 elements a value."""
    out, gate_logits = out.contiguous(), gate_logits.contiguous()
    gated, rows = torch.empty_like(out), gate_logits.numel()
    if gated.numel():
        block = triton.next_power_of_2(out.shape[2])
        together = _rows_together(block)
        gate_kernel[(triton.cdiv(rows, together),)](
            out, gate_logits, gated, rows, DIM=out.shape[2], BLOCK=block, ROWS=together, num_warps=_warps(block * together)
        )
    return gated


def _rows_of(x: Tensor) -> tuple[int, int, tuple[int, int] | None]:
    """(rows, rows of the inner dimension, strides of outer and inner rows) of x; no strides where rows do not lie like that."""
    heads = x.shape[-2] if x.dim() == 3 else 1
    rows = x.numel() // x.shape[-1]
    if x.stride(-1) != 1 or x.dim() not in (2, 3):
        return rows, heads, None
    return rows, heads, (x.stride(0), x.stride(1) if x.dim() == 3 else 0)


def _rows_together(block: int) -> int:
    return max(1, TILE_VALUES // 4 // block)


def _warps(values: int) -> int:
    return min(8, max(1, values // 512))
