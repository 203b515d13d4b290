"""What `--deterministic` takes for granted is checked before anything is loaded, and refused in one sentence where it cannot hold."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from service.engine.deterministic import require_deterministic
from service.engine.loading import load_backend
from service.kernels import dispatch
from service.kernels.dispatch import TABLE, chosen, require_steady, resolve
from service.kernels.native import binding
from service.models.layers import Kernels
from service.types.errors import CapacityError
from service.types.plan import LoadRequest
from tests.kernels.conftest import needs_native

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True)
def freely() -> Iterator[None]:
    yield
    require_steady(False)


@needs_native
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("quantize", ["none", "int8", "int4"])
def test_a_cpu_with_compiled_kernels_can(dtype: torch.dtype, quantize: str) -> None:
    require_deterministic(CPU, dtype, quantize)
    for operation in ("linear", "pack_linear", "pack_small_linear", "head_gate", "attend_images", "paged_attention"):
        resolve(operation, CPU, dtype)
    kind = str(dtype).removeprefix("torch.")
    names = {key.partition("[")[0]: name for key, name in chosen().items() if key.endswith(f"[cpu,{kind}]")}
    steady = {operation: {found.name for found in TABLE[operation] if found.steady} for operation in names}
    assert names["linear"] == "ordered" and all(names[operation] in steady[operation] for operation in names)


def test_without_compiled_kernels_it_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(binding, "absent", lambda: "the compiled kernels were not built")
    with pytest.raises(CapacityError, match=r"--deterministic cannot hold.*linear: the compiled kernels were not built.*leave it out"):
        require_deterministic(CPU, torch.float32, "none")


def test_a_gpu_can_where_every_kernel_is_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "_triton", lambda: True)
    require_deterministic(CUDA, torch.bfloat16, "none")
    require_deterministic(CUDA, torch.bfloat16, "int8")
    with pytest.raises(CapacityError, match="4-bit weights go through torch's own product"):
        require_deterministic(CUDA, torch.bfloat16, "int4")
    Kernels.resolve(CUDA, torch.bfloat16)
    require_steady(False)
    monkeypatch.setattr(dispatch, "_triton", lambda: False)
    with pytest.raises(CapacityError, match="triton is not installed"):
        require_deterministic(CUDA, torch.bfloat16, "none")


@needs_native
@pytest.mark.parametrize("deterministic", [True, False])
def test_a_worker_loads_what_it_is_told(full_model: str, deterministic: bool) -> None:
    require_steady(not deterministic)
    loaded = load_backend(LoadRequest(full_model, context_tokens=128, kv_bytes=1 << 20, deterministic=deterministic), 0.0, lambda *_: None)
    names = {key.partition("[")[0]: name for key, name in loaded.info.dispatch}
    assert (names["linear"] == "ordered") == deterministic
    assert names["pack_small_linear"] == "ordered" or not deterministic


@needs_native
def test_a_worker_refuses_before_it_loads(full_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(binding, "absent", lambda: "nothing here")
    with pytest.raises(CapacityError, match="--deterministic cannot hold"):
        load_backend(LoadRequest(str(full_model), deterministic=True), 0.0, lambda *_: None)
