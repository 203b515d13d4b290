"""Which blocks each group keeps, by the rule alone, and what a sequence's two stores weigh against a full 16-bit cache."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.types.kv_layout import FarSpec, FarStore, KvLayout
from service.types.model_spec import GroupedQueryAttention
from tests.types.test_model_spec import spec_of

SPARSE = GroupedQueryAttention(heads=16, kv_heads=16, head_dim=64, window=2048, far=FarSpec())
DENSE = replace(SPARSE, window=None, far=None)


def layout_of(*attentions: GroupedQueryAttention) -> KvLayout:
    return spec_of(*attentions).kv_layout()


def test_a_layer_with_far_blocks_has_a_near_and_a_far_group() -> None:
    layout = layout_of(DENSE, SPARSE, SPARSE)
    assert [(group.name, group.layers, group.source) for group in layout.groups] == [
        ("full", (0,), None),
        ("near2048", (1, 2), None),
        ("far_int8", (1, 2), 1),
    ]
    assert [group.sink_blocks for group in layout.groups] == [0, 1, 0]
    assert layout.slice_tokens == 2048 and layout_of(DENSE).slice_tokens is None


def test_evicting_keeps_no_far_group() -> None:
    layout = layout_of(replace(SPARSE, far=FarSpec(store=FarStore.EVICT)))
    assert [group.name for group in layout.groups] == ["near2048"] and layout.slice_tokens is None
    assert layout.sequence_bytes(131072, 2) == 34 * layout.block_bytes(layout.groups[0], 2)


@pytest.mark.parametrize(
    ("store", "context", "most"),
    [("int8", 16384, 0.63), ("int8", 131072, 0.57), ("int4", 16384, 0.42), ("int4", 131072, 0.34), ("native", 16384, 1.06)],
)
def test_bytes_of_a_sequence_against_a_full_cache(store: str, context: int, most: float) -> None:
    kept = layout_of(replace(SPARSE, far=FarSpec(store=FarStore(store)))).sequence_bytes(context, 2)
    share = kept / layout_of(DENSE).sequence_bytes(context, 2)
    assert most - 0.06 < share <= most


def test_bytes_counted_by_hand() -> None:
    layout = layout_of(SPARSE)
    near, far = layout.groups
    assert layout.block_bytes(near, 2) == 16 * 64 * 128 * 2
    assert layout.block_bytes(far, 2) == 16 * (64 * 128 + 64 * 2 * 2 + 5 * 2 * 64 + 2) == 16 * 64 * 142 + 16 * 2
    assert layout.block_bytes(layout_of(replace(SPARSE, far=FarSpec(store=FarStore.INT4))).groups[1], 2) == 16 * (4096 + 256 + 642)
    assert (layout.blocks_for(near, 16384), layout.blocks_for(far, 16384)) == (34, 223)
    assert (layout.blocks_for(near, 100), layout.blocks_for(far, 100)) == (2, 0)


@given(st.integers(1, 200), st.sampled_from([1, 2, 4, 8]), st.integers(0, 3), st.integers(0, 900))
def test_tables_by_the_rule(window: int, refresh: int, sinks: int, position: int) -> None:
    spec = FarSpec(refresh=refresh, sink_blocks=sinks)
    layout = replace(layout_of(replace(SPARSE, window=window, far=spec)), block_tokens=8)
    near, far = layout.groups
    anchor = position - position % refresh
    start = layout.first_read(near, position)
    assert start * 8 <= max(anchor - window + 1, 0) < start * 8 + 8
    assert layout.entries(near, position) == position // 8 + 1
    assert layout.entries(far, position) == max(start, sinks) and layout.first_read(far, position) == sinks
    held = len([block for block in range(position // 8 + 1) if block < sinks or block >= start])
    assert held <= layout.blocks_for(near, position + 1)
    assert max(start - sinks, 0) == layout.blocks_for(far, position + 1)
    following = layout.next_start(near, start)
    assert layout.first_read(near, following) == start + 1 and layout.first_read(near, following - 1) <= start
    assert layout.reach(far, layout.entries(far, position)) > position
    assert layout.entries(far, layout.reach(far, max(start, sinks))) > max(start, sinks)


def test_budgets() -> None:
    assert [FarSpec().budget(anchor) for anchor in (0, 32767, 32768)] == [16, 16, 32]
    assert FarSpec(blocks=5).budget(10**6) == 5 and FarSpec(blocks=5, store=FarStore.EVICT).budget(0) == 0


def test_a_query_reads_near_and_far() -> None:
    assert SPARSE.tokens_seen(1000.0) == (1000.0, 0.0)
    assert SPARSE.tokens_seen(2300.0) == (2112.0, 188.0)
    assert SPARSE.tokens_seen(16384.0) == (2112.0, 1024.0)
    assert SPARSE.tokens_seen(131072.0) == (2112.0, 2048.0)
    full, sparse = DENSE.bytes_seen(16384.0, 2), SPARSE.bytes_seen(16384.0, 2)
    assert full == 16384 * 16 * 256
    assert 0.15 < sparse / full < 0.21
