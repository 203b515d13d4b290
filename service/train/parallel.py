"""Data-parallel training: every process computes its passes of a step, gradients are summed, and all take the same step.

It knows torch.distributed and nothing of recipes or models. A step has one sum, over one flat buffer, when its passes are done.
Invariant: after every step all processes hold equal weights; a group of one does nothing and needs no backend.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor

from service.types.settings import LaunchSettings


class Group:
    """The processes of one run. `rank` 0 is the one that saves, reports and publishes."""

    def __init__(self, launch: LaunchSettings | None = None, device: str = "cpu") -> None:
        """Join the group of `launch`, over NCCL for a CUDA `device` and Gloo otherwise; None is a run of one process."""
        self.rank, self.size = (0, 1) if launch is None else (launch.rank, launch.size)
        self._device = torch.device(device)
        if launch is not None and launch.size > 1:
            dist.init_process_group(
                "gloo" if self._device.type == "cpu" else "nccl",
                init_method=f"tcp://{launch.address}:{launch.port}",
                rank=launch.rank,
                world_size=launch.size,
            )

    @property
    def leads(self) -> bool:
        """Whether this process speaks for the group."""
        return self.rank == 0

    def sum_gradients(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        """Every gradient becomes its sum over the group; parameters without one must have none anywhere."""
        if self.size == 1:
            return
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
        dist.all_reduce(flat)
        for gradient, part in zip(gradients, torch.split(flat, [gradient.numel() for gradient in gradients]), strict=True):
            gradient.copy_(part.view_as(gradient))

    def sum(self, value: float) -> float:
        """The sum of everyone's value."""
        if self.size == 1:
            return value
        total = self._cell(value)
        dist.all_reduce(total)
        return float(total)

    def any(self, value: bool) -> bool:
        """Whether anyone's value is true."""
        return self.sum(float(value)) > 0

    def leaders(self, value: float) -> float:
        """The value of rank 0."""
        if self.size == 1:
            return value
        shared = self._cell(value)
        dist.broadcast(shared, 0)
        return float(shared)

    def close(self) -> None:
        """Leave the group, all together: a process that went first would cut connections that others still end."""
        if self.size > 1:
            dist.barrier()
            dist.destroy_process_group()

    def _cell(self, value: float) -> Tensor:
        return torch.tensor(value, dtype=torch.float64, device=self._device)
