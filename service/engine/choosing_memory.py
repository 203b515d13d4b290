"""What choosing far blocks takes in memory: the choices that rows keep from step to step, and those and the scores of one step.

Pure arithmetic, no torch; it does not allocate. Invariant: `kept_bytes` is what `FarChoices` holds, and `step_bytes` the most that a step's
`StepChoices` and the kernel that chooses take at once.
"""

from __future__ import annotations

from typing import NamedTuple

from service.types.kv_layout import FAR_POSITION, FIRST_STAGE, SECOND_STAGE, FarSpec, KvGroup, KvLayout
from service.types.model_spec import ModelSpec

# An index of a block, a score, and the bits of a tile's tokens.
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

    def tiles(self, tokens: int) -> int:
        """The most tiles of `tokens` aligned positions that its slices touch."""
        slices = min(self.rows, self.tokens)
        return min(self.tokens, (self.tokens - slices) // tokens + 2 * slices)


def _far_groups(layout: KvLayout) -> list[tuple[KvGroup, FarSpec]]:
    return [(group, group.far) for group in layout.groups if group.source is not None and group.far is not None]


def kept_bytes(layout: KvLayout, rows: int) -> int:
    """Bytes of the last choices of `rows` rows, for every layer that has a far group."""
    return sum(len(group.layers) * rows * group.kv_heads * spec.budget(FAR_POSITION) * _INDEX_BYTES for group, spec in _far_groups(layout))


def tile_tokens(spec: ModelSpec, element_bytes: int) -> int:
    """The fewest tokens that a GPU's kernels have in a tile which its slice fills."""
    queries = max(layer.attention.heads // layer.attention.kv_heads for layer in spec.layers)
    return max((16 if element_bytes < 4 else 8) // _power_of_two(queries), 1)


def step_bytes(layout: KvLayout, step: StepSize, tokens_a_tile: int) -> int:
    """Bytes that choosing takes in one step at most: the choices of all layers until the step has succeeded, a layer's once more while
    earlier ones are joined to them. On a GPU, where tiles have `tokens_a_tile` (elsewhere 0), there are besides a score for each candidate,
    the indices of the first stage, indices and scores of the second, and who of a tile reads which block: marks by block and a list, while
    keys are compared, and again while rows attend."""
    total, largest = 0, 0
    for group, spec in _far_groups(layout):
        candidates = max(layout.entries(group, max(step.context_tokens - 1, 0)) - spec.sink_blocks, 0)
        budget = spec.budget(max(step.context_tokens - 1, 0))
        most = max(candidates, budget) if spec.dense_prompts else budget
        heads = step.anchors(spec.refresh) * group.kv_heads
        total += len(group.layers) * heads * most * _INDEX_BYTES
        blocks = -(-step.context_tokens // layout.block_tokens)
        # Who reads all candidates does not choose: what is scored and joined is of the budget.
        kept, compared = _power_of_two(FIRST_STAGE * max(budget, 1)), SECOND_STAGE * budget
        scored = marked = 0
        if tokens_a_tile and most:
            tiles = step.tiles(tokens_a_tile) * group.kv_heads
            scored = heads * (blocks + kept + 2 * compared) + tiles * 3 * blocks
            marked = tiles * 3 * blocks
        largest = max(largest, (heads * budget + scored) * _INDEX_BYTES, marked * _INDEX_BYTES)
    return total + largest


def _power_of_two(number: int) -> int:
    """The smallest power of two that is at least `number`."""
    return 1 << max(number - 1, 0).bit_length()
