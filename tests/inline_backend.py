"""The real engine as a Backend without a process: the same tables, blocks, decoder and sampler, computed in the caller's thread.

For tests that compare many schedules of one checkpoint and would otherwise start a worker for each. `lose_at` loses the worker at a step.
"""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path

import torch

from service.checkpoints.load import Quantisation, load
from service.checkpoints.long_context import adapt
from service.checkpoints.manifest import read_manifest
from service.engine.batch import Tables
from service.engine.decode_graphs import Recorder
from service.engine.kv_pool import KvPool
from service.engine.sampler import Sampler
from service.engine.torch_backend import TorchBackend
from service.types.plan import BackendHealth, BackendInfo, BatchPlan, StepResult, WorkerLost
from service.types.settings import AttentionSettings


class Inline:
    """A backend without a process: `execute` gives what `engine` computes, a little later, or loses it at a step of `lose_at`, and then
    every step until the next start."""

    def __init__(self, lose_at: frozenset[int]) -> None:
        self.lose_at = lose_at
        self.steps = self.starts = 0
        self._lost_start = -1

    def execute(self, plan: BatchPlan) -> asyncio.Future[StepResult]:
        loop = asyncio.get_running_loop()
        future: asyncio.Future[StepResult] = loop.create_future()
        self.steps += 1
        if self.steps in self.lose_at:
            self._lost_start = self.starts
        if self._lost_start == self.starts:
            loop.call_soon(_give, future, WorkerLost("planted"))
        else:
            loop.call_soon(_give, future, self.engine.execute(plan))  # later, so that readers run between steps
        return future

    def health(self) -> BackendHealth:
        return BackendHealth("ready", 0.0, max(0, self.starts - 1))

    async def close(self) -> None:
        pass


class InlineBackend(Inline):
    """Implements types.plan.Backend over one loaded checkpoint; every start begins with empty tables and poisoned blocks."""

    def __init__(
        self,
        directory: Path,
        *,
        blocks: int | tuple[int, ...] = 64,
        max_rows: int = 32,
        lose_at: frozenset[int] = frozenset(),
        image_tokens: int = 512,
        attention: AttentionSettings | None = None,
        dtype: str = "float32",
        quantize: str = "none",
        kept: str = "auto",
        device: torch.device | None = None,
        recorder: Recorder | None = None,
    ) -> None:
        super().__init__(lose_at)
        torch.set_num_threads(1)  # tiny matrices: more threads only wait for each other
        read = read_manifest(directory)
        self.manifest = replace(read, spec=adapt(read.spec, attention or AttentionSettings()))
        self._dtype, self._kept = getattr(torch, dtype), getattr(torch, dtype if kept == "auto" else kept)
        self._device = device or torch.device("cpu")
        self._decoder = load(self.manifest, self._device, self._dtype, lambda done, total: None, quantisation=Quantisation(quantize))
        self.blocks = blocks
        self.max_rows = max_rows
        self.image_tokens = image_tokens
        self._recorder = recorder

    async def start(self) -> BackendInfo:
        spec = self.manifest.spec
        layout = spec.kv_layout().in_eight_bits() if self._kept == torch.int8 else spec.kv_layout()
        group_blocks = (self.blocks,) * len(layout.groups) if isinstance(self.blocks, int) else self.blocks
        pool = KvPool(layout, group_blocks, self._kept, self._device, self._dtype)
        for layer in range(len(spec.layers)):
            far = pool.far_of(layer) if pool.far_group_of(layer) is not None else ()
            for tensor in (*pool.blocks_of(layer), *far):
                if tensor is not None:
                    tensor.fill_(float("nan") if tensor.is_floating_point() else 119)
        tables = Tables(layout, group_blocks, self.max_rows, spec.context_tokens, spec.vocab_size)
        image_tokens = self.image_tokens if spec.vision is not None else 0
        self.tables, self.pool = tables, pool
        self.engine = TorchBackend(self._decoder, pool, tables, Sampler(self.max_rows, spec.vocab_size), image_tokens, self._recorder)
        self.starts += 1
        sizes = (self.max_rows, 4096, spec.context_tokens, spec.vocab_size)
        return BackendInfo(layout, group_blocks, *sizes, "float32", "cpu", "inline", image_tokens=image_tokens)


def _give(future: asyncio.Future[StepResult], outcome: StepResult | WorkerLost) -> None:
    if future.cancelled():
        return
    if isinstance(outcome, WorkerLost):
        future.set_exception(outcome)
    else:
        future.set_result(outcome)
