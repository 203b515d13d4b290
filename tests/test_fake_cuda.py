"""The device that stands for a GPU in tests refuses what a GPU refuses, counts who waits for it, and replays as CUDA graphs do."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("triton")


import triton
import triton.language as tl

from service.engine.cuda_graph import CudaRecorder
from service.engine.upload import sendable, upload
from tests.fake_cuda.device import CUDA, DeviceError
from tests.fake_cuda.install import fake_cuda

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="a device is there")


@pytest.fixture(autouse=True)
def device() -> Iterator[Any]:
    with fake_cuda() as device:
        yield device


@triton.jit
def twice(p_x, p_y, BLOCK: tl.constexpr):
    o = tl.arange(0, BLOCK)
    tl.store(p_y + o, tl.load(p_x + o) * 2)


def test_it_leaves_nothing_behind() -> None:
    """Where there is a real device the same modules are imported, and torch's own factories must stay."""
    code = (
        "import torch; from tests.fake_cuda.install import fake_cuda\n"
        "has = torch._C._dispatch_has_kernel_for_dispatch_key\n"
        "def held():\n    return [has(f'aten::{name}', 'CUDA') for name in ('empty_strided', 'arange')]\n"
        "before = held()\n"
        "with fake_cuda():\n    assert torch.ones(2, device='cuda').is_cuda and torch.cuda.is_available() and all(held())\n"
        "assert before == held() == [False, False] and not torch.cuda.is_available()"
    )
    clean = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=clean)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.zeros(3, device=CUDA),
        lambda: torch.full((3,), 0.0, device="cuda"),
        lambda: torch.tensor([0.0, 0.0, 0.0], device="cuda"),
        lambda: torch.as_tensor(np.zeros(3), device="cuda"),
        lambda: torch.arange(3, device=CUDA) * 0.0,
        lambda: torch.from_numpy(np.zeros(3, np.float32)).to("cuda"),
        lambda: torch.nn.Parameter(torch.zeros(3)).to(torch.device("cuda")),
    ],
)
def test_every_way_to_make_a_tensor_leads_there(make: Callable[[], torch.Tensor]) -> None:
    with torch.inference_mode():
        made = make()
        assert made.device == CUDA and made.cpu().tolist() == [0.0] * 3 == made.tolist()


@pytest.mark.parametrize(
    "work",
    [
        lambda x: x + torch.ones(3),
        lambda x: torch.cat([x, torch.ones(3)]),
        lambda x: torch.ones(3).add_(x),
        lambda x: torch.nn.functional.linear(torch.ones(2, 3), x[None]),
        lambda x: x.index_select(0, torch.tensor([1])),
    ],
)
def test_tensors_of_both_sides_are_refused(work: Callable[[torch.Tensor], Any]) -> None:
    with torch.inference_mode(), pytest.raises(DeviceError, match="is on the host"):
        work(torch.ones(3, device=CUDA))


def test_its_values_are_not_the_host_s() -> None:
    with pytest.raises(TypeError, match="copy it to the host first"):
        torch.ones(3, device=CUDA).numpy()


def test_a_launch_over_the_host_s_memory_is_refused() -> None:
    x, y = torch.ones(4, device=CUDA), torch.empty(4, device=CUDA)
    assert y.isnan().all(), "poisoned"
    twice[(1,)](x, y, BLOCK=4)
    assert y.tolist() == [2.0] * 4
    with pytest.raises(ValueError, match="cpu tensor"):
        twice[(1,)](torch.ones(4), y, BLOCK=4)


@pytest.mark.parametrize(
    ("work", "waits"),
    [
        (lambda x: x.sum().item(), 1),
        (lambda x: x.tolist(), 1),
        (lambda x: bool(x.sum() > 1), 1),
        (lambda x: x[x > 0], 1),
        (lambda x: x.nonzero(), 1),
        (lambda x: x.cpu(), 1),
        (lambda x: torch.ones(3).copy_(x), 1),
        (lambda x: x.copy_(torch.ones(3)), 1),
        (lambda x: torch.ones(3).to(CUDA), 1),
        (lambda x: torch.ones(3).to(CUDA, non_blocking=True), 1),
        (lambda x: sendable(3, torch.float32, CUDA).to(CUDA, non_blocking=True), 0),
        (lambda x: x[torch.ones(2, dtype=torch.int64, device=CUDA)] * 2 + 1, 0),
        (lambda x: x.to(torch.float16).reshape(3, 1).expand(3, 4).contiguous(), 0),
    ],
)
def test_who_waits_is_counted_and_not_recorded(work: Callable[[torch.Tensor], Any], waits: int, device: Any) -> None:
    x = torch.ones(3, device=CUDA)
    with torch.inference_mode():
        device.waits.clear()
        work(x)
        assert device.waits.total() == waits
        if waits:
            with pytest.raises(DeviceError, match="not permitted when stream is capturing"):
                CudaRecorder().record(lambda: work(x))


def test_a_replay_reads_the_same_tensors_again() -> None:
    x, rows, y = torch.arange(6.0).to(CUDA).view(2, 3), torch.tensor([0, 0], device=CUDA), torch.empty(4, device=CUDA)

    def work() -> torch.Tensor:
        found = x[:, 1:].index_select(0, rows).mul_(2.0).view(-1) + 1
        twice[(1,)](found, y, BLOCK=4)
        return found + torch.zeros(4, device=CUDA)

    replay = CudaRecorder().record(work)
    x.add_(10)
    rows[1] = 1
    assert replay().tolist() == [23.0, 25.0, 29.0, 31.0] and y.tolist() == [46.0, 50.0, 58.0, 62.0]


def test_graphs_have_one_memory() -> None:
    """What one has made is there until another runs, and not before it ran itself."""
    x, made = torch.ones(2, device=CUDA), []
    replays = [CudaRecorder().record(lambda by=by: made.append(x * by) or made[-1]) for by in (2, 3)]
    assert made[0].isnan().all() and made[1].isnan().all()
    first = replays[0]()
    assert first.tolist() == [2.0, 2.0]
    assert replays[1]().tolist() == [3.0, 3.0] and first.isnan().all()


def test_an_upload_is_one_copy_that_nobody_waits_for(device: Any) -> None:
    arrays = (np.arange(3), np.ones((2, 5), np.int32).T, np.zeros(0, np.float64), np.array([True, False]), np.array([[0.5]], np.float32))
    found = upload(arrays, CUDA)
    assert not device.waits and len({tensor.held.untyped_storage().data_ptr() for tensor in found}) == 1
    for array, tensor in zip(arrays, found, strict=True):
        assert tensor.cpu().numpy().dtype == array.dtype and tensor.shape == array.shape and (tensor.cpu().numpy() == array).all()
        assert (tensor.data_ptr() - found[0].data_ptr()) % 16 == 0, "kernels would be compiled again"
    shared = upload(arrays[:1], torch.device("cpu"))[0]
    shared[0] = 7
    assert arrays[0][0] == 7


def test_what_is_sent_is_not_written(device: Any) -> None:
    there = torch.zeros(3, device=CUDA)
    for _ in range(2):
        sent = sendable(3, torch.float32, CUDA).fill_(1.0)
        there.copy_(sent, non_blocking=True)
    assert not device.waits and there.tolist() == [1.0] * 3
    there.copy_(sent, non_blocking=True)
    sent[0] = 3.0
    with pytest.raises(DeviceError, match="written while it was copied"):
        torch.cuda.synchronize()
