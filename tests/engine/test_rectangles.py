"""Rectangles cover every slice once, in order, within their bounds, whatever is planned."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from service.engine import rectangles as module
from service.engine.batch import Tables
from service.engine.rectangles import MOST_SCORES, MOST_TOKENS, SCORED_TOKENS, Costs, rectangles
from service.types.catalog import V2_3
from service.types.kv_layout import KvGroup, KvLayout
from service.types.plan import BatchPlan, BlockAppend, OpenSequence, Slice, Want
from service.types.request import Sampling, Stop

CONTEXT = 40_000
LAYOUT = KvLayout((KvGroup("full", (0, 1), 2, 16, 16), KvGroup("window100", (2,), 2, 16, 16, window=100)))
COSTS = Costs(heads=8, token_values=64, token_bytes=768, weight_bytes=1 << 20)
BLOCKS = 8 * -(-CONTEXT // 64)


def batch_of(slices):
    """The batch of (start, length, want) a row."""
    tables = Tables(LAYOUT, (BLOCKS,) * 2, 8, CONTEXT, 300)
    opening, append, planned, block = [], [], [], 1
    for row, (start, length, want) in enumerate(slices):
        opening.append(OpenSequence(row, (1,) * (start + length), start + length, Sampling(), Stop(9), 0))
        count = -(-(start + length) // 64)
        append += [BlockAppend(row, group, 0, tuple(range(block, block + count))) for group in (0, 1)]
        planned.append(Slice(row, start, length, want))
        block += count
    tables.apply(BatchPlan(1, open=tuple(opening), append=tuple(append)))
    return tables.batch(planned)


WANTS = st.sampled_from([int(Want.NOTHING), int(Want.TOKEN), int(Want.TOKEN | Want.PROMPT_LOGPROBS)])
SLICES = st.lists(st.tuples(st.integers(0, 30_000), st.integers(1, 700), WANTS), min_size=1, max_size=8)


@given(SLICES)
def test_every_slice_is_covered_once_in_order_and_within_bounds(slices) -> None:
    batch = batch_of(slices)
    at = batch.starts.copy()
    ended = set()
    for parts in rectangles(batch, LAYOUT, COSTS):
        length, reach = parts[0].length, max(part.end for part in parts)
        assert len({part.number for part in parts}) == len(parts)
        assert len(parts) * length <= MOST_TOKENS
        assert length == 1 or len(parts) * length * reach * COSTS.heads <= MOST_SCORES
        for part in parts:
            assert part.length == length and part.start == at[part.number] and part.number not in ended
            assert length <= SCORED_TOKENS or part.number not in batch.scored
            at[part.number] += length
            if part.last:
                ended.add(part.number)
    assert (at == batch.starts + batch.lengths).all() and ended == set(range(len(slices)))


def test_decoding_rows_of_like_context_are_one_rectangle() -> None:
    batch = batch_of([(start, 1, int(Want.TOKEN)) for start in (100, 300, 200, 130)])
    (parts,) = rectangles(batch, LAYOUT, COSTS)
    assert [part.number for part in parts] == [1, 2, 3, 0]


def test_a_short_context_is_not_padded_to_a_far_longer_one_when_that_costs_more_than_the_weights() -> None:
    batch = batch_of([(start, 1, int(Want.TOKEN)) for start in (30_000, 100, 29_000, 200)])
    dear = [[part.number for part in parts] for parts in rectangles(batch, LAYOUT, COSTS)]
    assert dear == [[0, 2], [3, 1]]
    cheap = Costs(COSTS.heads, COSTS.token_values, COSTS.token_bytes, 1 << 40)
    assert len(list(rectangles(batch, LAYOUT, cheap))) == 1


def test_a_window_costs_no_more_than_itself() -> None:
    windows = KvLayout((KvGroup("window100", (0,), 2, 16, 16, window=100),))
    batch = batch_of([(start, 1, int(Want.TOKEN)) for start in (30_000, 100, 29_000, 200)])
    assert len(list(rectangles(batch, windows, COSTS))) == 1


def test_what_gathered_keys_take_is_bounded(monkeypatch) -> None:
    monkeypatch.setattr(module, "MOST_SCORES", 64 * 30_001 * 2)
    batch = batch_of([(30_000, 1, int(Want.TOKEN))] * 5)
    cheap = Costs(COSTS.heads, COSTS.token_values, COSTS.token_bytes, 1 << 40)
    assert [len(parts) for parts in rectangles(batch, LAYOUT, cheap)] == [2, 2, 1]


def test_costs_come_from_the_model() -> None:
    spec = V2_3.spec(V2_3.shapes[0][1])
    costs = Costs.of(spec, 7)
    attention = spec.layers[0].attention
    assert costs.heads == attention.heads and costs.token_values == 2 * attention.kv_heads * attention.head_dim
    assert costs.token_bytes == len(spec.layers) * costs.token_values * 4 and costs.weight_bytes == 7
