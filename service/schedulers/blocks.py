"""Block ids: who holds each block of each KV group, which free blocks still hold cached content, and sequences' block tables.

It does not know tokens, hashes' meaning or what a worker keeps in a block. Blocks are numbered 1 … n in each group; 0 is the null block.
Invariants (recounted by `check()`): a block's count equals the tables that hold it; a block is free exactly when its count is 0; a key
names at most one block of a group; table entries from a group's sinks up to `released` are null and no other entry is; a near block is
released only when its far group holds it.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass, field

from service.schedulers.sequence import InvariantBroken, Sequence
from service.types.kv_layout import KvLayout
from service.types.plan import BlockAppend, BlockDemote, BlockRelease


class BlockPool:
    """The blocks of one KV group. Free blocks are kept oldest first, those without content before all others."""

    __slots__ = ("by_key", "counts", "free", "keys", "size", "stamps")

    def __init__(self, size: int) -> None:
        self.size = size
        self.counts = [0] * (size + 1)
        self.keys: list[bytes | None] = [None] * (size + 1)
        self.stamps = [0] * (size + 1)
        self.by_key: dict[bytes, int] = {}
        self.free: OrderedDict[int, None] = OrderedDict.fromkeys(range(1, size + 1))

    @property
    def used_ratio(self) -> float:
        """The share of the blocks that live sequences hold."""
        return 1.0 - len(self.free) / self.size if self.size else 0.0

    def take(self, number: int) -> list[int]:
        """`number` blocks for new content; the caller has seen that so many are free. Cached content of the oldest is lost."""
        taken = [self.free.popitem(last=False)[0] for _ in range(number)]
        for block in taken:
            self.forget(block)
            self.counts[block] = 1
            self.stamps[block] += 1
        return taken

    def share(self, block: int) -> None:
        """One more holder of a block that has cached content."""
        if self.counts[block] == 0:
            del self.free[block]
        self.counts[block] += 1

    def give_back(self, block: int, keep: bool) -> None:
        """One holder less. With `keep` the content may still be asked for, so that the block is reused last; else first."""
        self.counts[block] -= 1
        if self.counts[block] == 0:
            self.free[block] = None
            if not keep and self.keys[block] is None:
                self.free.move_to_end(block, last=False)
        elif self.counts[block] < 0:
            raise InvariantBroken(f"block {block} was given back more often than taken")

    def name(self, block: int, key: bytes, stamp: int | None = None) -> None:
        """The block holds the content of `key` from now on, unless another block does or (with `stamp`) it was taken anew since."""
        if key in self.by_key or self.keys[block] is not None or (stamp is not None and self.stamps[block] != stamp):
            return
        self.keys[block] = key
        self.by_key[key] = block

    def forget(self, block: int) -> None:
        """The block's content can no longer be found."""
        key = self.keys[block]
        if key is not None:
            self.keys[block] = None
            del self.by_key[key]


@dataclass(slots=True)
class TableChanges:
    """What a plan tells the worker of its tables."""

    appends: list[BlockAppend] = field(default_factory=list)
    releases: list[BlockRelease] = field(default_factory=list)
    demotes: list[BlockDemote] = field(default_factory=list)

    def drop(self, row: int) -> None:
        """Forget the changes of a row that is closed instead."""
        self.appends = [change for change in self.appends if change.row != row]
        self.releases = [change for change in self.releases if change.row != row]
        self.demotes = [change for change in self.demotes if change.row != row]


class BlockSpace:
    """The pools of all KV groups and the block tables of the sequences that run."""

    def __init__(self, layout: KvLayout, group_blocks: tuple[int, ...]) -> None:
        self.layout = layout
        self.block_tokens = layout.block_tokens
        self.pools = tuple(BlockPool(size) for size in group_blocks)
        groups = layout.groups
        self._windowed = tuple(index for index, group in enumerate(groups) if group.window is not None and group.source is None)
        self._far = tuple((index, group.source) for index, group in enumerate(groups) if group.source is not None)
        self._far_of = {source: index for index, source in self._far}
        self._grows_from = tuple(0 if group.source is None else layout.reach(group, layout.first_read(group, 0)) for group in groups)

    # Questions.

    def blocks_for(self, tokens: int) -> tuple[int, ...]:
        """Most blocks of each group that a sequence of `tokens` holds at a step boundary."""
        return tuple(self.layout.blocks_for(group, tokens) for group in self.layout.groups)

    def fits_alone(self, tokens: int) -> bool:
        """Could a sequence of `tokens` run if it were the only one?"""
        return all(need <= pool.size for need, pool in zip(self.blocks_for(tokens), self.pools, strict=True))

    def shortfall(self, sequence: Sequence) -> list[int]:
        """Blocks of each group that the sequence still needs for every token it knows."""
        needs = self.blocks_for(sequence.length)
        return [max(need - self._held(sequence, group), 0) for group, need in enumerate(needs)]

    def may_grow(self, sequences: Iterable[Sequence]) -> list[int]:
        """How many of the sequences may come to need one more block of each group: none of a far group that stay within its window."""
        limits = [sequence.limit for sequence in sequences]
        return [sum(limit > start for limit in limits) if start else len(limits) for start in self._grows_from]

    def reach(self, sequence: Sequence) -> int:
        """The positions that its tables and all free blocks together could serve."""
        groups = zip(self.layout.groups, sequence.tables, self.pools, strict=True)
        return min(self.layout.reach(group, len(table) + len(pool.free)) for group, table, pool in groups)

    def first_needed(self, group: int, position: int) -> int:
        """The lowest table index of `group`, its sinks apart, that a query at `position` or later reads."""
        return self.layout.first_read(self.layout.groups[group], position)

    def _held(self, sequence: Sequence, group: int) -> int:
        return len(sequence.tables[group]) - max(sequence.released[group] - self.layout.groups[group].sink_blocks, 0)

    # Changes of one sequence's tables.

    def open(self, sequence: Sequence) -> None:
        """Give the sequence empty tables. A far table starts behind the sinks, which are never in it."""
        groups = self.layout.groups
        starts = [0 if group.source is None else self.layout.first_read(group, 0) for group in groups]
        sequence.tables = [[0] * start for start in starts]
        sequence.released = starts
        sequence.named = [0] * len(groups)
        sequence.next_change = 0

    def adopt(self, sequence: Sequence, group: int, first: int, blocks: dict[int, int]) -> None:
        """Start a table of an opened sequence with shared cached `blocks` by table index; entries before `first` are null but for sinks."""
        for block in blocks.values():
            self.pools[group].share(block)
        sequence.tables[group] = [blocks.get(index, 0) for index in range(max([first, *(index + 1 for index in blocks)]))]
        sequence.released[group] = first

    def adopted(self, sequence: Sequence) -> list[BlockAppend]:
        """The tables of a sequence that was just opened, as the worker is told."""
        appends = []
        for group, (table, start) in enumerate(zip(sequence.tables, sequence.released, strict=True)):
            sinks = self.layout.groups[group].sink_blocks
            for first, end in ((0, min(sinks, start)), (start, len(table))):
                if first < end:
                    appends.append(BlockAppend(sequence.row, group, first, tuple(table[first:end])))
        return appends

    def extend(self, sequence: Sequence, end: int, changes: TableChanges) -> bool:
        """Let the tables serve queries below `end`; False, and nothing changed, when blocks are lacking."""
        needs = [self.layout.entries(group, end - 1) for group in self.layout.groups]
        for need, table, pool in zip(needs, sequence.tables, self.pools, strict=True):
            if need - len(table) > len(pool.free):
                return False
        for group, need in enumerate(needs):
            if need > len(sequence.tables[group]):
                self._append(sequence, group, need, changes)
        sequence.next_change = self._next_change(sequence)
        return True

    def _append(self, sequence: Sequence, group: int, need: int, changes: TableChanges) -> None:
        """Lengthen a table to `need` entries; those of a far group are filled from its near group."""
        table = sequence.tables[group]
        blocks = tuple(self.pools[group].take(need - len(table)))
        changes.appends.append(BlockAppend(sequence.row, group, len(table), blocks))
        source = self.layout.groups[group].source
        if source is not None:
            near = tuple(sequence.tables[source][len(table) : need])
            if 0 in near or len(near) < len(blocks):
                raise InvariantBroken(f"sequence {sequence.arrival}: a block became far after it was released")
            changes.demotes.append(BlockDemote(sequence.row, group, near, blocks))
            sequence.next_proof = 0  # what became far may have been proven long ago, and can be named as soon as this step is sent
        table.extend(blocks)

    def release_behind(self, sequence: Sequence, position: int, changes: TableChanges) -> None:
        """Give back what no query at `position` or later reads (windowed groups only), as far as it is kept elsewhere if it must be."""
        for group, source in self._far:
            need = self.layout.entries(self.layout.groups[group], position)
            missing = need - len(sequence.tables[group])
            if 0 < missing <= len(self.pools[group].free) and need <= len(sequence.tables[source]):
                self._append(sequence, group, need, changes)
        for group in self._windowed:
            table, sinks = sequence.tables[group], self.layout.groups[group].sink_blocks
            gone = max(sequence.released[group], sinks)
            before = min(self.first_needed(group, position), len(table))
            if group in self._far_of:
                before = min(before, len(sequence.tables[self._far_of[group]]))
            if before <= gone:
                continue
            pool = self.pools[group]
            for index in range(gone, before):
                block = table[index]
                table[index] = 0
                if index >= sequence.proven_blocks:
                    sequence.unproven.append((group, index, block, pool.stamps[block]))
                pool.give_back(block, keep=True)
            sequence.released[group] = before
            changes.releases.append(BlockRelease(sequence.row, group, before))

    def free(self, sequence: Sequence) -> None:
        """Give back every block of the sequence, the last first, so that a prefix outlives its tail."""
        for table, pool in zip(sequence.tables, self.pools, strict=bool(sequence.tables)):
            for block in reversed(table):
                if block:
                    pool.give_back(block, keep=False)
        sequence.tables = []
        sequence.released = []

    def _next_change(self, sequence: Sequence) -> int:
        groups = self.layout.groups
        covered = min(self.layout.reach(group, len(table)) for group, table in zip(groups, sequence.tables, strict=True))
        for index in self._windowed:
            start = max(sequence.released[index], groups[index].sink_blocks)
            covered = min(covered, self.layout.next_start(groups[index], start))
        return covered

    # Idle checks.

    def check(self, sequences: Iterable[Sequence]) -> None:
        """Recount everything from the sequences' tables; raises InvariantBroken on the first difference."""
        holders = [[0] * (pool.size + 1) for pool in self.pools]
        for sequence in sequences:
            self._check_far(sequence)
            for group, table in enumerate(sequence.tables):
                sinks = self.layout.groups[group].sink_blocks
                for index, block in enumerate(table):
                    if (block == 0) != (sinks <= index < sequence.released[group]):
                        raise InvariantBroken(f"sequence {sequence.arrival}, group {group}: entry {index} is {block}")
                    holders[group][block] += 1
        for group, pool in enumerate(self.pools):
            self._check_pool(group, pool, holders[group])

    def _check_far(self, sequence: Sequence) -> None:
        for group, source in self._far if sequence.tables else ():
            if len(sequence.tables[group]) < sequence.released[source]:
                raise InvariantBroken(f"sequence {sequence.arrival}: blocks of group {source} were released and are not in group {group}")

    @staticmethod
    def _check_pool(group: int, pool: BlockPool, holders: list[int]) -> None:
        for block in range(1, pool.size + 1):
            if pool.counts[block] != holders[block]:
                raise InvariantBroken(f"group {group}, block {block}: counted {pool.counts[block]}, held by {holders[block]}")
            if (block in pool.free) != (holders[block] == 0):
                raise InvariantBroken(f"group {group}, block {block}: held by {holders[block]} and free is {block in pool.free}")
            key = pool.keys[block]
            if key is not None and pool.by_key.get(key) != block:
                raise InvariantBroken(f"group {group}, block {block}: its key names another block")
        if len(pool.by_key) != sum(key is not None for key in pool.keys) or len(pool.free) != holders[1:].count(0):
            raise InvariantBroken(f"group {group}: keys or free blocks do not add up")
