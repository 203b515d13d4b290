"""The memory of choices: what is planned is what the tensors take, for rows to the byte, for a step as the most that any step takes."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from service.engine.choosing_memory import StepSize, kept_bytes, step_bytes, tile_tokens
from service.engine.far_choices import FarChoices, StepChoices
from service.engine.memory import Usage, plan_memory
from service.kernels import reference_sparse
from service.kernels.reference_sparse import FarBlocks
from service.types import kv_layout
from service.types.catalog import V2_3, V5_2
from service.types.kv_layout import FarSpec, FarStore
from service.types.plan import LoadRequest, Slice
from tests.engine.test_far_choices import CONTEXT, anchors_of, layout_of

ROWS = 6
CPU = torch.device("cpu")


def made_bytes(spec: FarSpec, slices: list[Slice]) -> int:
    """Bytes of the choices that a step of these slices makes for both layers."""
    layout = layout_of(spec)
    anchors, tables = anchors_of(layout, slices)

    def choose(query: Tensor, *arguments: object, most: int, **_: int) -> tuple[Tensor, Tensor]:
        return torch.zeros(len(query), 2, most, dtype=torch.int32), torch.zeros(len(query), dtype=torch.int32)

    far_tables = torch.zeros(len(slices), 15, dtype=torch.int32)
    step = StepChoices(anchors, 1, FarChoices(layout, ROWS, CPU), tables.batch(slices), far_tables, choose)
    for layer in (0, 1):
        step.of(layer, torch.zeros(sum(piece.length for piece in slices), 4, 4), FarBlocks(*[torch.zeros(0)] * 7), 1)
    return step.made_bytes


@pytest.mark.parametrize("spec", [FarSpec(), FarSpec(blocks=3), FarSpec(blocks=5, refresh=8), FarSpec(store=FarStore.EVICT)])
def test_rows_keep_what_is_planned(spec: FarSpec) -> None:
    layout = layout_of(spec)
    assert kept_bytes(layout, ROWS) == FarChoices(layout, ROWS, CPU).reserved_bytes
    assert (kept_bytes(layout, ROWS) > 0) == (spec.store is not FarStore.EVICT)


@settings(max_examples=60, deadline=None)
@given(st.data(), st.sampled_from([1, 2, 4, 8]), st.integers(0, 4), st.booleans())
def test_no_step_takes_more_than_is_planned(data: st.DataObject, refresh: int, blocks: int, dense: bool) -> None:
    spec = FarSpec(blocks=blocks, refresh=refresh, dense_prompts=dense)
    slices = []
    for row in range(data.draw(st.integers(1, ROWS))):
        start = data.draw(st.integers(0, CONTEXT - 1))
        slices.append(Slice(row, start, data.draw(st.integers(1, min(20, CONTEXT - start))), 0))
    step = StepSize(sum(piece.length for piece in slices), len(slices), CONTEXT)
    assert made_bytes(spec, slices) <= step_bytes(layout_of(spec), step, 0)


@pytest.mark.parametrize("dense", [False, True])
def test_the_largest_step_takes_all_of_it(dense: bool) -> None:
    """A slice at the end of the context with a choice for each token: two layers' choices, and one of the budget while they are joined."""
    spec = FarSpec(blocks=2, dense_prompts=dense)
    made = made_bytes(spec, [Slice(0, CONTEXT - 20, 20, 0)])
    assert made + 20 * 2 * 2 * 4 == step_bytes(layout_of(spec), StepSize(20, 1, CONTEXT), 0)


def test_a_gpu_keeps_a_score_for_each_candidate_and_who_reads_a_block() -> None:
    spec, step = FarSpec(blocks=2), StepSize(20, 1, CONTEXT)
    # 20 anchors, 2 heads: 15 table entries, 8 of the first stage, and indices and scores of 6 of the second, of 4 bytes each; tiles of 8
    # tokens, of which a slice may begin and end one: marks, indices and bits for each entry.
    assert step.tiles(8) == 4 and StepSize(5, 5, CONTEXT).tiles(8) == 5
    extra = (20 * 2 * (15 + 8 + 2 * 6) + 4 * 2 * 3 * 15) * 4
    assert step_bytes(layout_of(spec), step, 8) - step_bytes(layout_of(spec), step, 0) == extra
    evicting = layout_of(replace(spec, store=FarStore.EVICT))
    assert step_bytes(evicting, step, 8) == step_bytes(evicting, step, 0) == 0


def test_tiles_are_no_smaller_than_is_planned() -> None:
    pytest.importorskip("triton")
    from service.kernels.gpu.window_sparse import sparse_tile

    spec = V5_2.spec(dict(V5_2.shapes)["nano"])
    for dtype, size, queries, chip in product((torch.bfloat16, torch.float32), (64, 80, 128, 256), (1, 2, 3, 4, 7, 8, 16), (80, 90)):
        attention = replace(spec.layers[0].attention, heads=queries, kv_heads=1)
        layers = tuple(replace(layer, attention=attention) for layer in spec.layers)
        assert sparse_tile(dtype, size, queries, chip, True)[1] >= tile_tokens(replace(spec, layers=layers), dtype.itemsize)


def test_the_stages_are_those_of_the_kernels() -> None:
    assert (kv_layout.FIRST_STAGE, kv_layout.SECOND_STAGE) == (reference_sparse.FIRST_STAGE, reference_sparse.SECOND_STAGE)


@pytest.mark.parametrize("on_gpu", [False, True])
def test_the_plan_counts_both_and_models_without_far_blocks_neither(on_gpu: bool) -> None:
    spec = V5_2.spec(dict(V5_2.shapes)["nano"])
    tile = tile_tokens(spec, 4) if on_gpu else 0
    layout, request = spec.kv_layout(), LoadRequest("model", max_rows=8, max_step_tokens=128)
    usage = Usage(1 << 20, 1 << 20, 64 << 30, on_gpu)
    lines = dict(plan_memory(spec, layout, 4, request, usage).lines)
    assert lines["choices"] == kept_bytes(layout, 8) == FarChoices(layout, 8, CPU).reserved_bytes > 0
    larger = dict(plan_memory(spec, layout, 4, replace(request, max_step_tokens=256), usage).lines)
    small, large = (step_bytes(layout, StepSize(tokens, 8, spec.context_tokens), tile) for tokens in (128, 256))
    assert 0 < large - small < larger["workspace"] - lines["workspace"]
    plain = V2_3.spec(dict(V2_3.shapes)["nano"])
    assert "choices" not in dict(plan_memory(plain, plain.kv_layout(), 4, request, usage).lines)
    assert step_bytes(plain.kv_layout(), StepSize(128, 8, 4096), tile) == 0
