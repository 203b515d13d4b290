"""The GPU kernels run on the device where there is one, else in Triton's interpreter on CPU tensors: same tests, smaller shapes.

The interpreter (tests/conftest.py chooses it before triton is imported) computes bfloat16 wrongly: that type is tested on a device only.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from service.kernels.reference_sparse import ChosenFar, FarBlocks

ON_DEVICE = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_DEVICE else "cpu")
DTYPES = (torch.float32, torch.float16, torch.bfloat16) if ON_DEVICE else (torch.float32, torch.float16)


def pytest_configure(config: pytest.Config) -> None:
    """A GPU machine may lack the plugin that knows this mark; there it means nothing."""
    config.addinivalue_line("markers", "timeout(seconds): the longest that a test may take")


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


def moved(batch: Any) -> Any:
    """A dataclass of tensors, and of far blocks in `far`, with all of them on the device under test."""
    there: dict[str, Any] = {name: value.to(DEVICE) for name, value in vars(batch).items() if isinstance(value, Tensor)}
    if getattr(batch, "far", None) is not None:
        there["far"] = placed(batch.far)
    return replace(batch, **there)


def placed(far: ChosenFar) -> ChosenFar:
    """Chosen far blocks on the device under test."""
    store = FarBlocks(*(None if tensor is None else tensor.to(DEVICE) for tensor in far.blocks))
    return ChosenFar(store, *(tensor.to(DEVICE) for tensor in far[1:]))


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
