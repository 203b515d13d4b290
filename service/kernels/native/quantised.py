"""Linear layers with int8 and int4 weights by the compiled kernels, which multiply integers. No gradients.

The weights are laid out once in strips of 16 outputs (see quantised_strips.h). It does not know layers. Invariant: values are those of
`service.kernels.quantised`, only their order differs.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor
from torch.nn.functional import pad

from service.kernels.large_memory import LargeMemory
from service.kernels.native.binding import absent, functions
from service.kernels.quantised import GROUP, QuantisedWeight

STRIP = 16
# Bytes of an int4 strip for each group: pairs of steps, and a float16 scale for each output.
_GROUP_BYTES = STRIP * GROUP // 2 + STRIP * 2

_MEMORY = LargeMemory()


class Weights(ctypes.Structure):
    """`struct weights` of native.h."""

    _fields_ = (
        ("kind", ctypes.c_int64),
        ("inputs", ctypes.c_int64),
        ("padded", ctypes.c_int64),
        ("outputs", ctypes.c_int64),
        ("values", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
    )


def unsupported() -> str | None:
    """Why these products cannot be used, or None."""
    return absent() or (None if functions().native_has_quantised() else "it needs a processor with AVX2, or Armv8.2's dot products")


class NativeQuantisedLinear:
    """A quantised weight in strips."""

    def __init__(self, weight: QuantisedWeight) -> None:
        """Lay the weight out; the caller lets the plain one go."""
        self.outputs, self.inputs = weight.outputs, weight.inputs
        self._int8 = weight.kind == "int8"
        self._values: Tensor
        self._scales: Tensor | None
        self._values, self._scales = _int8_strips(weight) if self._int8 else _int4_strips(weight)
        self._bias: Tensor | None = None
        self._kept_bias: Tensor | None = None
        multiple = 4 if self._int8 else GROUP
        self._padded = -(-self.inputs // multiple) * multiple
        kind = 0 if self._int8 else 1
        scales = None if self._scales is None else self._scales.data_ptr()
        self._layout = Weights(kind, self.inputs, self._padded, self.outputs, self._values.data_ptr(), scales, None)
        self._address = ctypes.addressof(self._layout)
        self._call = functions().native_quantised_linear

    @property
    def bias(self) -> Tensor | None:
        """What is added in every product."""
        return self._bias

    @property
    def address(self) -> int:
        """Where its `struct weights` lies, for calls that multiply with several weights. The bias of the last `apply` or `set_bias`."""
        return self._address

    @property
    def bytes(self) -> int:
        """Bytes of values and scales, padding to whole strips included."""
        return self._values.nbytes + (0 if self._scales is None else self._scales.nbytes)

    def apply(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x [T, in] -> [T, out] in the type of x, computed in float32."""
        if x.shape[-1] != self.inputs or x.device.type != "cpu":
            raise ValueError(f"x {tuple(x.shape)} on {x.device} does not fit a weight of {self.inputs} inputs on a CPU")
        self.set_bias(bias)
        wide = x.float().contiguous()
        out = torch.empty(x.shape[0], self.outputs)
        if self._call(self._address, wide.data_ptr(), out.data_ptr(), x.shape[0], torch.get_num_threads()):
            raise MemoryError("no memory for the rows of a product")
        return out if x.dtype == torch.float32 else out.to(x.dtype)

    def set_bias(self, bias: Tensor | None) -> None:
        """Add this bias [out] in every product from now on."""
        if bias is not self._bias:
            self._bias = bias
            self._kept_bias = None if bias is None else bias.detach().float().contiguous()
            self._layout.bias = None if self._kept_bias is None else self._kept_bias.data_ptr()

    def rows(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        """Rows ids [T] of the weight, [T, in] in `dtype`."""
        if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < self.outputs:
            raise IndexError(f"rows {ids.tolist()} of a weight that has {self.outputs}")
        if self._int8:
            ids, out = ids.contiguous(), torch.empty(len(ids), self.inputs)
            functions().native_int8_rows(self._address, ids.data_ptr(), out.data_ptr(), len(ids))
            return out.to(dtype)
        strips, lanes = torch.div(ids, STRIP, rounding_mode="floor"), ids % STRIP
        groups = self._values.view(-1, self._padded // GROUP, _GROUP_BYTES)[strips]
        pairs = groups[..., : STRIP * GROUP // 2].reshape(len(ids), -1, GROUP // 8, STRIP, 4)[torch.arange(len(ids)), :, :, lanes]
        scales = groups[..., STRIP * GROUP // 2 :].contiguous().view(torch.float16)[torch.arange(len(ids)), :, lanes]
        steps = torch.stack((pairs & 15, pairs >> 4), dim=3).view(len(ids), -1, GROUP).float().sub_(8)
        return (steps * scales[..., None]).view(len(ids), -1)[:, : self.inputs].to(dtype)


def _int8_strips(weight: QuantisedWeight) -> tuple[Tensor, Tensor]:
    """uint8 [strips, inputs / 4, 16, 4], 128 added, and the scales."""
    missing, short = -weight.outputs % STRIP, -weight.inputs % 4
    values = pad(weight.values, (0, short, 0, missing)) if missing or short else weight.values
    fours = values.view(torch.int32).view(-1, STRIP, values.shape[1] // 4).transpose(1, 2)
    strips = _MEMORY.keep(fours).view(torch.uint8)
    return strips.bitwise_xor_(128), _MEMORY.keep(pad(weight.scales, (0, missing)))


def _int4_strips(weight: QuantisedWeight) -> tuple[Tensor, None]:
    """uint8 [strips, groups, 288]: pairs of steps for four inputs, then for the next four, and the scales."""
    missing = -weight.outputs % STRIP
    # A strip beyond the last output has steps 0, which are stored as 8.
    values, scales = pad(weight.values, (0, 0, 0, missing), value=0x88), pad(weight.scales, (0, 0, 0, missing))
    groups = scales.shape[1]
    steps = torch.stack((values & 15, values >> 4), dim=-1).view(-1, STRIP, groups, GROUP // 8, 2, 4)
    pairs = (steps[..., 0, :] | steps[..., 1, :] << 4).permute(0, 2, 3, 1, 4).reshape(len(steps), groups, -1)
    packed = torch.empty(len(steps), groups, _GROUP_BYTES, dtype=torch.uint8)
    packed[..., : pairs.shape[2]] = pairs
    packed[..., pairs.shape[2] :] = scales.view(-1, STRIP, groups).transpose(1, 2).contiguous().view(torch.uint8)
    return _MEMORY.keep(packed), None
