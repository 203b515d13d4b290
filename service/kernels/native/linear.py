"""Linear layers by the compiled kernels whose sums have one order: the same bits of a row alone, in any batch and from either layout.

What torch's and oneDNN's products give depends on the number of rows, since they choose tiles and orders of sums by it. It does not know
layers. No gradients. Invariant: an output is one chain of products added input by input, in float32, and the bias comes last;
where the processor multiplies pairs of bfloat16, pair by pair.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from service.kernels.linear import multiplies_tiles
from service.kernels.native.binding import ELEMENTS, compiled, functions
from service.kernels.workspace import Workspace

# Outputs of a panel: COLUMNS in native.h.
COLUMNS = 64

_WORKSPACE = Workspace()


def multiplies_bfloat16() -> bool:
    """Whether the compiled kernels multiply bfloat16 well: by matrix units, or by dot products on a processor that has no such units.

    Beside units that the system keeps from this process dot products take longer than float32.
    """
    library = compiled()
    if isinstance(library, str) or not library.functions.native_has_pairs():
        return False
    return library.name == "amx" or not multiplies_tiles()


def slower(dtype: torch.dtype) -> str | None:
    """Why the libraries' packed products are taken to be faster than these where nobody asks for one order, or None: see docs/log.md."""
    library = compiled()
    if isinstance(library, str) or library.name not in ("avx512", "amx"):
        return "it was measured to be faster with AVX-512 only"
    if dtype == torch.bfloat16 and not multiplies_bfloat16():
        return "without dot products of bfloat16, or beside matrix units that only they use, the libraries' products take less time"
    return "float16 was not measured" if dtype == torch.float16 else None


class _Weight(NamedTuple):
    """What is multiplied: `values` as the library reads them, and what they stand for."""

    values: Tensor
    packed: bool
    pairs: bool
    outputs: int
    inputs: int
    dtype: torch.dtype


def ordered_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [T, in] times weight [out, in] of the same type transposed, plus bias [out]: [T, out] in that type.

    float32, bfloat16 or float16; the weight is turned on the way, which an `OrderedLinear` has done before. Raises ValueError for shapes
    or types that do not fit.
    """
    return _multiply(x, _read(weight), bias)


class OrderedLinear:
    """A weight laid out in panels [in, COLUMNS]; the caller lets the plain one go."""

    def __init__(self, weight: Tensor) -> None:
        """Lay out weight [out, in], of any of the three types, on a CPU."""
        self.outputs, self.inputs = weight.shape
        with torch.no_grad():
            plain = _read(weight.detach())
            whole, rest = divmod(self.outputs, COLUMNS)
            inputs = plain.values.shape[1]
            panels = plain.values.new_zeros(whole + (rest > 0), inputs, COLUMNS)
            panels[:whole] = plain.values[: whole * COLUMNS].view(whole, COLUMNS, inputs).transpose(1, 2)
            panels[whole:, :, :rest] = plain.values[whole * COLUMNS :].t()
        self._weight = plain._replace(values=panels, packed=True)

    @property
    def panels(self) -> Tensor:
        """The weight as it lies, [panels, in, COLUMNS]; words of two bfloat16 where these are multiplied in pairs."""
        return self._weight.values

    @property
    def bytes(self) -> int:
        """Bytes of the weight, padding to whole panels not counted."""
        return self.outputs * self.inputs * self._weight.dtype.itemsize

    def apply(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x [T, in] -> [T, out] in the type of x, which is that of the weight."""
        return _multiply(x, self._weight, bias)


def _words(x: Tensor) -> Tensor:
    """bfloat16 rows [T, in] as words of two, [T, in / 2 rounded up] int32."""
    return (pad(x, (0, 1)) if x.shape[1] % 2 else x.contiguous()).view(torch.int32)


def _read(weight: Tensor) -> _Weight:
    """A plain weight, in pairs where the processor multiplies these."""
    pairs = weight.dtype == torch.bfloat16 and bool(functions().native_has_pairs())
    outputs, inputs = weight.shape
    return _Weight(_words(weight) if pairs else weight.contiguous(), False, pairs, outputs, inputs, weight.dtype)


def _multiply(x: Tensor, weight: _Weight, bias: Tensor | None) -> Tensor:
    if x.shape[1] != weight.inputs or x.dtype != weight.dtype or (bias is not None and bias.shape != (weight.outputs,)):
        asked = f"{weight.dtype} weight of {weight.outputs} outputs and {weight.inputs} inputs"
        raise ValueError(f"rows {tuple(x.shape)} {x.dtype} do not fit a {asked}, or its bias")
    library, threads = functions(), torch.get_num_threads()
    rows = _words(x) if weight.pairs else x.float().contiguous()
    offset = None if bias is None else bias.detach().float().contiguous()
    out = torch.empty(len(x), weight.outputs, dtype=x.dtype)
    workspace = _WORKSPACE.take("linear", threads * library.native_linear_scratch())
    kind = ELEMENTS[torch.float32 if weight.pairs else weight.dtype]
    where = (kind, int(weight.pairs), rows.data_ptr(), *rows.shape, weight.values.data_ptr(), int(weight.packed), weight.outputs)
    offset_at = None if offset is None else offset.data_ptr()
    library.native_linear(*where, offset_at, ELEMENTS[x.dtype], out.data_ptr(), workspace.data_ptr(), threads)
    return out
