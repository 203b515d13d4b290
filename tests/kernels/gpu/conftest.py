"""The GPU kernels run on the device where there is one, else on a fake one (`tests/fake_cuda`), in Triton's interpreter: same tests,
smaller shapes.

The interpreter (tests/conftest.py chooses it before triton is imported) computes bfloat16 wrongly and sums in another order than compiled
kernels: what needs them runs on a device, or with EMULATE_SM, where they are compiled and what was compiled runs without one.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from service.kernels.reference_sparse import ChosenFar, FarBlocks
from tests.fake_cuda.install import device_or_fake

REAL = torch.cuda.is_available()
# EMULATE_SM=80, 87 or 90, see `ptx/driver.py`.
EMULATED = 0 if REAL else int(os.environ.get("EMULATE_SM", "0"))
COMPILED = REAL or EMULATED > 0
CAPABILITY = 10 * torch.cuda.get_device_capability()[0] + torch.cuda.get_device_capability()[1] if REAL else EMULATED or 90
DEVICE = torch.device("cuda:0")
DTYPES = (torch.float32, torch.float16, torch.bfloat16) if COMPILED else (torch.float32, torch.float16)
# The first block whose elements int32 cannot count where blocks stand APART_BYTES from each other, and how many there are of its kind.
FAR_BLOCK, APART_BYTES, FAR_BLOCKS = 32768, 131072, 64

needs_e4m3 = pytest.mark.skipif(CAPABILITY < 89, reason="8-bit floats come with compute capability 8.9")


def pytest_configure(config: pytest.Config) -> None:
    """A GPU machine may lack the plugin that knows this mark; there it means nothing."""
    config.addinivalue_line("markers", "timeout(seconds): the longest that a test may take")


@pytest.fixture(autouse=True, scope="package")
def device() -> Iterator[None]:
    """What torch finds there."""
    with device_or_fake(divmod(CAPABILITY, 10)):
        yield


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """What is allocated without being filled, results and workspaces, begins as NaN or the largest integer."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    filling = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.utils.deterministic.fill_uninitialized_memory = filling
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])


class FarApart:
    """Memory in which blocks FAR_BLOCK and up begin at element 2^31 and beyond in types of 8 and 16 bits."""

    def __init__(self) -> None:
        self._memory = torch.empty((FAR_BLOCK + FAR_BLOCKS) * APART_BYTES, dtype=torch.uint8, device=DEVICE)
        self._used_bytes = 0

    def place(self, blocks: Tensor) -> Tensor:
        """A view whose blocks from FAR_BLOCK on are copies of `blocks` [N, …]."""
        inner = torch.empty(blocks.shape[1:], dtype=blocks.dtype)
        strides = (APART_BYTES // blocks.itemsize, *inner.stride())
        shape = (FAR_BLOCK + len(blocks), *blocks.shape[1:])
        there = torch.as_strided(self._memory.view(blocks.dtype), shape, strides, self._used_bytes // blocks.itemsize)
        self._used_bytes += -(-inner.nbytes // 16) * 16
        assert len(blocks) <= FAR_BLOCKS and self._used_bytes <= APART_BYTES and FAR_BLOCK * strides[0] >= 2**31
        there[FAR_BLOCK:] = blocks.to(DEVICE)
        return there

    def store(self, far: FarBlocks) -> FarBlocks:
        """The same of a far store."""
        return FarBlocks(*(None if tensor is None else self.place(tensor) for tensor in far))


@pytest.fixture
def far_apart(monkeypatch: pytest.MonkeyPatch, poisoned_memory: None) -> FarApart:
    """What of it is never touched takes no memory, so it is not poisoned; what is allocated later is."""
    with monkeypatch.context() as patch:
        patch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
        return FarApart()


def past_int32(tables: Tensor, blocks: int) -> Tensor:
    """Block tables whose entries 1 … blocks − 1 point FAR_BLOCK further; what points nowhere stays as it is."""
    return torch.where((tables > 0) & (tables < blocks), tables + FAR_BLOCK, tables)


def moved(batch: Any) -> Any:
    """A dataclass of tensors, and of far blocks in `far`, with all of them on the device under test."""
    there: dict[str, Any] = {name: value.to(DEVICE) for name, value in vars(batch).items() if isinstance(value, Tensor)}
    if getattr(batch, "far", None) is not None:
        there["far"] = placed(batch.far)
    return replace(batch, **there)


def placed(far: ChosenFar) -> ChosenFar:
    """Chosen far blocks on the device under test."""
    store = FarBlocks(*(None if tensor is None else tensor.to(DEVICE) for tensor in far.blocks))
    return ChosenFar(store, *(tensor.to(DEVICE) for tensor in far[1:-1]), far.budget)


def check_error(actual: Tensor, expected: Tensor, plain: Tensor, dtype: torch.dtype) -> None:
    """The error rule: float32 within 1e-5 of the largest value; 16 bits at most twice as far from the float64 answer `expected` as the same
    computation in that type's plain torch, `plain`, and two roundings of each value besides."""
    assert actual.dtype == dtype and actual.shape == expected.shape and torch.isfinite(actual).all()
    if not expected.numel():
        return
    error = (actual.double() - expected.double()).abs()
    largest = expected.double().abs().max()
    if dtype == torch.float32:
        assert error.max() <= 1e-5 * largest.clamp(min=1e-30), f"off by {error.max():.3g}, largest value {largest:.3g}"
        return
    allowed = 2 * (plain.double() - expected.double()).abs().max() + 2 * torch.finfo(dtype).eps * expected.double().abs()
    assert (error <= allowed).all(), f"off by {error.max():.3g}, plain torch by {(plain.double() - expected.double()).abs().max():.3g}"
