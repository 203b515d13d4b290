"""What recorded decode steps take, recounted: shapes, the most pieces of a row, and the line of the memory plan."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.engine.graph_memory import GRAPH_BYTES, MOST_GRAPHS, Shape, fixed_values, graph_bytes, rows_for, splits_of, tables_for
from service.engine.memory import Usage, plan_memory
from service.kernels import splits
from service.types.catalog import V5_2
from service.types.kv_layout import SPLIT_TOKENS, FarStore, KvGroup, KvLayout
from service.types.plan import LoadRequest


@given(st.integers(1, 1000))
def test_a_step_is_recorded_for_few_numbers_of_rows_and_little_more_than_it_has(rows: int) -> None:
    found = rows_for(rows)
    assert rows <= found < rows + max(rows, 8 if rows <= 64 else 32) and rows_for(found) == found
    assert len({rows_for(count) for count in range(1, 257)}) <= 20


@given(st.integers(1, 5000))
def test_tables_double(blocks: int) -> None:
    found = tables_for(blocks)
    assert found >= blocks and found & (found - 1) == 0 and (found < 2 * blocks or found == 64)


@given(st.one_of(st.none(), st.integers(1, 3000)), st.integers(1, 400))
def test_pieces_are_those_of_the_kernels(window: int | None, blocks: int) -> None:
    assert splits.SPLIT_TOKENS == SPLIT_TOKENS
    layout = KvLayout((KvGroup("full", (0,), 2, 64, 64, window),))
    assert splits_of(layout, blocks) == splits.most_splits(blocks * 64, window)


def test_pieces_of_a_list_are_those_of_the_kernels() -> None:
    spec = V5_2.spec(dict(V5_2.shapes)["nano"])
    layout = spec.kv_layout()
    sparse = [group for group in layout.groups if group.far is not None and group.source is None]
    assert sparse
    for group in sparse:
        far = group.far
        assert far is not None
        for spec in (
            far,
            replace(far, blocks=40),
            replace(far, blocks=4000),
            replace(far, sink_blocks=9),
            replace(far, store=FarStore.EVICT),
        ):
            alone, budget = KvLayout((replace(group, far=spec),)), spec.budget(0) or None
            for blocks in (5, 64, 4096):
                most = splits.most_sparse_splits(group.window or 0, spec.refresh, 64, spec.sink_blocks, budget, blocks)
                assert splits_of(alone, blocks) == most


@pytest.mark.parametrize("on_gpu", [False, True])
@pytest.mark.parametrize("asked", ["auto", "off"])
def test_the_plan_counts_graphs_on_a_gpu_that_records_them(on_gpu: bool, asked: str) -> None:
    spec = V5_2.spec(dict(V5_2.shapes)["nano"])
    usage = Usage(10 << 20, 200 << 20, 8 << 30, on_gpu)
    plan = plan_memory(spec, spec.kv_layout(), 2, LoadRequest("model", max_rows=16, cuda_graphs=asked), usage)
    found = dict(plan.lines).get("graphs", 0)
    assert (found > 0) == (on_gpu and asked == "auto")
    if found:
        assert found == graph_bytes(spec, spec.kv_layout(), 16, plan.context_tokens, 2)
        blocks = tables_for(plan.context_tokens // 64)
        assert found > MOST_GRAPHS * GRAPH_BYTES + 4 * fixed_values(spec.kv_layout(), Shape(16, blocks))
