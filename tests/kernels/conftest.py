"""Paged batches with poisoned memory, and the error rule shared by the kernel tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from service.kernels import paged_attention as kernel
from service.kernels import reference
from service.kernels.native import binding
from service.kernels.workspace import Workspace

needs_native = pytest.mark.skipif(binding.absent() is not None, reason="the compiled kernels are not built")
GARBAGE = (-(2**31), -1, 2**31 - 1)


@pytest.fixture(params=binding.LEVELS)
def instructions(request: pytest.FixtureRequest) -> Iterator[str]:
    """The compiled kernels of each instruction set that this machine has, the best one again afterwards."""
    loaded = binding.compiled()
    if isinstance(loaded, str) or loaded.choose(request.param) != request.param:
        pytest.skip("not on this machine")
    yield request.param
    loaded.choose(binding.LEVELS[-1])


@pytest.fixture(scope="module")
def nan_memory() -> Iterator[None]:
    """What is allocated without being filled, and scratch memory whenever it is taken, begins as NaN or the largest integer."""
    taken = Workspace.take

    def take(workspace: Workspace, name: str, *shape: int) -> Tensor:
        return taken(workspace, name, *shape).fill_(float("nan"))

    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Workspace, "take", take)
        patch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
        torch.use_deterministic_algorithms(True, warn_only=True)
        yield
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def untouched(*shape: int, dtype: torch.dtype) -> Tensor:
    """Memory that nothing has written, with `nan_memory` too: what of it is never touched costs nothing."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
        return torch.empty(shape, dtype=dtype)


@dataclass(frozen=True)
class PagedBatch:
    """Arguments of one attention call. `keys` and `values` are what each sequence holds, in order, before it was cut into blocks."""

    query: Tensor
    key_blocks: Tensor
    value_blocks: Tensor
    block_tables: Tensor
    query_starts: Tensor
    context_lengths: Tensor
    window: int | None
    scale: float
    softcap: float | None = None
    sink_logits: Tensor | None = None

    def run(self, attention: Callable[..., Tensor] = kernel.paged_attention, **changes: Any) -> Tensor:
        batch = replace(self, **changes)
        return attention(
            batch.query,
            batch.key_blocks,
            batch.value_blocks,
            batch.block_tables,
            batch.query_starts,
            batch.context_lengths,
            scale=batch.scale,
            window=batch.window,
            softcap=batch.softcap,
            sink_logits=batch.sink_logits,
        )

    def reference(self) -> Tensor:
        wide = {name: getattr(self, name).double() for name in ("query", "key_blocks", "value_blocks")}
        return self.run(reference.paged_attention, **wide)


def make_batch(
    contexts: list[int],
    counts: list[int],
    *,
    heads: int = 4,
    kv_heads: int = 2,
    size: int = 16,
    value_size: int | None = None,
    block_tokens: int = 8,
    window: int | None = None,
    poison: float = float("nan"),
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    consecutive: bool = False,
    **scoring: Any,
) -> PagedBatch:
    """Sequences of contexts[s] tokens whose last counts[s] are queries; everything that no row sees is `poison`, table garbage included."""
    generator = torch.Generator().manual_seed(seed)
    value_size = value_size or size
    width = max(-(-context // block_tokens) for context in contexts) + 2
    total = sum(-(-context // block_tokens) for context in contexts) + 3
    order = torch.arange(1, total) if consecutive else torch.randperm(total - 1, generator=generator) + 1
    free = iter(order.tolist())
    keys = torch.full((total, kv_heads, block_tokens, size), poison, dtype=dtype)
    values = torch.full((total, kv_heads, block_tokens, value_size), poison, dtype=dtype)
    garbage = (*GARBAGE, total)
    tables = torch.tensor([[garbage[(s + i) % 4] for i in range(width)] for s in range(len(contexts))], dtype=torch.int32)
    for sequence, (context, count) in enumerate(zip(contexts, counts, strict=True)):
        first_seen = 0 if window is None else max(0, context - count + 1 - window)
        for block in range(-(-context // block_tokens)):
            if (block + 1) * block_tokens <= first_seen or count == 0:
                tables[sequence, block] = 0
                continue
            physical = next(free)
            tables[sequence, block] = physical
            start, end = max(0, first_seen - block * block_tokens), min(block_tokens, context - block * block_tokens)
            keys[physical, :, start:end] = torch.randn(kv_heads, end - start, size, generator=generator).to(dtype)
            values[physical, :, start:end] = torch.randn(kv_heads, end - start, value_size, generator=generator).to(dtype)
    starts = torch.tensor([0, *counts]).cumsum(0).to(torch.int32)
    query = torch.randn(sum(counts), heads, size, generator=generator).to(dtype) * 2
    lengths = torch.tensor(contexts, dtype=torch.int32)
    return PagedBatch(query, keys, values, tables, starts, lengths, window, size**-0.5, **scoring)


def check_close(actual: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    """The error rule: float32 within 1e-5 of the largest value, 16 bits within one rounding of each value besides."""
    assert actual.dtype == dtype and actual.shape == expected.shape
    assert torch.isfinite(actual).all()
    error = (actual.double() - expected.double()).abs()
    floor = 1e-5 * expected.double().abs().max().clamp(min=1e-30) if expected.numel() else 0.0
    rounding = 0.0 if dtype == torch.float32 else torch.finfo(dtype).eps
    worst = (error - floor - rounding * expected.double().abs()).max() if expected.numel() else torch.tensor(-1.0)
    assert worst <= 0, f"off by {error.max():.3g}, largest value {expected.abs().max():.3g}"


def multiplies_pairs(instructions: str, dtype: torch.dtype) -> bool:
    """Whether attention over a cache of `dtype` is computed in pairs of bfloat16 by these kernels here."""
    return dtype == torch.bfloat16 and instructions in ("avx512", "amx") and bool(binding.functions().native_has_pairs())


def check_rounded(actual: Tensor, expected: Tensor, values: Tensor) -> None:
    """The error rule where weights are rounded to bfloat16: each by 2^-9, and so are their sums, which makes 2^-8 of the largest value.

    `actual` is float32, of queries that bfloat16 holds. Errors of weights are as often up as down: on average a quarter of that.
    """
    assert actual.dtype == torch.float32 and actual.shape == expected.shape and torch.isfinite(actual).all()
    largest = values[values.isfinite()].abs().max().double()
    error = (actual.double() - expected.double()).abs()
    assert error.max() <= 2**-8 * largest and error.mean() <= 2**-10 * largest, f"off by {error.max():.3g}, {error.mean():.3g} on average"
