"""Which device and which type a worker computes in."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from service.engine import loading
from service.engine.loading import choose_device, choose_dtype
from service.types.catalog import V1_0, V2_3
from service.types.errors import CapacityError

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
FREE = V2_3.spec(V2_3.shapes[0][1])
FIXED = V1_0.spec(V1_0.shapes[0][1])


def test_an_explicit_type_beats_the_line_and_the_device() -> None:
    assert choose_dtype("float16", FIXED, CPU, "bfloat16") == "float16"
    assert choose_dtype("bfloat16", FREE, CPU, "float32") == "bfloat16"


def test_the_line_beats_the_device() -> None:
    assert choose_dtype("auto", FIXED, CUDA, "bfloat16") == "float32"
    half = replace(FREE, precision=replace(FREE.precision, compute="bfloat16"))
    assert choose_dtype("auto", half, CPU, "float32") == "bfloat16"


@pytest.mark.parametrize(("units", "expected"), [(True, "bfloat16"), (False, "float32")])
def test_a_cpu_takes_bfloat16_only_with_units_for_it(monkeypatch: pytest.MonkeyPatch, units: bool, expected: str) -> None:
    monkeypatch.setattr(loading, "_cpu_computes_bfloat16", lambda: units)
    assert choose_dtype("auto", FREE, CPU, "float16") == expected


@pytest.mark.parametrize(
    ("stored", "supported", "expected"),
    [
        ("float16", True, "float16"),
        ("bfloat16", True, "bfloat16"),
        ("float32", True, "bfloat16"),
        ("bfloat16", False, "float16"),
        ("float32", False, "float16"),
    ],
)
def test_a_gpu_takes_the_16_bit_type_of_the_weights(monkeypatch: pytest.MonkeyPatch, stored: str, supported: bool, expected: str) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: supported)
    assert choose_dtype("auto", FREE, CUDA, stored) == expected


def test_a_device_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device("auto") == CPU
    with pytest.raises(CapacityError, match="No CUDA device"):
        choose_device("cuda:1")
