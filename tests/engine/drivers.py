"""Plans for a few sequences of a backend under test, whatever computes: blocks handed out in a scattered order, and poisoned when asked."""

from __future__ import annotations

import numpy as np

from service.engine.batch import Tables
from service.types.kv_layout import KvLayout
from service.types.plan import BatchPlan, BlockAppend, OpenSequence, Want
from service.types.request import Sampling, Stop

TOKEN, SCORES, NOTHING = int(Want.TOKEN), int(Want.PROMPT_LOGPROBS), int(Want.NOTHING)
GREEDY = Sampling(temperature=0)
BLOCK = 64


def prompt(length: int, seed: int = 0) -> tuple[int, ...]:
    return tuple(np.random.default_rng(seed).integers(0, 331, length).tolist())


def opened(row: int, tokens, sampling=GREEDY, prompt_tokens=None, prompt_logprobs=None) -> OpenSequence:
    return OpenSequence(row, tuple(tokens), prompt_tokens or len(tokens), sampling, Stop(max_tokens=64), prompt_logprobs)


class Driver:
    """One backend over `blocks` blocks of each group. `spoil(layer, blocks)` fills blocks of a layer with NaN."""

    def __init__(self, backend, layout: KvLayout, tables: Tables, spoil, blocks: int = 40) -> None:
        self.backend, self.layout, self.tables, self._spoil = backend, layout, tables, spoil
        self.groups = groups = len(layout.groups)
        self.free = [list(np.random.default_rng(group).permutation(np.arange(1, blocks + 1))) for group in range(groups)]
        self.held: dict[tuple[int, int], list[int]] = {}
        self.step = 0

    def run(self, slices, opening=(), closing=(), release=()):
        appends = []
        for row, start, length, _ in slices:
            for group in range(self.groups):
                held = self.held.setdefault((row, group), [])
                needed = -(-(start + length) // BLOCK) - len(held)
                if needed > 0:
                    blocks = [int(self.free[group].pop()) for _ in range(needed)]
                    appends.append(BlockAppend(row, group, len(held), tuple(blocks)))
                    held += blocks
        self.step += 1
        plan = BatchPlan(self.step, tuple(slices), tuple(closing), tuple(opening), tuple(appends), tuple(release))
        return self.backend.execute(plan)

    def poison(self, row: int, group: int, before: int) -> None:
        """NaN into blocks that the row released."""
        for layer in self.layout.groups[group].layers:
            self._spoil(layer, self.held[row, group][:before])
