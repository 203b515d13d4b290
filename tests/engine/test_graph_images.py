"""The images of a worker of exported graphs: what it counts is what torch counts, each is encoded once, and the oldest go."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

from service.checkpoints.load import load
from service.checkpoints.manifest import read_manifest
from service.checkpoints.onnx_export import export
from service.checkpoints.onnx_graph import OnnxEncoder, OnnxGraph
from service.engine.batch import PlanError, Tables
from service.engine.graph_images import GraphImages
from service.engine.kv_pool import KvPool
from service.engine.onnx_backend import OnnxBackend
from service.engine.rectangles import Costs, Part
from service.engine.sampler import Sampler
from service.engine.torch_backend import TorchBackend
from service.types.plan import BatchPlan, BlockAppend, OpenSequence, Slice
from service.types.request import ImageInput, Sampling, Stop
from tests.engine.test_images import image_of, opened, opening
from tests.tiny_models import build_tiny_line


@pytest.fixture(scope="module")
def line(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = build_tiny_line(tmp_path_factory.mktemp("line") / "tiny")
    export(read_manifest(directory), directory.parent / "graph", "none")
    return directory


@pytest.fixture
def images(line: Path) -> Callable[[int], GraphImages]:
    spec = read_manifest(line).spec
    return lambda most: GraphImages(spec, OnnxEncoder(line.parent / "graph", spec.vision, 1), most)


def sequence(row: int, *images: ImageInput) -> OpenSequence:
    return OpenSequence(row, tuple(range(20)), 20, Sampling(temperature=0), Stop(9), images=images)


def test_work_and_gates_are_those_of_torch(line: Path) -> None:
    spec = read_manifest(line).spec
    layout = spec.kv_layout()
    tables = [Tables(layout, (8,), 4, 64, spec.vocab_size) for _ in range(2)]
    pool = KvPool(layout, (8,), torch.float32, torch.device("cpu"))
    encoder = OnnxEncoder(line.parent / "graph", spec.vision, 1)
    graph = OnnxGraph(line.parent / "graph", layout, (8,), 1)
    backends = [
        TorchBackend(load(read_manifest(line), "cpu", torch.float32), pool, tables[0], Sampler(4, spec.vocab_size), 100),
        OnnxBackend(graph, tables[1], Sampler(4, spec.vocab_size), Costs.of(spec, 1 << 16), GraphImages(spec, encoder, 100)),
    ]
    opening = (sequence(0, image_of(3), image_of(9, 2, 2, seed=2)), sequence(1), sequence(2, image_of(5)))
    blocks = tuple(BlockAppend(row, 0, 0, (row + 1,)) for row in range(3))
    prompts = tuple(Slice(row, 0, 12 if row == 0 else 20, 1 if row else 0) for row in range(3))
    steps = (BatchPlan(1, prompts, open=opening, append=blocks), BatchPlan(2, (Slice(0, 12, 8, 1), Slice(1, 20, 1, 1))), BatchPlan(3))
    for plan in steps:
        theirs, mine = (backend.execute(plan) for backend in backends)
        assert [token.token for token in mine.tokens] == [token.token for token in theirs.tokens]
        if theirs.images is None:
            assert mine.images is None
            continue
        assert mine.images is not None and mine.images[:3] == theirs.images[:3] and mine.images.seeing == theirs.images.seeing
        assert mine.images.flops == pytest.approx(theirs.images.flops)
        np.testing.assert_allclose(mine.images.text_gates, theirs.images.text_gates, rtol=1e-4)
        np.testing.assert_allclose(mine.images.image_gates, theirs.images.image_gates, rtol=1e-4)
    assert backends[1].layers_done == 4 * len(spec.layers) + 2  # three rectangles of the first step are two lengths


def test_an_image_is_encoded_once_and_the_oldest_of_the_closed_go(images: Callable[[int], GraphImages]) -> None:
    kept = images(6)
    kept.apply(opened(*(opening(row, image_of(0, seed=row)) for row in range(3))))
    for _ in range(2):
        kept.seen([0, 1, 2], [Part(row, 0, 20, True) for row in range(3)])
    assert (kept.encodings, kept.kept_tokens) == (3, 6)
    kept.apply(BatchPlan(2, close=(1, 2), open=(opening(3, image_of(0, seed=9)),)))
    kept.seen([3], [Part(0, 0, 20, True)])
    assert (kept.encodings, kept.kept_tokens) == (4, 6)
    kept.apply(BatchPlan(3, open=(opening(4, image_of(2, seed=2)),)))  # 2 was younger than 1 and is there still
    kept.seen([4], [Part(0, 0, 20, True)])
    assert kept.encodings == 4


def test_parts_before_the_first_image_see_nothing(images: Callable[[int], GraphImages]) -> None:
    kept = images(50)
    assert kept.seen([0], [Part(0, 0, 5, True)]) is None
    kept.apply(opened(opening(0, image_of(7)), opening(1)))
    assert kept.seen([0, 1], [Part(0, 0, 7, False), Part(1, 0, 7, False)]) is None
    seen = kept.seen([1, 0], [Part(0, 6, 3, False), Part(1, 6, 3, False)])
    assert seen is not None and seen.seers.tolist() == [1] and seen.shown_at.tolist() == [[1, 1], [1, 2]]
    assert seen.sees[0, :, 0].tolist() == [False, True, True] and np.isfinite(seen.image_mask[0, :3]).sum(1).tolist() == [1, 1, 2]


def test_without_an_encoder_an_image_is_a_fault_of_the_plan(line: Path) -> None:
    kept = GraphImages(read_manifest(line).spec)
    kept.warm_up()
    kept.apply(opened(opening(0, image_of(3))))
    with pytest.raises(PlanError, match="reads no images"):
        kept.seen([0], [Part(0, 0, 20, True)])
