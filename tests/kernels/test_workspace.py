"""Scratch buffers: grown, reused, one set a thread, usable in and out of inference mode."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import torch

from service.kernels.workspace import Workspace
from tests.kernels.conftest import untouched


def test_buffers_are_reused_and_grow() -> None:
    workspace = Workspace()
    first = workspace.take("scores", 4, 8)
    assert first.shape == (4, 8)
    assert workspace.take("scores", 2, 3).data_ptr() == first.data_ptr()
    assert workspace.take("scores", 5, 8).shape == (5, 8)
    assert workspace.take("blocks", 4, 8).data_ptr() != workspace.take("scores", 4, 8).data_ptr()
    assert workspace.bytes == (5 * 8 + 4 * 8) * 4


def test_a_buffer_made_in_inference_mode_can_be_written_outside() -> None:
    workspace = Workspace()
    with torch.inference_mode():
        workspace.take("scores", 4).zero_()
    assert workspace.take("scores", 4).fill_(1.0).sum() == 4


def test_each_thread_has_its_own() -> None:
    workspace = Workspace()
    mine = workspace.take("scores", 4).data_ptr()
    with ThreadPoolExecutor(1) as pool:
        theirs = pool.submit(lambda: workspace.take("scores", 4)).result()
    assert theirs.data_ptr() != mine


def test_memory_that_tests_poison_is_poisoned(nan_memory: None) -> None:
    workspace = Workspace()
    assert workspace.take("scores", 4).zero_().any() == 0 and workspace.take("scores", 4).isnan().all()
    assert torch.ones(2).new_empty(3).isnan().all() and torch.empty(3, dtype=torch.int32).eq(2**31 - 1).all()
    assert untouched(1, dtype=torch.int32).shape == (1,)
