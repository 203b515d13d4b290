"""Spend a step's token budget: sequences and free blocks in, a BatchPlan out. No clock, no I/O, no randomness.

There are no phases: every sequence has a gap of positions to compute. Decode rows (a gap of one) come first, then running prefills by
order, then waiting sequences while rows, budget and blocks last. When blocks are lacking the youngest sequence of the lowest priority
loses its place and is recomputed later. It does not know streams, deadlines or time.
Invariants: the first sequence in order always moves (admission saw that it fits alone), so there is no livelock; a plan carries changes
only; rows are distinct within a plan.
"""

from __future__ import annotations

from bisect import insort
from dataclasses import dataclass, field
from typing import NamedTuple

from service.schedulers.blocks import BlockSpace, TableChanges
from service.schedulers.openings import OPENED_PIXEL_BYTES, has_image_room, openings
from service.schedulers.prefix_cache import PrefixCache
from service.schedulers.sequence import Sequence, State
from service.schedulers.waiting import WaitingQueue
from service.types.plan import BatchPlan, Slice, Want

_TOKEN = int(Want.TOKEN)
_new = tuple.__new__


class Entry(NamedTuple):
    """One slice of a sent plan: whose it is, in which epoch, and the position behind it."""

    sequence: Sequence
    epoch: int
    end: int
    slice: Slice


@dataclass(slots=True)
class Step:
    """A plan and what the loop needs to apply its result.

    The first `decodes` entries are decode rows: one position, a token wanted, nothing else. `context_tokens` sums, over slices, the
    positions that their last query sees.
    """

    plan: BatchPlan
    entries: list[Entry]
    tokens: int
    context_tokens: int
    decodes: int
    samples: int
    opened: list[Sequence]


@dataclass(slots=True)
class _Draft:
    """A plan being made."""

    budget: int
    entries: list[Entry] = field(default_factory=list)
    opened: list[Sequence] = field(default_factory=list)
    changes: TableChanges = field(default_factory=TableChanges)
    context_tokens: int = 0
    decodes: int = 0
    preempted: bool = False
    pixel_bytes: int = 0


class Planner:
    """The sequences of one worker: who waits, who runs in which row, and the next plan.

    `image_tokens` is the most that running sequences may hold together; it is set when the worker is known.
    """

    def __init__(self, space: BlockSpace, cache: PrefixCache, rows: int, step_tokens: int) -> None:
        self.space = space
        self.cache = cache
        self.waiting = WaitingQueue()
        self.running: list[Sequence] = []
        self.preemptions = 0
        self.image_tokens = 0
        self._step_tokens = step_tokens
        self._free_rows = list(range(min(rows, step_tokens) - 1, -1, -1))
        self._closing: list[int] = []
        self._leaders: dict[bytes, Sequence] = {}
        self._suspects: list[Sequence] = []
        self._step = 0

    # Sequences come and go.

    def leave(self, sequence: Sequence, to: State) -> None:
        """The sequence ends, or loses its place and waits again; its blocks are free at once (plans execute in order)."""
        if sequence.state is State.RUNNING:
            self.running.remove(sequence)
            self._closing.append(sequence.row)
            self._free_rows.append(sequence.row)
            self.space.free(sequence)
            self.stop_leading(sequence)
        elif sequence.state is State.WAITING:
            self.waiting.remove(sequence)
        if to is State.FINISHED and sequence in self._suspects:
            self._suspects.remove(sequence)
        sequence.withdraw(to)
        if to is State.WAITING:
            self.waiting.add(sequence)

    def abandon(self) -> list[Sequence]:
        """Forget every sequence and every block, when their counts can no longer be trusted; the sequences that were live."""
        live = self.sequences()
        self.running.clear()
        self.waiting = WaitingQueue()
        self.space = BlockSpace(self.space.layout, (0,) * len(self.space.pools))
        return live

    def suspect(self, sequence: Sequence, until: int) -> None:
        """Run the sequence alone until position `until` is computed: the worker died more than once while executing it."""
        sequence.suspect_until = until
        if sequence not in self._suspects:
            self._suspects.append(sequence)

    def clear_suspect(self, sequence: Sequence) -> None:
        """The worker survived the sequence alone: it may run with the others again."""
        sequence.suspect_until = 0
        self._suspects.remove(sequence)

    def restart(self, space: BlockSpace, cache: PrefixCache, rows: int, step_tokens: int) -> None:
        """The worker and all that it held are gone: every sequence waits, and a new worker of this size takes over."""
        for sequence in list(self.running):
            self.leave(sequence, State.WAITING)
        self.space, self.cache = space, cache
        self._step_tokens = step_tokens
        self._free_rows = list(range(min(rows, step_tokens) - 1, -1, -1))
        self._closing = []

    def sequences(self) -> list[Sequence]:
        """Every live sequence."""
        return [*self.running, *self.waiting]

    def stop_leading(self, sequence: Sequence) -> None:
        """Sequences with the same prompt need not wait for this one any more."""
        if sequence.leads is not None:
            if self._leaders.get(sequence.leads) is sequence:
                del self._leaders[sequence.leads]
            sequence.leads = None

    # The plan.

    def plan(self) -> Step | None:
        """The next step, or None when nothing can be computed now."""
        draft = _Draft(self._step_tokens)
        if self._suspects:
            self._plan_alone(self._suspects[0], draft)
        else:
            prefills = self._plan_decodes(draft)
            for sequence in prefills:
                if draft.budget > 0 and sequence.state is State.RUNNING:
                    self._add_prefill(sequence, draft)
            if self.waiting and self._free_rows and not draft.preempted:
                self._plan_waiting(draft)
        return self._finish_plan(draft) if draft.entries else None

    def _plan_decodes(self, draft: _Draft) -> list[Sequence]:
        """Add every decode row; gives the running sequences that have more to compute, in order.

        The loop is the parent's hottest: it writes out what `_add` does for one position and makes its tuples without their
        constructors (0.4 us a row less).
        """
        running, prefills, entries, index, context = self.running, [], draft.entries, 0, 0
        while index < len(running):
            sequence = running[index]
            start = sequence.scheduled
            gap = sequence.wanted - start
            if gap > 0 and not (gap == 1 and sequence.decoding):
                prefills.append(sequence)
            elif gap == 1 and (start < sequence.next_change or self._make_room(sequence, start + 1, draft)):
                end = start + 1
                sequence.scheduled = end
                sequence.in_flight += 1
                sequence.wanted = end + 1 if end < sequence.limit else end
                sequence.share.served += 1
                context += end
                entries.append(_new(Entry, (sequence, sequence.epoch, end, _new(Slice, (sequence.row, start, 1, _TOKEN)))))
            index += 1
        draft.decodes = len(entries)
        draft.budget -= draft.decodes
        draft.context_tokens = context
        return prefills

    def _add_prefill(self, sequence: Sequence, draft: _Draft) -> None:
        start = sequence.scheduled
        self.space.release_behind(sequence, start, draft.changes)
        length = min(self._longest(sequence, draft), max(self.space.reach(sequence) - start, 1))
        if self._make_room(sequence, start + length, draft):
            self._add(sequence, length, draft)

    def _longest(self, sequence: Sequence, draft: _Draft) -> int:
        """The longest slice of the sequence that this plan may compute if there are blocks enough."""
        return min(sequence.gap, draft.budget, self.space.layout.slice_tokens or sequence.gap)

    def _make_room(self, sequence: Sequence, end: int, draft: _Draft) -> bool:
        """Cover positions below `end`, preempting from the end of the order; False when the sequence itself had to go."""
        self.space.release_behind(sequence, sequence.scheduled, draft.changes)
        while not self.space.extend(sequence, end, draft.changes):
            victim = self.running[-1]
            self._preempt(victim, draft)
            if victim is sequence:
                return False
            self.space.release_behind(sequence, sequence.scheduled, draft.changes)
        return True

    def _preempt(self, victim: Sequence, draft: _Draft) -> None:
        row = victim.row
        for index, entry in enumerate(draft.entries):
            if entry.slice.row == row:
                del draft.entries[index]
                draft.decodes -= index < draft.decodes
                draft.budget += entry.slice.length
                draft.context_tokens -= entry.end
                break
        draft.changes.drop(row)
        draft.preempted = True
        self.preemptions += 1
        victim.preemptions += 1
        self.leave(victim, State.WAITING)

    def _plan_waiting(self, draft: _Draft) -> None:
        reserve = self._reserve()
        for sequence in self.waiting.in_order():
            if draft.budget <= 0 or not self._free_rows or draft.pixel_bytes > OPENED_PIXEL_BYTES:
                return
            if sequence.image_tokens and not has_image_room(sequence, self.running, self.image_tokens):
                return
            if self._follows(sequence):
                continue
            if not self._open(sequence, reserve, draft):
                return

    def _plan_alone(self, sequence: Sequence, draft: _Draft) -> None:
        if sequence.state is State.WAITING:
            self._open(sequence, [0] * len(self.space.pools), draft)
        elif sequence.gap > 0:
            self._add_prefill(sequence, draft)

    def _reserve(self) -> list[int]:
        """Blocks of each group spoken for: what running prefills still need, and one for each running sequence that may grow into it."""
        reserve = self.space.may_grow(self.running)
        for sequence in self.running:
            if sequence.gap > 1:
                reserve = [have + need for have, need in zip(reserve, self.space.shortfall(sequence), strict=True)]
        return reserve

    def _follows(self, sequence: Sequence) -> bool:
        """Is another sequence computing just this prompt's blocks? Then wait and share them instead of computing them again."""
        blocks = self.cache.reusable_blocks(sequence)
        return blocks > 0 and self.cache.keys(sequence, blocks)[blocks - 1] in self._leaders

    def _open(self, sequence: Sequence, reserve: list[int], draft: _Draft) -> bool:
        """Give a waiting sequence a row and its first slice; False, and nothing changed, when blocks are lacking."""
        space = self.space
        space.open(sequence)
        hit = self.cache.match(sequence)
        if hit:
            self.cache.adopt(sequence, hit)
        lacking = [need + kept - len(pool.free) for need, kept, pool in zip(space.shortfall(sequence), reserve, space.pools, strict=True)]
        if max(lacking) > 0 and self.running:
            space.free(sequence)
            sequence.scheduled = sequence.computed = sequence.hit_blocks = sequence.proven_blocks = 0
            return False
        self.waiting.remove(sequence)
        sequence.move(State.RUNNING)
        sequence.row = self._free_rows.pop()
        insort(self.running, sequence, key=lambda other: other.order)
        draft.changes.appends += space.adopted(sequence)
        start = sequence.scheduled
        length = min(self._longest(sequence, draft), space.reach(sequence) - start)
        space.extend(sequence, start + length, draft.changes)
        if sequence.cached_tokens is None:
            sequence.cached_tokens = start
        draft.opened.append(sequence)
        draft.pixel_bytes += sequence.request.pixel_bytes
        for group, (need, growth) in enumerate(zip(space.shortfall(sequence), space.may_grow((sequence,)), strict=True)):
            reserve[group] += need + growth
        blocks = self.cache.reusable_blocks(sequence)
        if blocks > hit:
            sequence.leads = sequence.keys[blocks - 1]
            self._leaders[sequence.leads] = sequence
        self._add(sequence, length, draft)
        return True

    def _add(self, sequence: Sequence, length: int, draft: _Draft) -> None:
        start = sequence.scheduled
        end = start + length
        samples = end == sequence.length and sequence.max_tokens > 0
        want = _TOKEN if samples else 0
        if not sequence.scored and start < sequence.prompt_tokens - 1:
            want |= int(Want.PROMPT_LOGPROBS)
        draft.entries.append(Entry(sequence, sequence.epoch, end, Slice(sequence.row, start, length, want)))
        draft.budget -= length
        draft.context_tokens += end
        sequence.share.served += length
        sequence.dispatch(length, samples)

    def _finish_plan(self, draft: _Draft) -> Step:
        entries = draft.entries
        self._step += 1
        plan = BatchPlan(
            step=self._step,
            slices=tuple([entry.slice for entry in entries]),
            close=tuple(self._closing),
            open=openings(draft.opened),
            append=tuple(draft.changes.appends),
            release=tuple(draft.changes.releases),
            demote=tuple(draft.changes.demotes),
        )
        self._closing = []
        samples = draft.decodes + sum(entry.slice.want & _TOKEN for entry in entries[draft.decodes :])
        return Step(plan, entries, self._step_tokens - draft.budget, draft.context_tokens, draft.decodes, samples, draft.opened)
