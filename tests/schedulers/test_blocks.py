from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from service.schedulers.blocks import BlockSpace, TableChanges
from service.schedulers.prefix_cache import PrefixCache
from service.schedulers.sequence import InvariantBroken, Sequence, Share
from service.schedulers.streams import Stream
from service.telemetry import Telemetry
from tests.fakes import ByteDecoder, Far, layout
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
    sequence, changes = opened(space), TableChanges()
    assert space.extend(sequence, 5, changes)
    assert [(change.group, change.first, len(change.blocks)) for change in changes.appends] == [(0, 0, 2), (1, 0, 2)]
    assert not space.extend(sequence, 9, changes)
    assert len(changes.appends) == 2
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
    sequence, changes = opened(space), TableChanges()
    space.extend(sequence, 16, TableChanges())
    space.release_behind(sequence, 12, changes)
    assert [(change.group, change.before) for change in changes.releases] == [(1, 2)]
    assert sequence.tables[1][:2] == [0, 0]
    assert 0 not in sequence.tables[0]
    assert len(space.pools[1].free) == 7
    space.release_behind(sequence, 12, changes)
    assert len(changes.releases) == 1
    space.check([sequence])
    space.free(sequence)
    space.check([])


def test_a_window_costs_its_window_at_every_length():
    space = BlockSpace(layout(4, (6,)), (3,))
    sequence = opened(space, max_tokens=150)
    for position in range(150):
        if position >= sequence.next_change:
            space.release_behind(sequence, position, TableChanges())
            assert space.extend(sequence, position + 1, TableChanges()), f"no room at {position}"
        assert len(sequence.tables[0]) - sequence.released[0] <= 3
        assert sequence.released[0] == space.first_needed(0, position), "the shortcut by next_change misses a release"


@pytest.mark.parametrize("refresh", [1, 2, 4])
def test_far_blocks_are_what_the_newest_query_may_choose_from(refresh):
    """Position by position: sinks and the window near, all between far, each block somewhere, and each becomes far once."""
    space = BlockSpace(layout(4, (Far(6, refresh),)), (4, 35))
    sequence, demoted = opened(space, max_tokens=150), []
    for position in range(150):
        start = max(position // refresh * refresh - 5, 0) // 4
        if position >= sequence.next_change:
            changes = TableChanges()
            space.release_behind(sequence, position, changes)
            assert space.extend(sequence, position + 1, changes), f"no room at {position}"
            demoted += [block for change in changes.demotes for block in change.targets]
        near, far = sequence.tables
        assert len(far) == max(start, 1) and far[0] == 0 and all(far[1:])
        assert near[0] and not any(near[1:start]) and all(near[start:]) and len(near) == position // 4 + 1
        space.check([sequence])
    assert demoted == sequence.tables[1][1:]


def test_a_near_block_waits_for_room_in_the_far_group():
    space = BlockSpace(layout(4, (Far(4),)), (9, 1))
    sequence, changes = opened(space), TableChanges()
    assert space.extend(sequence, 12, changes)
    assert not space.extend(sequence, 16, changes)
    space.release_behind(sequence, 15, changes)
    assert sequence.released[0] == 2 and all(sequence.tables[0][2:])
    space.check([sequence])


def test_demotions_name_the_near_blocks_before_they_are_released():
    space = BlockSpace(layout(4, (Far(4),)), (9, 9))
    sequence, changes = opened(space), TableChanges()
    space.extend(sequence, 12, changes)
    near = list(sequence.tables[0])
    later = TableChanges()
    space.release_behind(sequence, 15, later)
    assert [(change.group, change.sources) for change in (*changes.demotes, *later.demotes)] == [(1, (near[1],)), (1, (near[2],))]
    assert [change.before for change in later.releases] == [3]
    later.drop(sequence.row)
    assert later == TableChanges()


def test_cached_content_is_the_last_to_be_reused():
    space = BlockSpace(layout(4), (4,))
    cache = PrefixCache(space, "digest")
    sequence = opened(space)
    space.extend(sequence, 12, TableChanges())
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
        space.extend(sequence, 12, TableChanges())
        space.release_behind(sequence, 12, TableChanges())
        fault(space, sequence)
        with pytest.raises(InvariantBroken):
            space.check([sequence])

    plant(lambda space, sequence: sequence.tables[0].pop())
    plant(lambda space, sequence: sequence.tables[0].append(9))
    plant(lambda space, sequence: sequence.tables[1].__setitem__(0, 3))
    plant(lambda space, sequence: space.pools[0].free.popitem())
    plant(lambda space, sequence: space.pools[0].counts.__setitem__(9, 1))
    plant(lambda space, sequence: space.pools[0].by_key.__setitem__(b"key", 1))
    far = BlockSpace(layout(4, (Far(4),)), (9, 9))
    sequence = opened(far)
    far.extend(sequence, 12, TableChanges())
    far.release_behind(sequence, 15, TableChanges())
    far.pools[1].give_back(sequence.tables[1].pop(), keep=False)
    with pytest.raises(InvariantBroken, match="not in group 1"):
        far.check([sequence])
    with pytest.raises(InvariantBroken):
        BlockSpace(layout(4), (2,)).pools[0].give_back(1, keep=False)


class BlocksMachine(RuleBasedStateMachine):
    """Random lives of sequences with shared prefixes: the books always balance and a hit always holds what it needs."""

    def __init__(self) -> None:
        super().__init__()
        self.space = BlockSpace(layout(4, (None, 7, Far(5, 2))), (14, 10, 12, 9))
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
            start = self.space.first_needed(2, hit * 4)
            assert sequence.tables[2][0] and all(sequence.tables[2][start:]) and all(sequence.tables[3][1:])
            assert len(sequence.tables[3]) == max(start, 1), "a hit holds all that the next query may choose from"
        self.live.append(sequence)

    @precondition(lambda self: self.live)
    @rule(data=st.data(), length=st.integers(1, 5))
    def compute(self, data, length):
        sequence = data.draw(st.sampled_from(self.live))
        start = sequence.computed
        end = min(start + length, len(sequence.tokens))
        self.space.release_behind(sequence, start, TableChanges())
        if end > start and self.space.extend(sequence, end, TableChanges()):
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
