"""The whole engine on a GPU, loaded as a worker loads it: its answers are those of the engine on the CPU.

Where there is no device, a fake one stands for it (`tests/fake_cuda`): it refuses what a device refuses, and counts who waits for it. The
kernels are interpreted there, or with EMULATE_SM compiled and emulated.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("triton")
pytest.importorskip("transformers")
pytest.importorskip("tokenizers")
pytest.importorskip("msgspec")
pytest.importorskip("prometheus_client")

from service.engine import limits
from service.engine.loaded import read_as_served
from service.engine.loading import load_backend
from service.inputs.tokens import TokenCodec
from service.schedulers.router import Model, Router
from service.telemetry import Telemetry
from service.types.catalog import LINES
from service.types.plan import BackendInfo, LoadRequest
from service.types.request import GenerationRequest, Sampling
from service.types.settings import AttentionSettings, SchedulerSettings
from tests.fake_cuda.device import DEVICE
from tests.fake_cuda.install import device_or_fake
from tests.inline_backend import Inline
from tests.schedulers.support import metric
from tests.test_image_parity import image_at, prompt_of
from tests.test_parity import collect, request_for
from tests.tiny_models import FAMILIES, build_tiny, build_tiny_line

pytestmark = pytest.mark.timeout(600)
FAKE = not torch.cuda.is_available()
FAR = {"attention_window": 64, "far_blocks": 1}


@dataclass(frozen=True)
class Case:
    """A checkpoint, a family's or a line's, and how it is loaded."""

    model: str
    attention: dict[str, Any] = field(default_factory=dict)
    request: dict[str, Any] = field(default_factory=dict)

    def build(self, directory: Path) -> Path:
        if self.model in FAMILIES:
            windows = {"use_sliding_window": True, "sliding_window": 70, "max_window_layers": 1} if self.model == "qwen2" else {}
            return build_tiny(directory, self.model, max_position_embeddings=512, **windows)
        return build_tiny_line(directory, next(line for line in LINES if line.number == self.model))


QUICK = {"far": Case("llama", FAR)}
SLOW = {
    **{family: Case(family) for family in FAMILIES},
    **{f"v{line.number}": Case(line.number) for line in LINES},
    "v5.2-far": Case("5.2", FAR),
    "far-int4": Case("qwen3", {**FAR, "kv_far": "int4", "far_refresh": 16}),
    "far-bf16": Case("mistral", {**FAR, "kv_far": "bf16", "dense_layers": (0,)}),
    "far-evict": Case("llama", {"attention_window": 64, "kv_far": "evict"}),
    "far-dense-prompts": Case("llama", {**FAR, "prefill": "dense"}),
    "deterministic": Case("llama", FAR, {"deterministic": True}),
    "deterministic-v5.2": Case("5.2", FAR, {"deterministic": True}),
    "float16": Case("llama", FAR, {"dtype": "float16"}),
    "without-graphs": Case("llama", FAR, {"cuda_graphs": "off"}),
}


class Loaded(Inline):
    """A worker's engine without the process."""

    def __init__(self, request: LoadRequest) -> None:
        super().__init__(frozenset())
        self._request = request

    async def start(self) -> BackendInfo:
        loaded = load_backend(self._request, 0.0, lambda phase, done: None)
        self.engine, self.starts = loaded.backend, self.starts + 1
        self.info = loaded.info
        DEVICE.waits.clear()
        return loaded.info


def requests(model: str) -> list[GenerationRequest]:
    """Greedy, drawn and penalised ones, one with log-probs of its prompt, one with an image where the model reads them."""
    draw = np.random.default_rng(2)
    first, second, third, fourth = (tuple(draw.integers(0, 256, length).tolist()) for length in (150, 40, 3, 70))
    found = [
        request_for(first, tokens=4),
        request_for(second, tokens=6, sampling=Sampling(seed=5, temperature=0.8, top_p=0.9, top_k=40)),
        request_for(third, tokens=8, sampling=Sampling(seed=6, presence_penalty=1.0, logprobs=2)),
        request_for(fourth, tokens=2, scored=True),
    ]
    if model in ("3.5", "5.2"):
        prompt, images = prompt_of(20, image_at(0, 3, 4, 1), 30)
        found[3] = request_for(prompt, tokens=3, images=images)
    return found


async def answers(case: Case, directory: Path, device: str) -> tuple[list[tuple[Any, ...]], Loaded, Telemetry]:
    """Tokens and log-probs of all requests, side by side."""
    sizes = {"max_rows": 4, "max_step_tokens": 128, "kv_bytes": 16 << 20, "threads": 1}
    base = LoadRequest(str(directory), device=device, dtype="float32", quantize="none", **sizes)
    backend = Loaded(replace(base, attention=AttentionSettings(**case.attention), **case.request))
    telemetry = Telemetry()
    model = Model("tiny", read_as_served(backend._request), TokenCodec.load(directory), backend)
    router = Router([model], SchedulerSettings(batch_size=4, step_tokens=128), telemetry)
    await router.start()
    found = [await collect(stream) for stream in [router.submit([request])[0] for request in requests(case.model)]]
    await router.close()
    return found, backend, telemetry


@pytest.fixture(autouse=True)
def device(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(limits, "_CUDA_BYTES", 1 << 16)
    monkeypatch.setattr(limits, "_CUDA_WIDTH", 32)
    with device_or_fake(divmod(int(os.environ.get("EMULATE_SM", "90")), 10)):
        yield


@pytest.mark.parametrize("name", [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)])
async def test_answers_are_those_of_the_cpu(name: str, tmp_path: Path) -> None:
    case = {**QUICK, **SLOW}[name]
    directory = case.build(tmp_path / "model")
    expected, plain, by_hand = await answers(replace(case, request={}), directory, "cpu")
    found, backend, telemetry = await answers(case, directory, "cuda")
    half = case.request.get("dtype") == "float16"
    for (tokens, logprobs, end), (same, scores, also) in zip(found, expected, strict=True):
        assert (tokens == same or half) and end.reason is also.reason and len(tokens) == len(same)
        assert np.abs(logprobs - scores).max(initial=0) <= (0.05 if half else 1e-4)
    info, kind = backend.info, "float16" if half else "float32"
    assert info.tier == "gpu" and info.dtype == kind and info.limits is not None and info.limits != plain.info.limits
    assert metric(telemetry, "far_blocks_read_total") == metric(by_hand, "far_blocks_read_total")
    replayed = metric(telemetry, "decode_graph_steps_total", how="replayed")
    assert (replayed > 0) == (case.request.get("cuda_graphs") != "off" and "far_refresh" not in case.attention)
    attended = ("paged_attention", "window_sparse_attention", "attend_images", "sample")
    assert {name for operation, name in info.dispatch if operation.startswith(attended)} == {"triton"}
    seen = metric(telemetry, "kernel_dispatch_total", op="attend_images", implementation="triton")
    assert (seen > 0) == (case.model in ("3.5", "5.2"))
    if FAKE and not seen:
        # For the tokens of each step, and once more in steps with a row that needs its logits on the host or a scored prompt.
        assert backend.steps <= DEVICE.waits.total() <= 2 * backend.steps, DEVICE.waits
