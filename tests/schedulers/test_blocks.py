from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from service.schedulers.blocks import BlockSpace
from service.schedulers.prefix_cache import PrefixCache
from service.schedulers.sequence import InvariantBroken, Sequence, Share
from service.schedulers.streams import Stream
from service.telemetry import Telemetry
from tests.fakes import ByteDecoder, layout
from tests.schedulers.support import ask

LATENCIES = Telemetry().version("v", "cpu", "none").latencies("")


def make_sequence(prompt: str | tuple[int, ...] = "hello world!", max_tokens: int = 20, arrival: int = 0, **fields) -> Sequence:
    request = ask(prompt, max_tokens, **fields)
    return Sequence(request, arrival, Share(request.tenant, 0), Stream("id", ByteDecoder(), (), 100), LATENCIES)


def opened(space: BlockSpace, **fields) -> Sequence:
    sequence = make_sequence(**fields)
    space.open(sequence)
    return sequence


def test_extend_takes_blocks_in_every_group_or_none():
    space = BlockSpace(layout(4, (None, 8)), (3, 2))
    sequence, appends = opened(space), []
    assert space.extend(sequence, 5, appends)
    assert [(change.group, change.first, len(change.blocks)) for change in appends] == [(0, 0, 2), (1, 0, 2)]
    assert not space.extend(sequence, 9, appends)
    assert len(appends) == 2
    assert len(space.pools[0].free) == 1
    space.check([sequence])


@pytest.mark.parametrize(
    ("window", "position", "first"), [(8, 7, 0), (8, 10, 0), (8, 11, 1), (8, 15, 2), (1, 8, 2), (1, 9, 2), (None, 99, 0)]
)
def test_first_needed_is_the_block_of_the_oldest_visible_token(window, position, first):
    space = BlockSpace(layout(4, (window,)), (9,))
    assert space.first_needed(0, position) == first
    if window is not None:
        assert first == max(position - window + 1, 0) // 4


def test_release_leaves_null_entries_in_windowed_groups_only():
    space = BlockSpace(layout(4, (None, 5)), (9, 9))
    sequence, releases = opened(space), []
    space.extend(sequence, 16, [])
    space.release_behind(sequence, 12, releases)
    assert [(change.group, change.before) for change in releases] == [(1, 2)]
    assert sequence.tables[1][:2] == [0, 0]
    assert 0 not in sequence.tables[0]
    assert len(space.pools[1].free) == 7
    space.release_behind(sequence, 12, releases)
    assert len(releases) == 1
    space.check([sequence])
    space.free(sequence)
    space.check([])


def test_a_window_costs_its_window_at_every_length():
    space = BlockSpace(layout(4, (6,)), (3,))
    sequence = opened(space, max_tokens=150)
    for position in range(150):
        if position >= sequence.next_change:
            space.release_behind(sequence, position, [])
            assert space.extend(sequence, position + 1, []), f"no room at {position}"
        assert len(sequence.tables[0]) - sequence.released[0] <= 3
        assert sequence.released[0] == space.first_needed(0, position), "the shortcut by next_change misses a release"


def test_cached_content_is_the_last_to_be_reused():
    space = BlockSpace(layout(4), (4,))
    cache = PrefixCache(space, "digest")
    sequence = opened(space)
    space.extend(sequence, 12, [])
    sequence.computed = 8
    cache.prove(sequence)
    cached = sequence.tables[0][:2]
    space.free(sequence)
    taken = space.pools[0].take(2)
    assert not set(taken) & set(cached)
    assert space.pools[0].take(1) == [cached[1]], "the tail of a prefix goes first"
    assert len(space.pools[0].by_key) == 1


def test_check_notices_planted_faults():
    def plant(fault) -> None:
        space = BlockSpace(layout(4, (None, 5)), (9, 9))
        sequence = opened(space)
        space.extend(sequence, 12, [])
        space.release_behind(sequence, 12, [])
        fault(space, sequence)
        with pytest.raises(InvariantBroken):
            space.check([sequence])

    plant(lambda space, sequence: sequence.tables[0].pop())
    plant(lambda space, sequence: sequence.tables[0].append(9))
    plant(lambda space, sequence: sequence.tables[1].__setitem__(0, 3))
    plant(lambda space, sequence: space.pools[0].free.popitem())
    plant(lambda space, sequence: space.pools[0].counts.__setitem__(9, 1))
    plant(lambda space, sequence: space.pools[0].by_key.__setitem__(b"key", 1))
    with pytest.raises(InvariantBroken):
        BlockSpace(layout(4), (2,)).pools[0].give_back(1, keep=False)


class BlocksMachine(RuleBasedStateMachine):
    """Random lives of sequences with shared prefixes: the books always balance and a hit always holds what it needs."""

    def __init__(self) -> None:
        super().__init__()
        self.space = BlockSpace(layout(4, (None, 7)), (14, 10))
        self.cache = PrefixCache(self.space, "digest")
        self.live: list[Sequence] = []

    @rule(prompt=st.sampled_from(("a" * 9, "a" * 21, "aaaabbbb" * 2, "c" * 30)))
    def open(self, prompt):
        sequence = opened(self.space, prompt=prompt)
        hit = self.cache.match(sequence)
        assert hit * 4 < len(prompt)
        if hit:
            self.cache.adopt(sequence, hit)
            assert all(sequence.tables[0]), "a full group holds the whole prefix"
            assert all(sequence.tables[1][self.space.first_needed(1, hit * 4) :])
        self.live.append(sequence)

    @precondition(lambda self: self.live)
    @rule(data=st.data(), length=st.integers(1, 9))
    def compute(self, data, length):
        sequence = data.draw(st.sampled_from(self.live))
        start = sequence.computed
        end = min(start + length, len(sequence.tokens))
        self.space.release_behind(sequence, start, [])
        if end > start and self.space.extend(sequence, end, []):
            sequence.scheduled = sequence.computed = end

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def prove(self, data):
        self.cache.prove(data.draw(st.sampled_from(self.live)))

    @precondition(lambda self: self.live)
    @rule(data=st.data(), bad=st.booleans())
    def close(self, data, bad):
        sequence = data.draw(st.sampled_from(self.live))
        self.live.remove(sequence)
        if bad:
            self.cache.disown(sequence)
            own = set(sequence.keys[sequence.hit_blocks :])
            assert not any(own & set(pool.by_key) for pool in self.space.pools)
        self.space.free(sequence)

    @invariant()
    def books_balance(self):
        self.space.check(self.live)


BlocksMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestBlocks = BlocksMachine.TestCase
