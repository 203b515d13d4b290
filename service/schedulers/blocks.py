"""Block ids: who holds each block of each KV group, which free blocks still hold cached content, and sequences' block tables.

It does not know tokens, hashes' meaning or what a worker keeps in a block. Blocks are numbered 1 … n in each group; 0 is the null block.
Invariants (recounted by `check()`): a block's count equals the tables that hold it; a block is free exactly when its count is 0; a key
names at most one block of a group; table entries below `released` are null and no other entry is.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable

from service.schedulers.sequence import InvariantBroken, Sequence
from service.types.model_spec import KvLayout
from service.types.plan import BlockAppend, BlockRelease


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


class BlockSpace:
    """The pools of all KV groups and the block tables of the sequences that run."""

    def __init__(self, layout: KvLayout, group_blocks: tuple[int, ...]) -> None:
        self.layout = layout
        self.block_tokens = layout.block_tokens
        self.pools = tuple(BlockPool(size) for size in group_blocks)
        self._windows = tuple(group.window for group in layout.groups)
        self._windowed = tuple((index, window) for index, window in enumerate(self._windows) if window is not None)

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
        held = [len(table) - gone for table, gone in zip(sequence.tables, sequence.released, strict=True)]
        return [max(need - have, 0) for need, have in zip(needs, held, strict=True)]

    def reach(self, sequence: Sequence) -> int:
        """The positions that its tables and all free blocks together could cover."""
        return min((len(table) + len(pool.free)) * self.block_tokens for table, pool in zip(sequence.tables, self.pools, strict=True))

    def first_needed(self, group: int, position: int) -> int:
        """The lowest table index of `group` that a query at `position` or later reads."""
        window = self._windows[group]
        return 0 if window is None else max(position - window + 1, 0) // self.block_tokens

    # Changes of one sequence's tables.

    def open(self, sequence: Sequence) -> None:
        """Give the sequence empty tables."""
        sequence.tables = [[] for _ in self.pools]
        sequence.released = [0] * len(self.pools)
        sequence.next_change = 0

    def adopt(self, sequence: Sequence, group: int, first: int, blocks: list[int]) -> None:
        """Start a table of an opened sequence with shared cached blocks from index `first` on; what lies before is null."""
        for block in blocks:
            self.pools[group].share(block)
        sequence.tables[group] = [0] * first + blocks
        sequence.released[group] = first

    def extend(self, sequence: Sequence, end: int, appends: list[BlockAppend]) -> bool:
        """Let the tables cover positions below `end`; False, and nothing changed, when blocks are lacking."""
        need = -(-end // self.block_tokens)
        for table, pool in zip(sequence.tables, self.pools, strict=True):
            if need - len(table) > len(pool.free):
                return False
        for group, (table, pool) in enumerate(zip(sequence.tables, self.pools, strict=True)):
            if need > len(table):
                blocks = pool.take(need - len(table))
                appends.append(BlockAppend(sequence.row, group, len(table), tuple(blocks)))
                table.extend(blocks)
        sequence.next_change = self._next_change(sequence)
        return True

    def release_behind(self, sequence: Sequence, position: int, releases: list[BlockRelease]) -> None:
        """Give back what no query at `position` or later reads (windowed groups only)."""
        for group, _ in self._windowed:
            table, gone = sequence.tables[group], sequence.released[group]
            before = min(self.first_needed(group, position), len(table))
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
            releases.append(BlockRelease(sequence.row, group, before))

    def free(self, sequence: Sequence) -> None:
        """Give back every block of the sequence, the last first, so that a prefix outlives its tail."""
        for table, pool in zip(sequence.tables, self.pools, strict=bool(sequence.tables)):
            for block in reversed(table):
                if block:
                    pool.give_back(block, keep=False)
        sequence.tables = []
        sequence.released = []

    def _next_change(self, sequence: Sequence) -> int:
        covered = min(len(table) for table in sequence.tables) * self.block_tokens
        for group, window in self._windowed:
            covered = min(covered, (sequence.released[group] + 1) * self.block_tokens + window - 1)
        return covered

    # Idle checks.

    def check(self, sequences: Iterable[Sequence]) -> None:
        """Recount everything from the sequences' tables; raises InvariantBroken on the first difference."""
        holders = [[0] * (pool.size + 1) for pool in self.pools]
        for sequence in sequences:
            for group, table in enumerate(sequence.tables):
                for index, block in enumerate(table):
                    if (block == 0) != (index < sequence.released[group]):
                        raise InvariantBroken(f"sequence {sequence.arrival}, group {group}: entry {index} is {block}")
                    holders[group][block] += 1
        for group, pool in enumerate(self.pools):
            self._check_pool(group, pool, holders[group])

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
