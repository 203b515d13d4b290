"""What `--deterministic` takes: every operation of a step by an implementation whose rows do not see each other, or a refusal.

Attention, choices and the caches keep this by themselves (what a query sees is a function of its position); what is left are products and
gates, whose usual implementations choose their order of sums by the number of rows. Invariant: a version that started so computes nothing
by an implementation that is not steady.
"""

from __future__ import annotations

import torch

from service.kernels.dispatch import TABLE, require_steady, unsteady
from service.types.errors import CapacityError

# Served otherwise: rotations go through `rotate`, and a CPU samples with numpy, row by row.
_ELSEWHERE = {"apply_rope", "sample"}


def require_deterministic(device: torch.device, dtype: torch.dtype, quantize: str) -> None:
    """Have this process choose steady implementations only. Raises CapacityError with the reason where there are none."""
    needed = set(TABLE) - (_ELSEWHERE if device.type == "cpu" else {"apply_rope"})
    if quantize == "none":
        needed.discard("pack_quantised")
    missing = unsteady(device, dtype, sorted(needed))
    if quantize == "int4" and device.type != "cpu":
        missing["pack_quantised"] = "4-bit weights go through torch's own product there"
    if missing:
        reasons = "; ".join(f"{operation}: {reason}" for operation, reason in missing.items())
        raise CapacityError(f"--deterministic cannot hold on {device.type} ({reasons}): leave it out.")
    require_steady(True)
