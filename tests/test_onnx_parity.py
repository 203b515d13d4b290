"""The whole serving path over an exported graph against `transformers`: among others, with prefix hits, after preemption, after a loss.

The same requests, bounds and references as in `test_parity`, with the graph in the engine's place.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

from service.checkpoints.manifest import read_manifest
from service.checkpoints.onnx_export import export
from service.types.request import Sampling
from service.types.settings import AttentionSettings
from tests import test_sparse_parity as sparse
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


@pytest.mark.parametrize("refresh", [0, 16])
async def test_a_window_whose_far_blocks_are_evicted(refresh: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts within the window and far beyond it, side by side in slices: the tokens are torch's in float32, and those of the rule."""
    monkeypatch.setitem(sparse.CASES, "evict", AttentionSettings(attention_window=70, kv_far="evict", far_refresh=refresh))
    case, graph = sparse.make_case("evict", tmp_path), tmp_path / "graph.onnx"
    export(case.manifest, graph, "none")
    draw = np.random.default_rng(5)
    prompts = [case.prompt, *(tuple(draw.integers(0, 256, length).tolist()) for length in (5, 64, 129, 200))]
    found = []
    for backend in (None, InlineGraph(case.directory, graph, attention=case.attention)):
        router = await sparse.start(case, backend, step_tokens=97)
        streams = [router.submit([sparse.ask(prompt, tokens=70)])[0] for prompt in prompts]
        found.append([(await collect(stream))[0] for stream in streams])
        await router.close()
    assert found[0] == found[1] and all(len(tokens) == 70 for tokens in found[1])
    case.check(case.prompt, found[1][0])
