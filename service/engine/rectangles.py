"""How a step's slices become rectangles, which is what an exported graph computes: rows of one length, bounded in size. numpy alone.

It does not know graphs or tensors. Invariants: the parts of a slice come in order; a rectangle's temporaries stay under their bounds
however long the contexts are; every slice is covered exactly once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from service.engine.batch import Batch
from service.types.kv_layout import KvLayout
from service.types.model_spec import ModelSpec

# Tokens of a rectangle: the progress that a worker reports comes after each.
MOST_TOKENS = 256
# Rows whose logits exist at once when prompts are scored.
SCORED_TOKENS = 64
# Attention scores of one layer, and keys and values gathered for it, in float32 values.
MOST_SCORES = 16 << 20


class Part(NamedTuple):
    """Positions [start, start + length) of slice `number` of the batch; `last` says that the slice ends here."""

    number: int
    start: int
    length: int
    last: bool

    @property
    def end(self) -> int:
        """The position behind the part."""
        return self.start + self.length


class Costs(NamedTuple):
    """What bounds a rectangle: query heads of the widest layer, values gathered for a token in a layer, bytes of all layers' keys and
    values for a token, and the bytes of the weights that each rectangle reads."""

    heads: int
    token_values: int
    token_bytes: int
    weight_bytes: int

    @classmethod
    def of(cls, spec: ModelSpec, weight_bytes: int) -> Costs:
        """The costs of a model whose products read `weight_bytes`."""
        groups = spec.kv_layout().groups
        return cls(
            heads=max(layer.attention.heads for layer in spec.layers),
            token_values=max(group.kv_heads * (group.key_dim + group.value_dim) for group in groups),
            token_bytes=sum(group.token_bytes(4) for group in groups),
            weight_bytes=weight_bytes,
        )


def rectangles(batch: Batch, layout: KvLayout, costs: Costs) -> Iterator[list[Part]]:
    """The parts of all slices, cut and grouped: first the first part of every slice, then the second ones, and so on."""
    scored = set(batch.scored.tolist())
    waiting = list(zip(range(len(batch.rows)), batch.starts.tolist(), (batch.starts + batch.lengths).tolist(), strict=True))
    while waiting:
        by_length: dict[int, list[Part]] = {}
        left = []
        for index, start, end in waiting:
            length = _part_tokens(start, end, costs, index in scored)
            by_length.setdefault(length, []).append(Part(index, start, length, start + length == end))
            if start + length < end:
                left.append((index, start + length, end))
        for parts in by_length.values():
            yield from _grouped(parts, layout, costs)
        waiting = left


def _part_tokens(start: int, end: int, costs: Costs, scored: bool) -> int:
    """As many tokens as fit a rectangle of their own."""
    most = min(end - start, SCORED_TOKENS if scored else MOST_TOKENS)
    while most > 1 and most * (start + most) * costs.heads > MOST_SCORES:
        most //= 2
    return most


def _grouped(parts: Sequence[Part], layout: KvLayout, costs: Costs) -> Iterator[list[Part]]:
    """Parts of one length side by side, longest context first: each is padded to the first one's.

    A new rectangle begins where the bounds are met, or where the padding would be more to read than the weights once more.
    """
    length = parts[0].length
    group: list[Part] = []
    padding = 0.0
    for part in sorted(parts, key=lambda part: -part.end):
        if group:
            reach = group[0].end
            rows = len(group) + 1
            padding += (_seen(layout, reach) - _seen(layout, part.end)) * costs.token_bytes
            full = rows * length > MOST_TOKENS or rows * reach * max(length * costs.heads, costs.token_values) > MOST_SCORES
            if full or padding > costs.weight_bytes:
                yield group
                group, padding = [], 0.0
        group.append(part)
    yield group


def _seen(layout: KvLayout, context: int) -> float:
    """Tokens that a query at the end of a context reads, weighted by the layers that read them."""
    layers = sum(len(group.layers) for group in layout.groups)
    return sum(len(group.layers) * min(context, group.window or context) for group in layout.groups) / layers
