"""Linear layers by the compiled kernels whose sums have one order: the same bits of a row alone, in any batch and from either layout.

What torch's and oneDNN's products give depends on the number of rows, since they choose tiles and orders of sums by it. It does not know
layers. No gradients. Invariant: an output is one chain of products added input by input, in float32, and the bias comes last.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from service.kernels.native.binding import ELEMENTS, functions
from service.kernels.workspace import Workspace

# Outputs of a panel: COLUMNS in native.h.
COLUMNS = 64

_WORKSPACE = Workspace()


def ordered_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [T, in] times weight [out, in] transposed, plus bias [out]: [T, out] in the type of x.

    The weight is float32, bfloat16 or float16, and turned on the way, which an `OrderedLinear` has done before. Raises ValueError for
    shapes that do not fit.
    """
    return _multiply(x, weight.contiguous(), weight.shape[0], False, bias)


class OrderedLinear:
    """A weight laid out in panels [in, COLUMNS] of its own type; the caller lets the plain one go."""

    def __init__(self, weight: Tensor) -> None:
        """Lay out weight [out, in], of any of the three types, on a CPU."""
        self.outputs, self.inputs = weight.shape
        with torch.no_grad():
            padded = pad(weight.detach(), (0, 0, 0, -self.outputs % COLUMNS))
            self._panels = padded.view(-1, COLUMNS, self.inputs).transpose(1, 2).contiguous()

    @property
    def bytes(self) -> int:
        """Bytes of the weight, padding to whole panels not counted."""
        return self.outputs * self.inputs * self._panels.element_size()

    def apply(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x [T, in] -> [T, out] in the type of x."""
        return _multiply(x, self._panels, self.outputs, True, bias)


def _multiply(x: Tensor, weight: Tensor, outputs: int, packed: bool, bias: Tensor | None) -> Tensor:
    rows, inputs = x.shape
    expected = weight.shape[1]
    if inputs != expected or (bias is not None and bias.shape != (outputs,)):
        raise ValueError(f"rows {tuple(x.shape)} do not fit a weight of {outputs} outputs and {expected} inputs, or its bias")
    library, threads = functions(), torch.get_num_threads()
    wide = x.float().contiguous()
    offset = None if bias is None else bias.detach().float().contiguous()
    out = torch.empty(rows, outputs, dtype=x.dtype)
    workspace = _WORKSPACE.take("linear", threads * library.native_linear_scratch())
    where = (ELEMENTS[weight.dtype], wide.data_ptr(), rows, inputs, weight.data_ptr(), int(packed), outputs)
    library.native_linear(
        *where, None if offset is None else offset.data_ptr(), ELEMENTS[x.dtype], out.data_ptr(), workspace.data_ptr(), threads
    )
    return out
