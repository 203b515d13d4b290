"""The whole serving path over an exported graph against `transformers`: among others, with prefix hits, after preemption, after a loss.

The same requests, bounds and references as in `test_parity`, with the graph in the engine's place.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

from service.checkpoints.manifest import read_manifest
from service.checkpoints.onnx_export import export
from service.types.request import Sampling
from tests.inline_graph import InlineGraph
from tests.test_parity import (
    Reference,
    among_sixteen_others,
    collect,
    forced_preemption,
    lost_worker,
    make_case,
    others,
    prefix_hits,
    request_for,
    start,
)


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
    await among_sixteen_others(case, inline())


async def test_prefix_hits_one_step_ahead(case: Reference, inline) -> None:
    await prefix_hits(case, inline(), run_ahead="always")


async def test_after_a_forced_preemption(case: Reference, inline) -> None:
    await forced_preemption(case, inline(blocks=5), run_ahead="never")


async def test_after_a_lost_worker(case: Reference, inline) -> None:
    await lost_worker(case, inline(lose_at=frozenset({2, 12})))


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
