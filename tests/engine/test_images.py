"""The images of a worker: what is refused, what is kept, what is forgotten."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from service.checkpoints.load import load
from service.checkpoints.manifest import read_manifest
from service.engine.batch import Batch, PlanError, Tables
from service.engine.images import ImageStore
from service.models.decoder import Decoder
from service.types.catalog import V2_3
from service.types.plan import BatchPlan, BlockAppend, OpenSequence, Slice
from service.types.request import ImageInput, Sampling, Stop
from tests.tiny_models import build_tiny_line

UNIT_BYTES = 4 * 4 * 3


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Decoder:
    return load(read_manifest(build_tiny_line(tmp_path_factory.mktemp("line") / "tiny")), "cpu", torch.float32)


def image_of(start: int, rows: int = 1, columns: int = 2, seed: int = 1) -> ImageInput:
    pixels = np.random.default_rng(seed).integers(0, 256, rows * columns * UNIT_BYTES, np.uint8).tobytes()
    return ImageInput(start, rows, columns, f"{seed}:{rows}x{columns}", pixels)


def opening(row: int, *images: ImageInput, prompt: int = 20) -> OpenSequence:
    return OpenSequence(row, tuple(range(prompt)), prompt, Sampling(), Stop(9), images=images)


def opened(*sequences: OpenSequence) -> BatchPlan:
    return BatchPlan(1, open=sequences)


class Bench:
    """A store with tables beside it, so that slices become batches."""

    def __init__(self, decoder: Decoder, most_tokens: int = 100) -> None:
        layout = decoder.spec.kv_layout()
        self.tables = Tables(layout, (64,), 8, 64, decoder.spec.vocab_size)
        self.layers = 0
        self.store = ImageStore(decoder, most_tokens, self._count)

    def _count(self) -> None:
        self.layers += 1

    def open(self, *sequences: OpenSequence, close: tuple[int, ...] = ()) -> None:
        appends = tuple(BlockAppend(one.row, 0, 0, (one.row + 1,)) for one in sequences)
        plan = BatchPlan(1, open=sequences, close=close, append=appends)
        self.tables.apply(plan)
        self.store.apply(plan)

    def batch(self, *slices: tuple[int, int, int]) -> Batch:
        return self.tables.batch([Slice(row, start, length, 0) for row, start, length in slices])


@torch.inference_mode()
def test_what_slices_show_and_see(decoder: Decoder) -> None:
    bench = Bench(decoder)
    first, second = image_of(3, 2, 2), image_of(9, 1, 2, seed=2)
    bench.open(opening(0, first, second), opening(1), opening(2, image_of(0, 2, 2)))
    whole = bench.store.context(bench.batch((1, 0, 4), (0, 0, 20)))
    assert whole is not None
    assert whole.at.tolist() == [4 + at for at in (3, 4, 5, 6, 9, 10)]
    assert whole.rows.tolist() == [4 + at for at in range(3, 20)]
    (seen,) = whole.seen
    assert seen.counts is not None and seen.counts.tolist() == [1, 2, 3, 4, 4, 4, 5, *[6] * 10]
    part = bench.store.context(bench.batch((0, 5, 5), (2, 12, 1)))
    assert part is not None and part.at.tolist() == [0, 1, 4] and part.rows.tolist() == [0, 1, 2, 3, 4, 5]
    torch.testing.assert_close(part.embeddings, whole.embeddings[[2, 3, 4]])
    assert [one.counts if one.counts is None else one.counts.tolist() for one in part.seen] == [[3, 4, 4, 4, 5], None]
    torch.testing.assert_close(part.seen[1].keys, seen.keys[:4])
    for slices in ([(1, 0, 4)], [(0, 0, 3)], [(1, 2, 1), (0, 1, 2)]):
        assert bench.store.context(bench.batch(*slices)) is None


@torch.inference_mode()
def test_an_image_is_encoded_once_and_counted(decoder: Decoder) -> None:
    bench = Bench(decoder)
    assert bench.store.take_work() is None
    image = image_of(3, 2, 2)
    bench.open(opening(0, image))
    for _ in range(3):
        bench.store.context(bench.batch((0, 0, 20)))
    work = bench.store.take_work()
    assert work is not None and work[:3] == (1, 4, 0) and bench.layers == 1
    assert work.flops > decoder.spec.image_flops(4)
    bench.open(opening(1, replace(image, start=7)))
    bench.store.context(bench.batch((1, 19, 1)))
    work = bench.store.take_work()
    assert work is not None and work[:3] == (0, 0, 1) and work.flops > 0
    assert bench.store.take_work() is None


@torch.inference_mode()
def test_gates_of_the_rows_that_see_images_are_summed_by_head(decoder: Decoder) -> None:
    bench = Bench(decoder)
    fusion = decoder.fusion
    assert fusion is not None
    bench.open(opening(0, image_of(3)), opening(1))
    context = bench.store.context(bench.batch((0, 0, 20), (1, 0, 20)))
    assert context is not None and len(context.rows) == 17
    stream = torch.randn(40, decoder.spec.dim, generator=torch.Generator().manual_seed(0))
    fusion(stream, torch.zeros_like(stream), context)
    wanted = fusion.gates(fusion.norm(stream[3:20])).sigmoid().view(17, 2, -1).sum(0)
    work = bench.store.take_work()
    assert work is not None and work.seeing == 17
    torch.testing.assert_close(torch.tensor([work.text_gates, work.image_gates]), wanted, atol=1e-4, rtol=1e-4)
    assert bench.store.take_work() is None


@torch.inference_mode()
def test_the_pixels_may_come_with_another_row_of_the_plan(decoder: Decoder) -> None:
    bench = Bench(decoder)
    bench.open(opening(0, image_of(3)), opening(1, replace(image_of(5), pixels=b"")))
    context = bench.store.context(bench.batch((0, 3, 2), (1, 5, 2)))
    assert context is not None
    torch.testing.assert_close(context.embeddings[:2], context.embeddings[2:])


@torch.inference_mode()
def test_closed_rows_images_go_when_room_is_needed_the_oldest_first(decoder: Decoder) -> None:
    bench = Bench(decoder, most_tokens=6)
    bench.open(*(opening(row, image_of(0, seed=row)) for row in range(3)))
    bench.store.context(bench.batch(*((row, 0, 20) for row in range(3))))
    assert bench.store.kept_tokens == 6
    bench.open(close=(1, 2))
    bench.open(opening(3, image_of(0, seed=9)))
    bench.store.context(bench.batch((3, 0, 20)))
    assert bench.store.kept_tokens == 6
    assert list(bench.store._encoded) == ["0:1x2", "2:1x2", "9:1x2"]  # row 0 is open, 1 was the oldest of the closed


@pytest.mark.parametrize(
    ("images", "sentence"),
    [
        ((image_of(19),), "place"),
        ((image_of(-1),), "place"),
        ((image_of(3, 2, 2), image_of(6)), "place"),
        ((replace(image_of(3), rows=0),), "place"),
        ((replace(image_of(3), pixels=b"x"),), "pixels"),
        ((replace(image_of(3), pixels=b""),), "pixels"),
        ((image_of(3, 1, 7),), "pixels"),
    ],
)
def test_contradictory_images_are_refused(decoder: Decoder, images: tuple[ImageInput, ...], sentence: str) -> None:
    with pytest.raises(PlanError, match=sentence):
        Bench(decoder).store.apply(opened(opening(0, *images)))


def test_a_model_that_reads_no_images_refuses_them(tmp_path: Path) -> None:
    blind = load(read_manifest(build_tiny_line(tmp_path / "blind", V2_3)), "cpu", torch.float32)
    store = ImageStore(blind, 0, lambda: None)
    store.apply(opened(opening(0)))
    store.warm_up()
    with pytest.raises(PlanError, match="reads no images"):
        store.apply(opened(opening(0, image_of(3))))
