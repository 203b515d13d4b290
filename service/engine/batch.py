"""A worker's tables and how a plan becomes arrays: tokens and one block table per KV group for every row, flat batches out of them.

numpy alone; nothing here runs per token in Python, and per row only where a plan changes a row. It does not know tensors or models.
Invariant: a sampled token stands in the table before the next plan is read, so a plan sent ahead finds it; a plan that names
unknown rows, blocks or tokens is refused before anything is computed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from service.types.kv_layout import KvLayout
from service.types.plan import BatchPlan, OpenSequence, Slice, Want

Ints = NDArray[np.int64]
Table = NDArray[np.int32]


class PlanError(ValueError):
    """A plan contradicts the worker's tables: a fault of the parent, never of a request."""


class Batch(NamedTuple):
    """One step's arrays: S slices, T tokens, G groups.

    `query_starts` int32 [S + 1], `context_lengths` int32 [S], `block_tables` G × int32 [S, M], `block_ids` G × int64 [T] (empty for far
    groups, which no token is written to) and `offsets` int64 [T] say where each token's K/V goes. `sampled` int64 [R] are the slices that
    want a token. `prompt_tokens` int64 [S] are the lengths of the prompts.
    """

    rows: Ints
    starts: Ints
    lengths: Ints
    tokens: Ints
    positions: Ints
    query_starts: Table
    context_lengths: Table
    block_tables: tuple[Table, ...]
    block_ids: tuple[Ints, ...]
    offsets: Ints
    sampled: Ints
    scored: Ints
    prompt_tokens: Ints


class Tables:
    """Everything a worker remembers of its sequences; `group_blocks` are the usable block ids of each group."""

    def __init__(self, layout: KvLayout, group_blocks: Sequence[int], max_rows: int, context_tokens: int, vocab_size: int) -> None:
        self._layout = layout
        self.group_blocks = tuple(group_blocks)
        self._vocab_size = vocab_size
        # Untouched pages of these arrays take no memory, so a row costs what its sequence needs.
        self.tokens: Table = np.zeros((max_rows, context_tokens + 1), np.int32)
        self.blocks = tuple(np.zeros((max_rows, -(-context_tokens // layout.block_tokens)), np.int32) for _ in layout.groups)
        self.known = np.zeros(max_rows, np.int64)
        self.prompts = np.zeros(max_rows, np.int64)
        self.opened: list[OpenSequence | None] = [None] * max_rows

    def apply(self, plan: BatchPlan) -> None:
        """Close, open, append and release, in this order; what the plan demotes is looked at, not done."""
        for row in plan.close:
            self._check_row(row)
            self.opened[row] = None
            self.known[row] = 0
            for table in self.blocks:
                table[row] = 0
        for sequence in plan.open:
            self._open(sequence)
        for row, group, first, blocks in plan.append:
            self._check_row(row, group)
            table = self.blocks[group]
            if first < 0 or first + len(blocks) > table.shape[1]:
                raise PlanError(f"row {row}: no such table entries in group {group}")
            self._check_blocks(row, group, blocks)
            table[row, first : first + len(blocks)] = blocks
        for row, group, before in plan.release:
            self._check_row(row, group)
            sinks = self._layout.groups[group].sink_blocks
            self.blocks[group][row, sinks : max(before, sinks)] = 0
        for row, group, sources, targets in plan.demote:
            self._check_row(row, group)
            near = self._layout.groups[group].source
            if near is None or len(sources) != len(targets):
                raise PlanError(f"row {row}: blocks cannot be demoted into group {group}")
            self._check_blocks(row, near, sources)
            self._check_blocks(row, group, targets)

    def batch(self, slices: Sequence[Slice]) -> Batch:
        """The arrays of these slices. Their tokens must be known and their blocks there."""
        table = np.array(slices, np.int64).reshape(-1, 4)
        rows, starts, lengths, wants = (np.ascontiguousarray(column) for column in table.T)
        ends = starts + lengths
        if (rows < 0).any() or (rows >= len(self.known)).any() or (starts < 0).any() or (lengths < 1).any():
            raise PlanError("a slice lies outside the tables")
        if (ends > self.known[rows]).any():
            raise PlanError("a slice reaches beyond the known tokens of its row")
        query_starts = np.zeros(len(rows) + 1, np.int32)
        np.cumsum(lengths, out=query_starts[1:])
        token_rows = np.repeat(rows, lengths)
        positions = np.arange(len(token_rows)) + np.repeat(starts - query_starts[:-1], lengths)
        block_tokens = self._layout.block_tokens
        index, offsets = np.divmod(positions, block_tokens)
        width = -(-int(ends.max()) // block_tokens)
        block_ids = tuple(
            np.zeros(0, np.int64) if group.source is not None else blocks[token_rows, index].astype(np.int64)
            for group, blocks in zip(self._layout.groups, self.blocks, strict=True)
        )
        if any((ids == 0).any() for ids in block_ids):
            raise PlanError("a slice's tokens have no block")
        return Batch(
            rows=rows,
            starts=starts,
            lengths=lengths,
            tokens=self.tokens[token_rows, positions].astype(np.int64),
            positions=positions,
            query_starts=query_starts,
            context_lengths=ends.astype(np.int32),
            block_tables=tuple(blocks[rows, :width] for blocks in self.blocks),
            block_ids=block_ids,
            offsets=offsets,
            sampled=np.flatnonzero(wants & Want.TOKEN),
            scored=np.flatnonzero(wants & Want.PROMPT_LOGPROBS),
            prompt_tokens=self.prompts[rows],
        )

    def record(self, rows: Ints, positions: Ints, tokens: Ints) -> None:
        """Enter sampled tokens; a row that failed (−1) gets token 0, so that a plan already sent ahead can still run."""
        self.tokens[rows, positions] = np.maximum(tokens, 0)
        self.known[rows] = np.maximum(self.known[rows], positions + 1)

    def _open(self, sequence: OpenSequence) -> None:
        row, length = sequence.row, len(sequence.tokens)
        self._check_row(row)
        if self.opened[row] is not None:
            raise PlanError(f"row {row} is taken")
        if not 0 < length < self.tokens.shape[1] or not 0 < sequence.prompt_tokens <= length:
            raise PlanError(f"row {row}: {length} tokens, {sequence.prompt_tokens} of them the prompt, do not fit the tables")
        tokens = np.array(sequence.tokens, np.int64)
        if tokens.min() < 0 or tokens.max() >= self._vocab_size:
            raise PlanError(f"row {row}: a token is not in the vocabulary")
        self.opened[row] = sequence
        self.tokens[row, :length] = tokens
        self.known[row] = length
        self.prompts[row] = sequence.prompt_tokens
        for table in self.blocks:
            table[row] = 0

    def _check_blocks(self, row: int, group: int, blocks: Sequence[int]) -> None:
        if not all(0 < block <= self.group_blocks[group] for block in blocks):
            raise PlanError(f"row {row}: no such blocks in group {group}")

    def _check_row(self, row: int, group: int = 0) -> None:
        if not 0 <= row < len(self.known) or not 0 <= group < len(self.blocks):
            raise PlanError(f"there is no row {row} with group {group}")
