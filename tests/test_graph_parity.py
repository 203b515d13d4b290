"""Decode steps replayed from a recording against the same steps computed one by one, through router, planner and engine.

The GPU's kernels run in Triton's interpreter and a tape stands in for the CUDA graph (`tests/tape.py`): the launches of a replay have the
arguments, grids and tensors of the recording, as on a device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from service.engine import decode_graphs, torch_backend
from service.engine.decode_graphs import Recorder
from service.inputs.tokens import TokenCodec
from service.kernels import dispatch
from service.kernels.choices import Dispatch
from service.schedulers.router import Model, Router
from service.telemetry import Telemetry
from service.types.kv_layout import FarSpec
from service.types.plan import Slice
from service.types.settings import AttentionSettings, SchedulerSettings
from tests.engine.test_far_choices import CONTEXT, anchors_of, layout_of
from tests.inline_backend import InlineBackend
from tests.schedulers.support import metric
from tests.tape import Tape
from tests.test_parity import collect, request_for
from tests.tiny_models import build_tiny

pytestmark = pytest.mark.timeout(300)
LAYERS = 2
MIXED = {"use_sliding_window": True, "sliding_window": 70, "max_window_layers": 1}
FAR = AttentionSettings(attention_window=64, far_blocks=1, dense_layers=(0,))
CASES: dict[str, tuple[str, dict[str, Any], AttentionSettings]] = {
    "full": ("qwen3", {}, AttentionSettings()),
    "windows": ("qwen2", MIXED, AttentionSettings()),
    "far": ("llama", {}, FAR),
}
PROMPTS = (190, 40, 3)
# Operations whose launches are those of the GPU; all others are plain torch, which the tape writes down too and which is faster here.
LAUNCHED = {
    "rotate_write",
    "paged_attention",
    "choose_far",
    "window_sparse_attention",
    "demote",
    "plan_attention",
    "plan_sparse",
    "plan_decode",
}


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


@contextmanager
def kernels_of_a_gpu(plans: str) -> Iterator[None]:
    """Attention as a GPU computes it, and all else by plain torch. `tiles` are the plans of --deterministic."""
    table = {}
    for operation, implementations in dispatch.TABLE.items():
        wanted = {plans, "triton"} if operation.startswith("plan_") else {"triton"}
        names = wanted if operation in LAUNCHED else {"torch", "plain", "separate"}
        found = [choice for choice in implementations if choice.name in names]
        table[operation] = tuple(replace(choice, refuses=lambda place: None) for choice in found[-1:]) or implementations
    choices = Dispatch(table)
    with pytest.MonkeyPatch.context() as patch:
        for name in ("resolve", "chosen_name", "apart", "again", "take_counts"):
            for module in _users(name):
                patch.setattr(module, name, getattr(choices, name))
        yield


def _users(name: str) -> Iterator[Any]:
    from service.engine import far_choices, kv_pool, paged_attend, torch_backend
    from service.models import layers

    for module in (decode_graphs, far_choices, kv_pool, paged_attend, torch_backend, layers):
        if hasattr(module, name):
            yield module


async def serve(
    case: Case,
    recorder: Recorder | None,
    lengths: Sequence[int] = PROMPTS,
    prepare: Callable[[InlineBackend], None] | None = None,
    **changes: Any,
) -> tuple[list[Any], InlineBackend, Telemetry]:
    """What the prompts are answered with, side by side: tokens and their log-probs."""
    telemetry = Telemetry()
    backend = InlineBackend(case.directory, attention=replace(case.attention, **changes), recorder=recorder, max_rows=4)
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


async def test_every_kernel_is_used_before_the_first_request(tmp_path: Path) -> None:
    """A slice and decoding rows behind the window, recorded and replayed; requests then get what they get without it."""
    case, tape, used = make_case("far", tmp_path), Tape(), set[str]()

    def prepare(backend: InlineBackend) -> None:
        with pytest.MonkeyPatch.context() as patch:
            taken = torch_backend.take_counts
            patch.setattr(torch_backend, "take_counts", lambda: used.update(op for op, _ in taken()))
            backend.engine.compile_kernels()

    with kernels_of_a_gpu("splits"):
        found, _, telemetry = await serve(case, tape, (3,), prepare)
    assert found == (await serve(case, None, (3,)))[0]
    assert used >= {"paged_attention", "rotate_write", "choose_far", "window_sparse_attention", "demote"}
    assert metric(telemetry, "decode_graph_steps_total", how="recorded") == 0 < tape.recorded, "one row was recorded before"


@pytest.mark.parametrize("plans", ["splits", pytest.param("tiles", marks=pytest.mark.slow)])
async def test_a_replay_gives_what_the_step_gives(case: Case, plans: str) -> None:
    """Three sequences of which two go on when one has ended: steps for four rows, of which one is a copy, then two, then one."""
    expected, plain, by_hand = await serve(case, None)
    kept = [tensor.clone() for store in plain.pool.stores for tensor in store]
    tape = Tape()
    with kernels_of_a_gpu(plans):
        found, backend, telemetry = await serve(case, tape)
    assert found == expected and [len(tokens) for tokens in found] == [4, 6, 8]
    assert tape.recorded >= 2 and tape.launches >= tape.recorded * LAYERS * 2
    how = {label: metric(telemetry, "decode_graph_steps_total", how=label) for label in ("recorded", "replayed", "prefill")}
    assert how["recorded"] == tape.recorded and how["replayed"] >= 3 and how["prefill"] >= 1
    assert metric(telemetry, "far_blocks_read_total") == metric(by_hand, "far_blocks_read_total")
    assert (metric(by_hand, "far_blocks_read_total") > 0) == bool(case.attention.far_blocks)
    for before, after in zip(kept, (tensor for store in backend.pool.stores for tensor in store), strict=True):
        # Poison included: rows that only fill the recording up have written nowhere.
        assert torch.allclose(before, after, rtol=0, atol=1e-5, equal_nan=True) and after.isnan().any()
    share = LAYERS if case.attention.far_blocks else 1  # one of the layers is dense there
    attends = "window_sparse_attention" if case.attention.far_blocks else "paged_attention"
    calls = [metric(of, "kernel_dispatch_total", op=attends) for of in (by_hand, telemetry)]
    assert calls[0] == calls[1] == metric(telemetry, "kernel_dispatch_total", op="rotate_write", implementation="triton") / share > 0


class Failing:
    """A device whose driver refuses."""

    def record(self, work: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
        work()
        raise RuntimeError("operation not permitted when stream is capturing")


@pytest.mark.parametrize("why", ["failed", "full", "long", "refresh"])
async def test_what_is_not_recorded_is_computed_and_counted(
    why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    case = make_case("far" if why == "refresh" else "full", tmp_path)
    changes = {"far_refresh": 4} if why == "refresh" else {}
    monkeypatch.setattr(decode_graphs, "MOST_SPLITS", 0 if why == "long" else 4096)
    monkeypatch.setattr(decode_graphs, "MOST_GRAPHS", 1 if why == "full" else 32)
    tape: Any = Failing() if why == "failed" else Tape()
    expected, *_ = await serve(case, None, (40, 3, 5), **changes)
    with kernels_of_a_gpu("splits"):
        found, _, telemetry = await serve(case, tape, (40, 3, 5), **changes)
    assert found == expected and metric(telemetry, "decode_graph_steps_total", how=why) > 0
    assert ("are not recorded" in capfd.readouterr().err) == (why == "failed")
    replayed = metric(telemetry, "decode_graph_steps_total", how="replayed")
    assert (replayed > 0) == (why == "full")


def test_a_token_of_a_prompt_that_reads_all_far_blocks_is_not_replayed() -> None:
    """The recording has room for the budget of generated tokens."""
    layout, slices = layout_of(FarSpec(blocks=2, dense_prompts=True)), [Slice(0, 100, 1, 0), Slice(1, 80, 1, 0)]
    pool = SimpleNamespace(layout=layout)
    for prompt, why in ((CONTEXT, "prompt"), (80, None)):
        _, tables = anchors_of(layout, slices, prompt)
        graphs = decode_graphs.DecodeGraphs(SimpleNamespace(device=torch.device("cpu")), pool, Tape(), 4, CONTEXT, lambda: None)  # type: ignore[arg-type]
        graphs._replayed = lambda *_: torch.zeros(2, 8)  # type: ignore[method-assign]
        found = graphs.hidden(tables.batch(slices), False)
        assert (found is None) == (why == "prompt") and dict(graphs.take_counts()).get("prompt", 0) == (why == "prompt")


@pytest.mark.parametrize("work", [lambda x: x.sum().item(), lambda x: x.nonzero(), lambda x: x + torch.tensor([1.0])])
def test_the_tape_refuses_what_a_graph_cannot_have(work: Callable[[torch.Tensor], Any]) -> None:
    x = torch.ones(3)
    with pytest.raises(RuntimeError, match="cannot be recorded"):
        Tape().record(lambda: work(x))


def test_a_tape_reads_the_same_tensors_again() -> None:
    x, rows = torch.arange(6.0).view(2, 3), torch.tensor([0, 0])
    replay = Tape().record(lambda: x[:, 1:].index_select(0, rows).mul_(2.0).view(-1) + 1)
    x += 10
    rows[1] = 1
    assert replay().tolist() == [23.0, 25.0, 29.0, 31.0]


def test_a_tape_leaves_in_a_workspace_what_was_there() -> None:
    x, rooms = torch.ones(3), []

    def work() -> torch.Tensor:
        rooms.append(torch.empty(3))
        rooms[0][:1].copy_(x[:1])
        return rooms[0] * 2

    replay = Tape().record(work)
    rooms[0].fill_(5.0)
    x += 1
    assert replay().tolist() == [4.0, 10.0, 10.0]
