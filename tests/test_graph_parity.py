"""Decode steps replayed from a recording against the same steps computed on the CPU, through router, planner and engine.

Where there is no device, a fake one stands for it (`tests/fake_cuda`): the launches of a replay have the arguments, grids and tensors of
the recording, as on a device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("triton")
pytest.importorskip("transformers")
pytest.importorskip("tokenizers")
pytest.importorskip("msgspec")
pytest.importorskip("prometheus_client")

from service.engine import decode_graphs, torch_backend
from service.engine.cuda_graph import CudaRecorder
from service.engine.decode_graphs import Recorder, Replay
from service.inputs.tokens import TokenCodec
from service.kernels.dispatch import require_steady
from service.schedulers.router import Model, Router
from service.telemetry import Telemetry
from service.types.kv_layout import FarSpec
from service.types.plan import Slice
from service.types.settings import AttentionSettings, SchedulerSettings
from tests.engine.test_far_choices import CONTEXT, anchors_of, layout_of
from tests.fake_cuda.device import DEVICE
from tests.fake_cuda.install import device_or_fake
from tests.inline_backend import InlineBackend
from tests.schedulers.support import metric
from tests.test_parity import collect, request_for
from tests.tiny_models import build_tiny

pytestmark = pytest.mark.timeout(300)
FAKE = not torch.cuda.is_available()
CUDA = torch.device("cuda:0")
LAYERS = 2
MIXED = {"use_sliding_window": True, "sliding_window": 70, "max_window_layers": 1}
FAR = AttentionSettings(attention_window=64, far_blocks=1, dense_layers=(0,))
CASES: dict[str, tuple[str, dict[str, Any], AttentionSettings]] = {
    "full": ("qwen3", {}, AttentionSettings()),
    "windows": ("qwen2", MIXED, AttentionSettings()),
    "far": ("llama", {}, FAR),
}
PROMPTS = (190, 40, 3)


@pytest.fixture(autouse=True)
def device() -> Iterator[None]:
    with device_or_fake():
        yield


@dataclass(frozen=True)
class Case:
    directory: Path
    attention: AttentionSettings


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    return make_case(request.param, tmp_path_factory.mktemp(request.param))


def make_case(name: str, place: Path) -> Case:
    family, changes, attention = CASES[name]
    return Case(build_tiny(place / "model", family, num_hidden_layers=LAYERS, max_position_embeddings=512, **changes), attention)


async def serve(
    case: Case,
    recorder: Recorder | None,
    lengths: Sequence[int] = PROMPTS,
    prepare: Callable[[InlineBackend], None] | None = None,
    **changes: Any,
) -> tuple[list[Any], InlineBackend, Telemetry]:
    """What the prompts are answered with, side by side: their tokens; on the CPU without a recorder."""
    telemetry, device = Telemetry(), CUDA if recorder else None
    attention = replace(case.attention, **changes)
    backend = InlineBackend(case.directory, attention=attention, device=device, recorder=recorder, max_rows=4)
    model = Model("tiny", backend.manifest, TokenCodec.load(case.directory), backend)
    router = Router([model], SchedulerSettings(batch_size=4, step_tokens=256), telemetry)
    await router.start()
    if prepare is not None:
        prepare(backend)
    generator = torch.Generator().manual_seed(4)
    prompts = [tuple(torch.randint(0, 256, (length,), generator=generator).tolist()) for length in lengths]
    streams = [router.submit([request_for(prompt, tokens=4 + 2 * at)])[0] for at, prompt in enumerate(prompts)]
    found = [await collect(stream) for stream in streams]
    await router.close()
    return [tokens for tokens, *_ in found], backend, telemetry


class Recording(CudaRecorder):
    """Counts the graphs that it makes."""

    recorded = 0

    def record(self, work: Callable[[], torch.Tensor]) -> Replay:
        replay = super().record(work)
        self.recorded += 1
        return replay


async def test_every_kernel_is_used_before_the_first_request(tmp_path: Path) -> None:
    """A slice and decoding rows behind the window, recorded and replayed; requests then get what they get without it."""
    case, recorder, used = make_case("far", tmp_path), Recording(), set[str]()

    def prepare(backend: InlineBackend) -> None:
        with pytest.MonkeyPatch.context() as patch:
            taken = torch_backend.take_counts
            patch.setattr(torch_backend, "take_counts", lambda: used.update(op for op, _ in taken()))
            backend.engine.compile_kernels()

    found, _, telemetry = await serve(case, recorder, (3,), prepare)
    assert found == (await serve(case, None, (3,)))[0]
    assert used >= {"paged_attention", "rotate_write", "choose_far", "window_sparse_attention", "demote", "sample"}
    assert metric(telemetry, "decode_graph_steps_total", how="recorded") == 0 < recorder.recorded, "one row was recorded before"


@pytest.mark.parametrize("steady", [False, pytest.param(True, marks=pytest.mark.slow)])
async def test_a_replay_gives_what_the_step_gives(case: Case, steady: bool) -> None:
    """Three sequences of which two go on when one has ended: steps for four rows, of which one is a copy, then two, then one."""
    expected, plain, by_hand = await serve(case, None)
    kept = [tensor.clone() for store in plain.pool.stores for tensor in store]
    recorder = Recording()
    require_steady(steady)  # --deterministic
    try:
        found, backend, telemetry = await serve(case, recorder, prepare=lambda _: DEVICE.waits.clear())
    finally:
        require_steady(False)
    assert found == expected and [len(tokens) for tokens in found] == [4, 6, 8]
    how = {label: metric(telemetry, "decode_graph_steps_total", how=label) for label in ("recorded", "replayed", "prefill")}
    assert how["recorded"] == recorder.recorded >= 2 and how["replayed"] >= 3 and how["prefill"] >= 1
    assert metric(telemetry, "far_blocks_read_total") == metric(by_hand, "far_blocks_read_total")
    assert (metric(by_hand, "far_blocks_read_total") > 0) == bool(case.attention.far_blocks)
    # One for the tokens of each step, and two for the table of angles that the first one makes.
    assert not FAKE or 0 < DEVICE.waits.total() <= backend.steps + 2, f"more waits than steps: {DEVICE.waits}"
    for before, after in zip(kept, (tensor.cpu() for store in backend.pool.stores for tensor in store), strict=True):
        # Poison included: rows that only fill the recording up have written nowhere.
        assert torch.allclose(before, after, rtol=0, atol=1e-5, equal_nan=True) and after.isnan().any()
    share = LAYERS if case.attention.far_blocks else 1  # one of the layers is dense there
    attends = "window_sparse_attention" if case.attention.far_blocks else "paged_attention"
    calls = [metric(of, "kernel_dispatch_total", op=attends) for of in (by_hand, telemetry)]
    assert calls[0] == calls[1] == metric(telemetry, "kernel_dispatch_total", op="rotate_write", implementation="triton") / share > 0


class Waiting(Recording):
    """Reads a value while it records, which no graph can have."""

    def record(self, work: Callable[[], torch.Tensor]) -> Replay:
        return super().record(lambda: work() * work().sum().item())


@pytest.mark.parametrize("why", ["failed", "full", "long", "refresh"])
async def test_what_is_not_recorded_is_computed_and_counted(
    why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    case = make_case("far" if why == "refresh" else "full", tmp_path)
    changes = {"far_refresh": 4} if why == "refresh" else {}
    monkeypatch.setattr(decode_graphs, "MOST_SPLITS", 0 if why == "long" else 4096)
    monkeypatch.setattr(decode_graphs, "MOST_GRAPHS", 1 if why == "full" else 32)
    recorder = Waiting() if why == "failed" else Recording()
    expected, *_ = await serve(case, None, (40, 3, 5), **changes)
    found, _, telemetry = await serve(case, recorder, (40, 3, 5), **changes)
    assert found == expected and metric(telemetry, "decode_graph_steps_total", how=why) > 0
    assert ("are not recorded" in capfd.readouterr().err) == (why == "failed")
    replayed = metric(telemetry, "decode_graph_steps_total", how="replayed")
    assert (replayed > 0) == (why == "full")


def test_a_token_of_a_prompt_that_reads_all_far_blocks_is_not_replayed() -> None:
    """The recording has room for the budget of generated tokens."""
    layout, slices = layout_of(FarSpec(blocks=2, dense_prompts=True)), [Slice(0, 100, 1, 0), Slice(1, 80, 1, 0)]
    pool, decoder = SimpleNamespace(layout=layout), SimpleNamespace(device=CUDA)
    for prompt, why in ((CONTEXT, "prompt"), (80, None)):
        _, tables = anchors_of(layout, slices, prompt)
        graphs = decode_graphs.DecodeGraphs(decoder, pool, Recording(), 4, CONTEXT, lambda: None)  # type: ignore[arg-type]
        graphs._replayed = lambda *_: torch.zeros(2, 8)  # type: ignore[method-assign]
        found = graphs.hidden(tables.batch(slices), False)
        assert (found is None) == (why == "prompt") and dict(graphs.take_counts()).get("prompt", 0) == (why == "prompt")
