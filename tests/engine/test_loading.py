"""Which device and which type a worker computes in, and that what it computes in 16 bits is close."""

from __future__ import annotations

import platform
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from service.checkpoints.manifest import read_manifest
from service.checkpoints.quantisation import weight_bytes
from service.engine import loading
from service.engine.loading import choose_device, choose_dtype, choose_quantize, load_backend
from service.engine.memory import resident_bytes, settled_bytes
from service.types.catalog import V1_0, V2_3, V4_8
from service.types.errors import CapacityError
from service.types.model_spec import ELEMENT_BYTES
from service.types.plan import BatchPlan, BlockAppend, LoadRequest, OpenSequence, Slice, Want
from service.types.request import Sampling, Stop
from service.types.settings import AttentionSettings

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
FREE = V2_3.spec(V2_3.shapes[0][1])
FIXED = V1_0.spec(V1_0.shapes[0][1])
STOP = Stop(max_tokens=9)


def test_an_explicit_type_beats_the_line_and_the_device() -> None:
    assert choose_dtype("float16", FIXED, CPU, "bfloat16") == "float16"
    assert choose_dtype("bfloat16", FREE, CPU, "float32") == "bfloat16"


def test_the_light_line_is_served_in_int8_where_products_are() -> None:
    light = V4_8.spec(V4_8.shapes[0][1])
    assert [choose_quantize(name, light, CPU) for name in ("auto", "none", "int4")] == ["int8", "none", "int4"]
    assert choose_quantize("auto", light, CUDA) == "none" and choose_quantize("auto", FREE, CPU) == "none"


def test_the_line_beats_the_device() -> None:
    assert choose_dtype("auto", FIXED, CUDA, "bfloat16") == "float32"
    half = replace(FREE, precision=replace(FREE.precision, compute="bfloat16"))
    assert choose_dtype("auto", half, CPU, "float32") == "bfloat16"


@pytest.mark.parametrize(("units", "expected"), [(True, "bfloat16"), (False, "float32")])
def test_a_cpu_takes_bfloat16_only_with_units_for_it(monkeypatch: pytest.MonkeyPatch, units: bool, expected: str) -> None:
    monkeypatch.setattr(loading, "computes_bfloat16", lambda: units)
    assert choose_dtype("auto", FREE, CPU, "float16") == expected


def test_quantised_weights_compute_in_float32_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "computes_bfloat16", lambda: True)
    assert choose_dtype("auto", FREE, CPU, "bfloat16", "int8") == "float32"
    assert choose_dtype("bfloat16", FREE, CPU, "bfloat16", "int8") == "bfloat16"


@pytest.mark.parametrize("asked", ["auto", "int8", "int4", "none"])
def test_a_worker_quantises_as_it_is_told(full_model: str, tmp_path: Path, asked: str, monkeypatch: pytest.MonkeyPatch) -> None:
    request = LoadRequest(
        str(full_model), kv_bytes=1 << 20, context_tokens=128, quantize=asked, quantize_cache=str(tmp_path), quantize_cache_bytes=1 << 30
    )
    info = load_backend(request, 0.0, lambda phase, done: None).info
    quantize = "none" if asked == "auto" else asked
    assert info.quantize == quantize
    spec = read_manifest(Path(full_model)).spec
    assert dict(info.memory_bytes)["weights"] == weight_bytes(spec, ELEMENT_BYTES[info.dtype], quantize)
    assert len(list(tmp_path.iterdir())) == (0 if quantize == "none" else 1)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries have no call for it")
@pytest.mark.parametrize(
    ("threads", "deterministic", "told"), [(0, False, "1, up to 2 in steps of many tokens"), (1, False, "1"), (0, True, "1")]
)
def test_threads_follow_the_rows_of_a_step(full_model, monkeypatch, threads: int, deterministic: bool, told: str) -> None:
    """Not where they are given, nor where a row must have the bits that it has alone."""
    monkeypatch.setattr("service.processor.usable_cores", lambda: 2)
    monkeypatch.setattr("service.processor._STEP_PRODUCTS", 1e6)
    before = torch.get_num_threads()
    try:
        request = LoadRequest(
            str(full_model), device="cpu", dtype="float32", threads=threads, deterministic=deterministic, kv_bytes=1 << 22
        )
        loaded = load_backend(request, 0.0, lambda *_: None)
        assert loaded.info.kernels.endswith(f"threads: {told}")
        opened = OpenSequence(0, (1,) * 40, 40, Sampling(temperature=0.0), STOP)
        entries = BlockAppend(0, 0, 0, (1,))
        loaded.backend.execute(BatchPlan(0, open=(opened,), append=(entries,), slices=(Slice(0, 0, 40, Want.TOKEN),)))
        assert torch.get_num_threads() == (2 if told.startswith("1, up") else 1)
    finally:
        torch.set_num_threads(before)


def test_what_loading_frees_is_given_back(full_model: str) -> None:
    """Holes of 60 MiB, made while weights are read, are gone when the model is loaded, and count for nothing in what is reported."""
    kept: list[bytes] = []

    def leave_holes(phase: str, done: float) -> None:
        if not kept:
            kept.extend([b"x" * (64 << 10) for _ in range(1024)][::16])

    request = LoadRequest(str(full_model), kv_bytes=1 << 20, context_tokens=128, quantize="none")
    first = load_backend(request, 0.0, lambda phase, done: None)
    before = settled_bytes()
    second = load_backend(request, 0.0, leave_holes)
    assert len(kept) == 64
    assert resident_bytes() - before < 30 << 20
    assert dict(second.info.memory_bytes)["runtime"] - dict(first.info.memory_bytes)["runtime"] < 30 << 20


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
    with pytest.raises(CapacityError, match="set --device cpu or auto, or another --tier than gpu"):
        choose_device("cuda:1")


def test_keys_and_values_in_16_bits_are_for_a_cpu(full_model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "choose_device", lambda name: CUDA)
    with pytest.raises(CapacityError, match="--kv_cache_dtype bfloat16 is for a CPU"):
        load_backend(LoadRequest(str(full_model), kv_cache_dtype="bfloat16"), 0.0, lambda *_: None)


def test_int8_keys_and_values_are_for_a_cpu_and_beside_quantised_far_blocks(full_model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    far = AttentionSettings(attention_window=64, kv_far="bf16")
    with pytest.raises(CapacityError, match="int8 does not go with --kv_far bf16"):
        load_backend(LoadRequest(str(full_model), device="cpu", kv_cache_dtype="int8", attention=far), 0.0, lambda *_: None)
    monkeypatch.setattr(loading, "choose_device", lambda name: CUDA)
    with pytest.raises(CapacityError, match="int8 is for a CPU: set fp8"):
        load_backend(LoadRequest(str(full_model), kv_cache_dtype="int8"), 0.0, lambda *_: None)


def test_eight_bits_are_for_a_gpu_that_has_them(full_model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CapacityError, match="fp8 is for a GPU: set bfloat16"):
        load_backend(LoadRequest(str(full_model), device="cpu", kv_cache_dtype="fp8"), 0.0, lambda *_: None)
    monkeypatch.setattr(loading, "choose_device", lambda name: CUDA)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
    with pytest.raises(CapacityError, match=r"8\.9 or higher"):
        load_backend(LoadRequest(str(full_model), kv_cache_dtype="fp8"), 0.0, lambda *_: None)


@pytest.mark.parametrize(("pairs", "kept"), [(True, "bfloat16"), (False, "float32")])
def test_keys_and_values_beside_quantised_weights(full_model, monkeypatch, pairs: bool, kept: str) -> None:
    """auto is bfloat16 where the processor multiplies it; what was asked for stays, and so does what is not quantised."""
    monkeypatch.setattr(loading, "multiplies_bfloat16", lambda: pairs)
    request = LoadRequest(str(full_model), device="cpu", dtype="float32", threads=1, kv_bytes=8 << 20, max_rows=2)
    for asked, quantize, expected in (("auto", "int8", kept), ("auto", "none", "float32"), ("float32", "int8", "float32")):
        loaded = load_backend(replace(request, quantize=quantize, quantize_cache="none", kv_cache_dtype=asked), 0.0, lambda *_: None)
        assert loaded.info.kv_cache_dtype == expected
        assert loaded.backend._pool.blocks_of(0)[0].dtype == getattr(torch, expected)


@pytest.mark.parametrize(
    ("dtype", "kept", "tolerance"),
    [
        ("float32", "auto", 1e-4),
        ("float16", "auto", 0.03),
        ("bfloat16", "auto", 0.2),
        ("float32", "float16", 0.01),
        ("float32", "bfloat16", 0.1),
        ("float32", "int8", 0.1),
        ("bfloat16", "float32", 0.2),
    ],
)
def test_sixteen_bit_models_stay_close_to_float32_in_prefill_and_decode(mixed_model, mixed_dense, dtype, kept, tolerance) -> None:
    tokens = tuple(np.random.default_rng(3).integers(0, 331, 150).tolist())
    request = LoadRequest(str(mixed_model), dtype=dtype, threads=1, kv_bytes=8 << 20, max_rows=2, kv_cache_dtype=kept)
    loaded = load_backend(request, 0.0, lambda *_: None)
    assert (loaded.info.dtype, loaded.info.kv_cache_dtype) == (dtype, dtype if kept == "auto" else kept)
    greedy = Sampling(temperature=0, logprobs=0)
    opening = [OpenSequence(row, part, len(part), greedy, STOP, 0) for row, part in enumerate((tokens, tokens[:7]))]
    blocks = [BlockAppend(row, group, 0, ids) for group in (0, 1) for row, ids in enumerate(((1, 2, 3), (4,)))]
    slices = (Slice(0, 0, 150, Want.TOKEN | Want.PROMPT_LOGPROBS), Slice(1, 0, 7, Want.TOKEN))
    first = loaded.backend.execute(BatchPlan(1, slices, open=tuple(opening), append=tuple(blocks)))
    scores = np.array([entry.logprob for entry in first.prompt_logprobs[0].logprobs])
    assert np.abs(scores - mixed_dense.log_probs(tokens)[np.arange(149), tokens[1:]]).max() < tolerance
    second = loaded.backend.execute(BatchPlan(2, (Slice(0, 150, 1, Want.TOKEN), Slice(1, 7, 1, Want.TOKEN))))
    for part, before, after in zip((tokens, tokens[:7]), first.tokens, second.tokens, strict=True):
        expected = mixed_dense.log_probs((*part, before.token))[-1]
        assert after.logprob is not None and abs(after.logprob.logprob - expected[after.token]) < tolerance
