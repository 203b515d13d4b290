"""What a machine can do: given numbers are taken, others measured, and measured by doing as much as is claimed."""

from __future__ import annotations

import pytest
import torch

from service.engine import limits
from service.engine.loading import load_backend
from service.types.plan import LoadRequest

CPU = torch.device("cpu")


def test_given_limits_are_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "_best", None)
    assert limits.machine_limits(CPU, torch.float32, (3e9, 4e10)) == (("bytes", 3e9), ("flops", 4e10))


def test_a_measured_limit_is_work_over_the_time_of_the_best_round(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four rounds whose clock says 9, 5, 2 and 3 seconds: the first only warms up, the best is 2."""
    clock = iter([0.0, 9.0, 10.0, 15.0, 20.0, 22.0, 30.0, 33.0])
    monkeypatch.setattr(limits.time, "perf_counter", lambda: next(clock))
    assert limits.bytes_a_second(CPU) == (96 << 20) / 2
    clock = iter([0.0, 9.0, 10.0, 15.0, 20.0, 22.0, 30.0, 33.0])
    assert limits.flops_a_second(CPU, torch.float32) == 2 * 768**3 / 2


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_worker_says_what_its_machine_can_do(full_model, dtype) -> None:
    request = LoadRequest(str(full_model), dtype=dtype, threads=1, kv_bytes=8 << 20, max_rows=2, machine_limits=(0.0, 7e9))
    info = load_backend(request, 0.0, lambda *_: None).info
    assert dict(info.limits)["flops"] == 7e9
    assert 1e8 < dict(info.limits)["bytes"] < 1e13
    assert "limits" in dict(info.phases_s)


def test_where_weights_are_quantised_the_operations_are_those_of_int8_products(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "int8_operations_a_second", lambda device, dtype: 7.0)
    cpu = torch.device("cpu")
    assert dict(limits.machine_limits(cpu, torch.float32, (1.0, 0.0), "int8")) == {"bytes": 1.0, "flops": 7.0}
    assert dict(limits.machine_limits(cpu, torch.float32, (1.0, 2.0), "int8")) == {"bytes": 1.0, "flops": 2.0}


def test_int8_products_are_measured() -> None:
    assert limits.int8_operations_a_second(torch.device("cpu"), torch.float32) > 1e6
