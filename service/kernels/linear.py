"""Linear layers for inference on a CPU: oneDNN's matrix product called directly, over plain or packed weights.

torch routes float32 `F.linear` to MKL, whose product takes 1.2 to 2.6 times as long as oneDNN's between 2 and 64 rows. The oneDNN op reads
a plain weight without a copy (its layout tag stays `ab`, at every row count), so a tied embedding needs no second tensor; a packed weight
(`AB16b64a`) takes a sixth to a third less time at 4 to 32 rows, and one packing serves every row count without being reordered again. The
ops are private to torch: `onednn_available` asks for them, and `F.linear` takes their place where they are absent. It does not know
models. Invariant: all paths compute x · weightᵀ + bias, accumulate in float32 and return the type of x.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from service.kernels.workspace import Workspace

# Fewer rows than this select the plain layout when packing; what packs well for 16 rows is the layout used for all row counts.
PACKING_ROWS = 16
# Up to this many rows torch's own 16-bit product wins: it reads half the bytes; above it is bound by conversions of its own.
SIXTEEN_BIT_ROWS = 4
# Output features of a 16-bit weight widened at once: 2.6 MB at 1280 inputs, which stays in the cache for the product that follows.
WIDENED_OUTPUTS = 512

_WORKSPACE = Workspace()


def onednn_available() -> bool:
    """Whether this torch has the oneDNN ops used here and they give the right answer on this machine."""
    if not torch._C._has_mkldnn:
        return False
    x, weight, bias = torch.ones(2, 8), torch.ones(3, 8), torch.ones(3)
    try:
        plain = onednn_linear(x, weight, bias)
        packed = _product(x, torch.ops.mkldnn._reorder_linear_weight(weight, PACKING_ROWS), bias)
    except (AttributeError, RuntimeError, TypeError):
        return False
    expected = torch.full((2, 3), 9.0)
    return torch.equal(plain, expected) and torch.equal(packed, expected)


def computes_bfloat16() -> bool:
    """Whether this CPU has products of bfloat16 (AVX512_BF16 or AMX), which torch then uses; False where torch cannot say."""
    return _cpu_says("_is_avx512_bf16_supported") or multiplies_tiles()


def multiplies_tiles() -> bool:
    """Whether this CPU has matrix units (AMX); False where torch cannot say."""
    return _cpu_says("_is_amx_tile_supported")


def _cpu_says(name: str) -> bool:
    asked = getattr(torch.cpu, name, None)
    return asked is not None and bool(asked())


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x [T, in] times a plain or packed weight, outside autograd."""
    with torch.no_grad():
        result: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return result


def onednn_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [T, in] times plain contiguous weight [out, in] transposed, plus bias [out]; float32 only, no copy of the weight, no gradient."""
    return _product(x, weight, bias)


def torch_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [..., in] times weight [out, in] transposed, plus bias [out]: torch's own choice, for every type and device, differentiable."""
    return functional.linear(x, weight, bias)


def widened_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [T, in] times a 16-bit weight [out, in] on a CPU without 16-bit units: widened piece by piece to float32, rounded once at the end.

    The weight stays in 16 bits; few rows go to torch's product, which is right and faster there. No gradient.
    """
    if x.shape[0] <= SIXTEEN_BIT_ROWS:
        return torch_linear(x, weight, bias)
    with torch.no_grad():
        wide, offset = x.float(), None if bias is None else bias.float()
        out = x.new_empty(x.shape[0], weight.shape[0])
        for start in range(0, weight.shape[0], WIDENED_OUTPUTS):
            piece = weight[start : start + WIDENED_OUTPUTS]
            buffer = _WORKSPACE.take("weight", *piece.shape).copy_(piece)
            part = _product(wide, buffer, None if offset is None else offset[start : start + WIDENED_OUTPUTS])
            out[:, start : start + WIDENED_OUTPUTS] = part
    return out


class PackedLinear:
    """A float32 weight in oneDNN's own layout, of the size of the plain one; the caller lets the plain one go.

    Packing weights one after the other, dropping each plain one at once, peaks at all weights plus the largest.
    """

    def __init__(self, weight: Tensor) -> None:
        """Pack weight [out, in], a float32 CPU tensor; raises ValueError for another kind."""
        if weight.dtype != torch.float32 or weight.device.type != "cpu":
            raise ValueError(f"only float32 weights on a CPU are packed, not {weight.dtype} on {weight.device}")
        self.outputs, self.inputs = weight.shape
        with torch.no_grad():
            self._packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous(), PACKING_ROWS)

    @property
    def bytes(self) -> int:
        """Bytes that the packed weight takes, padding to whole tiles of 16 x 64 not counted."""
        return self.outputs * self.inputs * 4

    def apply(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x [T, in] float32 -> [T, out]."""
        return _product(x, self._packed, bias)


class PlainLinear:
    """The same face over a weight that stays as it is: where oneDNN's ops are absent, and for 16-bit weights."""

    def __init__(self, weight: Tensor) -> None:
        """Keep weight [out, in], of any type and device."""
        self._weight = weight.detach()
        self.outputs, self.inputs = weight.shape

    @property
    def bytes(self) -> int:
        """Bytes of the weight."""
        return self._weight.nbytes

    def apply(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x [T, in] -> [T, out]."""
        return torch_linear(x, self._weight, bias)


class WidenedLinear(PlainLinear):
    """A 16-bit weight kept as it is and multiplied by `widened_linear`."""

    def apply(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x [T, in] -> [T, out]."""
        return widened_linear(x, self._weight, bias)
