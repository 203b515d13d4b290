"""Muon for the matrices of the layers, AdamW for embeddings, norms, gates and biases.

It does not know models beyond their parameters' names and shapes, nor schedules: rates are set from outside before each step.
Fused projections are orthogonalised part by part, since each part is a matrix of its own. Invariant: everything is float32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from service.train.recipe_parts import OptimizerPart
from service.types.model_spec import ModelSpec

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)


def orthogonalize(matrix: Tensor, iterations: int = 5) -> Tensor:
    """The nearest matrix with singular values about 1, by a quintic Newton-Schulz iteration (Jordan et al. 2024). [m, n] -> [m, n]."""
    a, b, c = _COEFFICIENTS
    tall = matrix.size(0) > matrix.size(1)
    x: Tensor = matrix.T if tall else matrix
    x = x / (x.norm() + 1e-7)
    for _ in range(iterations):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T.contiguous() if tall else x


class Muon(torch.optim.Optimizer):
    """Momentum, then orthogonalised updates scaled to the size of the matrix. A group's `splits` are the row counts of fused parts."""

    def __init__(self, groups: Iterable[dict[str, Any]], rate: float, momentum: float, weight_decay: float) -> None:
        super().__init__(groups, {"lr": rate, "momentum": momentum, "weight_decay": weight_decay, "splits": None})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update every matrix that has a gradient. Decay is decoupled (Loshchilov and Hutter 2019)."""
        loss = closure() if closure is not None else None
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is not None:
                    self._update(weight, group)
        return loss

    def _update(self, weight: Tensor, group: dict[str, Any]) -> None:
        gradient, state = weight.grad, self.state[weight]
        if gradient is None:
            return
        if not state:
            state["momentum"] = torch.zeros_like(weight)
        momentum = state["momentum"].lerp_(gradient, 1.0 - group["momentum"])
        ahead = gradient.lerp(momentum, group["momentum"])
        weight.mul_(1.0 - group["lr"] * group["weight_decay"])
        parts = group["splits"] or [weight.size(0)]
        for target, part in zip(torch.split(weight, parts), torch.split(ahead, parts), strict=True):
            scale = max(1.0, part.size(0) / part.size(1)) ** 0.5
            target.add_(orthogonalize(part), alpha=-group["lr"] * scale)


def build_optimizers(model: nn.Module, spec: ModelSpec, part: OptimizerPart) -> list[torch.optim.Optimizer]:
    """The optimisers of a recipe; each group keeps its full rate as `base_lr`."""
    matrices: list[dict[str, Any]] = []
    decayed: list[Tensor] = []
    plain: list[Tensor] = []
    for name, weight in model.named_parameters():
        if weight.ndim == 2 and name.startswith("layers.") and ".gate." not in name and part.kind == "muon":
            matrices.append({"params": [weight], "splits": _splits(name, spec)})
        else:
            (decayed if weight.ndim == 2 else plain).append(weight)
    groups = [
        {"params": decayed, "weight_decay": part.weight_decay if part.kind == "adamw" else 0.0},
        {"params": plain, "weight_decay": 0.0},
    ]
    optimizers: list[torch.optim.Optimizer] = [torch.optim.AdamW(groups, lr=part.rest_rate, betas=(part.beta1, part.beta2), eps=1e-10)]
    if matrices:
        optimizers.append(Muon(matrices, part.matrix_rate, part.momentum, part.weight_decay))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["base_lr"] = group["lr"]
    return optimizers


def set_rates(optimizers: list[torch.optim.Optimizer], factor: float) -> None:
    """Every group's rate becomes its base rate times `factor`."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["base_lr"] * factor


def _splits(name: str, spec: ModelSpec) -> list[int] | None:
    layer = spec.layers[int(name.split(".")[1])]
    if name.endswith("attention.qkv.weight"):
        rows, kv = layer.attention.heads * layer.attention.head_dim, layer.attention.kv_heads * layer.attention.head_dim
        return [rows, kv, kv]
    if name.endswith("mlp.gate_up.weight"):
        return [layer.mlp.hidden, layer.mlp.hidden]
    return None
