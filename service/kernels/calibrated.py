"""int4 weights rounded for the inputs that they will meet: what rounding one input's weight does to the outputs, later inputs make good.

The method of GPTQ (Frantar et al. 2022, https://arxiv.org/abs/2210.17323), within blocks of BLOCK inputs, so that time and memory grow
with the weight and not with the square of its inputs. It does not know layers or where the inputs come from. Invariant: the result is laid
out as `quantise_weight` lays it out.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from service.kernels.quantised import GROUP, QuantisedWeight, fit_int4, pack_int4, quantise_weight, require_inputs

# Inputs whose errors are shared out among each other; whole groups.
BLOCK = 1024
# Outputs rounded at once: fewer are slower, more take more memory beside the weights.
OUTPUTS = 4096
# Added to the diagonal of the moments, as a share of its mean: inputs that hardly vary, and more inputs than tokens.
DAMPING = 0.03


class InputMoments:
    """Sums of x xᵀ over the inputs x of one weight, for each block of BLOCK inputs: float32 [block, block], whole groups, zeros beyond."""

    def __init__(self, inputs: int) -> None:
        padded = -(-inputs // GROUP) * GROUP
        self._inputs = inputs
        self.blocks = [torch.zeros(size, size) for size in (min(BLOCK, padded - first) for first in range(0, padded, BLOCK))]

    def add(self, x: Tensor) -> None:
        """Count inputs [tokens, inputs] of any float type."""
        padded = pad(x.float(), (0, -self._inputs % GROUP))
        for block, part in zip(self.blocks, torch.split(padded, BLOCK, dim=1), strict=True):
            block.addmm_(part.t(), part)


def calibrated_int4(weight: Tensor, moments: InputMoments) -> QuantisedWeight:
    """Quantise a CPU weight [outputs, inputs] of finite values to int4, so that it multiplies such inputs nearly as it did.

    Where moments are not finite, or have no factor, the weight is rounded to the nearest. Raises ValueError for too many inputs.
    """
    require_inputs(weight.shape[1], "int4")
    factors = [factor for factor in map(_factor, moments.blocks) if factor is not None]
    if len(factors) < len(moments.blocks):
        return quantise_weight(weight, "int4")
    outputs, inputs = weight.shape
    groups = -(-inputs // GROUP)
    values = torch.empty(outputs, groups * GROUP // 2, dtype=torch.uint8)
    scales = torch.empty(outputs, groups, dtype=torch.float16)
    for start in range(0, outputs, OUTPUTS):
        rows = slice(start, start + OUTPUTS)
        part = pad(weight[rows].detach().float(), (0, -inputs % GROUP))
        blocks = torch.split(part, BLOCK, dim=1)
        found = [_rounded(block.t().contiguous(), factor) for block, factor in zip(blocks, factors, strict=True)]
        values[rows] = pack_int4(torch.cat([steps for steps, _ in found]).t())
        scales[rows] = torch.cat([scale for _, scale in found]).t()
    return QuantisedWeight("int4", inputs, values, scales)


def _factor(moments: Tensor) -> Tensor | None:
    """The upper Cholesky factor of the damped moments' inverse, or None where there is none."""
    mean = float(moments.diagonal().mean())
    damped = moments + torch.eye(len(moments)) * (DAMPING * mean if mean > 0 else 1.0)
    lower, failed = torch.linalg.cholesky_ex(damped)
    upper, failed_again = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
    return None if failed or failed_again or not upper.isfinite().all() else upper


def _rounded(columns: Tensor, factor: Tensor) -> tuple[Tensor, Tensor]:
    """Steps [inputs, outputs] −8 … 7 and scales float16 [groups, outputs] of one block's weights [inputs, outputs], which are used up.

    Input by input: the error of rounding it, over the factor's diagonal, is taken off the inputs after it along the factor's row.
    """
    steps, scales = torch.empty_like(columns), torch.empty(len(columns) // GROUP, columns.shape[1], dtype=torch.float16)
    for number, first in enumerate(range(0, len(columns), GROUP)):
        group, end = columns[first : first + GROUP], first + GROUP
        scales[number] = fit_int4(group.t().contiguous())[1].squeeze(1)
        scale = scales[number].float()
        divisor, errors = torch.where(scale == 0, 1.0, scale), torch.empty_like(group)
        for at in range(GROUP):
            row = first + at
            torch.div(group[at], divisor, out=steps[row]).round_().clamp_(-8, 7)
            errors[at] = (group[at] - steps[row] * scale) / factor[row, row]
            group[at + 1 :].addr_(factor[row, row + 1 : end], errors[at], alpha=-1)
        columns[end:].addmm_(factor[first:end, end:].t(), errors, alpha=-1)
    return steps, scales
