"""What choosing far blocks takes in memory: the choices that rows keep from step to step, and those and the scores of one step.

Pure arithmetic, no torch; it does not allocate. Invariant: `kept_bytes` is what `FarChoices` holds, and `step_bytes` the most that a step's
`StepChoices` and the kernel that chooses take at once.
"""

from __future__ import annotations

from typing import NamedTuple

from service.types.kv_layout import FAR_POSITION, FIRST_STAGE, SECOND_STAGE, FarSpec, KvGroup, KvLayout

# An index of a block, and a score.
_INDEX_BYTES = 4


class StepSize(NamedTuple):
    """The most that one step computes: tokens, in slices of at most `rows` sequences of `context_tokens`."""

    tokens: int
    rows: int
    context_tokens: int

    def anchors(self, refresh: int) -> int:
        """The most anchors that its tokens have: a slice of L tokens begins with one and meets at most ⌈(L − 1) / refresh⌉ others."""
        slices = min(self.rows, self.tokens)
        return min(self.tokens, slices + (self.tokens + slices * (refresh - 2)) // refresh)


def _far_groups(layout: KvLayout) -> list[tuple[KvGroup, FarSpec]]:
    return [(group, group.far) for group in layout.groups if group.source is not None and group.far is not None]


def kept_bytes(layout: KvLayout, rows: int) -> int:
    """Bytes of the last choices of `rows` rows, for every layer that has a far group."""
    return sum(len(group.layers) * rows * group.kv_heads * spec.budget(FAR_POSITION) * _INDEX_BYTES for group, spec in _far_groups(layout))


def step_bytes(layout: KvLayout, step: StepSize, on_gpu: bool) -> int:
    """Bytes that choosing takes in one step at most: the choices of all layers until the step has succeeded, a layer's once more while
    earlier ones are joined to them, and on a GPU a score for each candidate, the indices of the first stage, and indices and scores of the
    second."""
    total, largest = 0, 0
    for group, spec in _far_groups(layout):
        candidates = max(layout.entries(group, max(step.context_tokens - 1, 0)) - spec.sink_blocks, 0)
        budget = spec.budget(max(step.context_tokens - 1, 0))
        most = max(candidates, budget) if spec.dense_prompts else budget
        heads = step.anchors(spec.refresh) * group.kv_heads
        total += len(group.layers) * heads * most * _INDEX_BYTES
        blocks, kept, compared = -(-step.context_tokens // layout.block_tokens), _power_of_two(FIRST_STAGE * most), SECOND_STAGE * most
        scored = heads * (blocks + kept + 2 * compared) * _INDEX_BYTES
        largest = max(largest, heads * most * _INDEX_BYTES + (scored if on_gpu and most else 0))
    return total + largest


def _power_of_two(number: int) -> int:
    """The smallest power of two, from 2 on, that is at least `number`."""
    return 1 << max(number - 1, 1).bit_length()
