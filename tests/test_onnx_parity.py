"""The whole serving path over an exported graph against `transformers`: among others, with prefix hits, after preemption, after a loss.

The same requests, bounds and references as in `test_parity`, with the graph in the engine's place.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

from service.checkpoints.manifest import read_manifest
from service.checkpoints.onnx_export import export
from service.checkpoints.onnx_graph import OnnxGraph
from service.engine.batch import Tables
from service.engine.onnx_backend import OnnxBackend
from service.engine.rectangles import Costs
from service.engine.sampler import Sampler
from service.telemetry import Telemetry
from service.types.plan import BackendHealth, BackendInfo, BatchPlan, StepResult, WorkerLost
from service.types.request import FinishReason, Sampling, TokenEvent
from tests.test_parity import Reference, agree, collect, make_case, others, request_for, start


class InlineGraph:
    """Implements types.plan.Backend over an exported graph in this process; every start begins with empty tables and poisoned blocks."""

    def __init__(self, directory: Path, graph: Path, blocks: int = 64, lose_at: frozenset[int] = frozenset()) -> None:
        self.spec = read_manifest(directory).spec
        self.graph, self.blocks, self.lose_at = graph, blocks, lose_at
        self.steps = self.starts = 0

    async def start(self) -> BackendInfo:
        layout = self.spec.kv_layout()
        counts = (self.blocks,) * len(layout.groups)
        graph = OnnxGraph(self.graph, layout, counts, 1)
        for cache in graph.caches.values():
            cache[:, 64:] = np.nan
        tables = Tables(layout, counts, 32, self.spec.context_tokens, self.spec.vocab_size)
        self.engine = OnnxBackend(graph, layout, tables, Sampler(32, self.spec.vocab_size), Costs.of(self.spec, 1 << 16))
        self.starts += 1
        return BackendInfo(layout, counts, 32, 4096, self.spec.context_tokens, self.spec.vocab_size, "float32", "cpu", "inline")

    def execute(self, plan: BatchPlan) -> asyncio.Future[StepResult]:
        loop = asyncio.get_running_loop()
        future: asyncio.Future[StepResult] = loop.create_future()
        self.steps += 1
        outcome = None if self.steps in self.lose_at else self.engine.execute(plan)
        loop.call_soon(lambda: future.set_exception(WorkerLost("planted")) if outcome is None else future.set_result(outcome))
        return future

    def health(self) -> BackendHealth:
        return BackendHealth("ready", 0.0, max(0, self.starts - 1))

    async def close(self) -> None:
        pass


@pytest.fixture(scope="module", params=["llama-bias-tied-linear", "mistral-gqa7-window", "qwen2-mixed-windows"])
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Reference:
    return make_case(request.param, tmp_path_factory.mktemp(request.param) / "model")


@pytest.fixture(scope="module")
def inline(case: Reference) -> Callable[..., InlineGraph]:
    """A function that makes a backend of the case."""
    graph = case.directory.parent / "graph.onnx"
    export(read_manifest(case.directory), graph, "none")
    return lambda **changes: InlineGraph(case.directory, graph, **changes)


async def test_among_sixteen_others(case: Reference, inline) -> None:
    router = await start(inline(), case.directory, step_tokens=96)
    crowd = [router.submit([request])[0] for request in others(8)]
    [mine] = router.submit([request_for(case.prompt, scored=True)])
    crowd += [router.submit([request])[0] for request in others(16)[8:]]
    agree(case, *await collect(mine))
    for stream in crowd:
        assert (await collect(stream))[2].reason is FinishReason.LENGTH
    await router.close()


async def test_prefix_hits_one_step_ahead(case: Reference, inline) -> None:
    router = await start(inline(), case.directory, run_ahead=1)
    hits = []
    for _ in range(2):
        [stream] = router.submit([request_for(case.prompt)])
        tokens, _, finish = await collect(stream)
        agree(case, tokens, None, finish)
        hits.append(finish.usage.cached_tokens)
    assert hits == [0, (len(case.prompt) - 1) // 64 * 64]
    await router.close()


async def test_after_a_forced_preemption(case: Reference, inline) -> None:
    telemetry, backend = Telemetry(), inline(blocks=5)
    router = await start(backend, case.directory, telemetry, prefix_cache=False, step_tokens=64)
    [older] = router.submit([request_for(case.prompt[:60], tokens=100)])
    async for event in older:
        if isinstance(event, TokenEvent) and backend.steps > 50:
            break
    [mine] = router.submit([request_for(case.prompt)])
    tokens, _, finish = await collect(mine)
    agree(case, tokens, None, finish)
    assert (await collect(older))[2].reason is FinishReason.LENGTH
    rows = telemetry.snapshot().render(False)[0].decode().splitlines()
    assert sum(float(row.split()[-1]) for row in rows if row.startswith("deepseek_preemptions_total")) > 0
    await router.close()


async def test_after_a_lost_worker(case: Reference, inline) -> None:
    backend = inline(lose_at=frozenset({2, 12}))
    router = await start(backend, case.directory, step_tokens=40)
    [stream] = router.submit([request_for(case.prompt)])
    tokens, _, finish = await collect(stream)
    agree(case, tokens, None, finish)
    assert backend.starts == 3
    await router.close()


async def test_a_sampled_text_is_the_same_in_any_batch(case: Reference, inline) -> None:
    drawn = replace(request_for(case.prompt), sampling=Sampling(temperature=0.9, seed=3, top_p=0.9))
    texts = set()
    for crowd in (0, 6):
        router = await start(inline(), case.directory, step_tokens=96)
        streams = [router.submit([request])[0] for request in others(crowd)]
        texts.add((await collect(router.submit([drawn])[0]))[0])
        for stream in streams:
            await collect(stream)
        await router.close()
    assert len(texts) == 1
