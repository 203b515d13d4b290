"""From logits to a choice: filters, inverse-CDF draws, log-probs. numpy alone, every function over rows at once.

Rows never influence each other: a row's result has the same bits alone and in any batch, because candidate sets are defined exactly (ties
go to the smaller id) and sums run in an order that does not depend on the batch. It does not know requests, rows of tables or tensors.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from service.types.request import TokenLogprob

Floats = NDArray[np.floating[Any]]
Ints = NDArray[np.int64]

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)
_CANDIDATES = 128
_SPAN = 256


def _mix(state: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The output function of SplitMix64 (Steele, Lea, Flood 2014) after one step of its counter."""
    state = state + _GOLDEN
    state = (state ^ (state >> np.uint64(30))) * _MIX_1
    state = (state ^ (state >> np.uint64(27))) * _MIX_2
    return state ^ (state >> np.uint64(31))


def uniform(seeds: NDArray[np.uint64], choices: NDArray[np.uint64], positions: Ints) -> Floats:
    """One number in [0, 1) with 53 bits for each (seed, choice, position), all of shape [R]; the same for ever."""
    state = _mix(_mix(_mix(seeds) ^ choices) ^ positions.astype(np.uint64))
    return (state >> np.uint64(11)).astype(np.float64) * 2.0**-53


class Filters(NamedTuple):
    """What limits each row's candidates, all of shape [R]: `top_k` 0, `top_p` 1 and `min_p` 0 do not."""

    top_k: Ints
    top_p: Floats
    min_p: Floats

    def take(self, rows: Ints) -> Filters:
        """The filters of some of the rows."""
        return Filters(self.top_k[rows], self.top_p[rows], self.min_p[rows])


def draw(scores: Floats, filters: Filters, numbers: Floats) -> Ints:
    """Sample a token a row: the first id in vocabulary order whose cumulative weight exceeds number · total.

    `scores` [R, V] float32 are logits over temperature minus their row's maximum and are overwritten; `numbers` [R] in [0, 1).
    top_k, then top_p on what is left, then min_p against the most likely token.
    """
    vocab_size = scores.shape[1]
    filtered = ((filters.top_k > 0) & (filters.top_k < vocab_size)) | (filters.top_p < 1.0)
    if filtered.all():
        return _draw_filtered(scores, filters, numbers)
    if not filtered.any():
        return _draw_all(scores, filters.min_p, numbers)
    tokens = np.empty(len(scores), np.int64)
    some, rest = np.flatnonzero(filtered), np.flatnonzero(~filtered)
    tokens[some] = _draw_filtered(scores[some], filters.take(some), numbers[some])
    tokens[rest] = _draw_all(scores[rest], filters.min_p[rest], numbers[rest])
    return tokens


def _draw_all(scores: Floats, min_p: Floats, numbers: Floats) -> Ints:
    """Two levels, so that no cumulative sum runs over the whole vocabulary: find the span of 256 ids, then the id in it."""
    rows, vocab_size = scores.shape
    spans = -(-vocab_size // _SPAN)
    weights = np.zeros((rows, spans * _SPAN), np.float32)
    np.exp(scores, out=weights[:, :vocab_size])
    if (min_p > 0).any():
        weights[weights < min_p[:, None].astype(np.float32)] = 0.0
    by_span = weights.reshape(rows, spans, _SPAN)
    ends = np.cumsum(by_span.sum(axis=2), axis=1, dtype=np.float64)
    targets = numbers * ends[:, -1]
    at = np.arange(rows)
    span: Ints = (ends > targets[:, None]).argmax(axis=1)
    before = np.where(span > 0, ends[at, span - 1], 0.0)
    share = (targets - before) / (ends[at, span] - before)
    chosen: Ints = span * _SPAN + _invert(by_span[at, span], share)
    return chosen


def _invert(weights: Floats, numbers: Floats) -> Ints:
    ends = np.cumsum(weights, axis=1, dtype=np.float64)
    targets = np.minimum(numbers, 1.0 - 2.0**-53) * ends[:, -1]
    chosen: Ints = (ends > targets[:, None]).argmax(axis=1)
    return chosen


def _draw_filtered(scores: Floats, filters: Filters, numbers: Floats) -> Ints:
    """Try among the best few ids; rows whose kept set may reach beyond them, or whose border is a tie, try again among more."""
    vocab_size = scores.shape[1]
    wanted = filters.top_k[filters.top_k <= 8 * _CANDIDATES]
    width = min(vocab_size, max(_CANDIDATES, int(wanted.max(initial=0))))
    tokens, sure = _draw_among(scores, filters, numbers, width)
    rest = np.flatnonzero(~sure)
    while len(rest):
        width = min(vocab_size, 16 * width)
        tokens[rest], sure = _draw_among(scores[rest], filters.take(rest), numbers[rest], width)
        rest = rest[~sure]
    return tokens


def _draw_among(scores: Floats, filters: Filters, numbers: Floats, width: int) -> tuple[Ints, NDArray[np.bool_]]:
    """Draw among the `width` best ids; the mask says for which rows that is certainly the same as among all."""
    ids, values, sure = _best(scores, width)
    order = np.argsort(-values, axis=1, kind="stable")
    weights = np.exp(np.take_along_axis(values, order, axis=1).astype(np.float64))
    vocab_size = scores.shape[1]
    limits = np.where(filters.top_k > 0, np.minimum(filters.top_k, vocab_size), vocab_size)
    weights[np.arange(width) >= limits[:, None]] = 0.0
    ends = np.cumsum(weights, axis=1)
    total = ends[:, -1].copy()
    open_rows = np.flatnonzero(limits == vocab_size)
    if len(open_rows):
        total[open_rows] = np.exp(scores[open_rows]).sum(axis=1, dtype=np.float64)
    nucleus = np.where(filters.top_p < 1.0, filters.top_p, np.inf) * total
    beyond = ends - weights >= nucleus[:, None]
    beyond[:, 0] = False
    weights[beyond | (weights < filters.min_p[:, None])] = 0.0
    # What a top_k beyond the width keeps, and so its nucleus, is not known yet.
    sure &= (limits <= width) | ((limits == vocab_size) & (ends[:, -1] >= nucleus))
    by_id = np.empty_like(weights)
    np.put_along_axis(by_id, order, weights, axis=1)
    tokens: Ints = ids[np.arange(len(ids)), _invert(by_id, numbers)]
    return tokens, sure


def _best(scores: Floats, width: int) -> tuple[Ints, Floats, NDArray[np.bool_]]:
    """Ids [R, width] of each row's best scores in ascending id order, their scores, and whether the set is unambiguous."""
    rows, vocab_size = scores.shape
    if width >= vocab_size:
        return np.broadcast_to(np.arange(vocab_size), scores.shape), scores, np.ones(rows, np.bool_)
    ids = np.argpartition(scores, vocab_size - width, axis=1)[:, vocab_size - width :]
    ids.sort(axis=1)
    values = np.take_along_axis(scores, ids, axis=1)
    sure = (scores >= values.min(axis=1, keepdims=True)).sum(axis=1) == width
    return ids, values, sure


def log_probs(logits: Floats, targets: Ints, counts: Ints) -> list[TokenLogprob]:
    """The log-prob of targets [R] under softmax of logits [R, V], with the `counts` [R] best alternatives of each row, best first."""
    peaks = logits.max(axis=1, keepdims=True)
    shifted = logits - peaks
    sums = np.log(np.exp(shifted).sum(axis=1, dtype=np.float64))
    own = (shifted[np.arange(len(targets)), targets] - sums).tolist()
    width = min(int(counts.max(initial=0)), logits.shape[1])
    if width == 0:
        return [TokenLogprob(token, value) for token, value in zip(targets.tolist(), own, strict=True)]
    ids, values = _ranked(shifted, width)
    values -= sums[:, None]
    rows = zip(targets.tolist(), own, ids.tolist(), values.tolist(), counts.tolist(), strict=True)
    return [TokenLogprob(token, value, _alternatives(best, probs, count)) for token, value, best, probs, count in rows]


def _alternatives(ids: list[int], values: list[float], count: int) -> tuple[tuple[int, float], ...]:
    return tuple(pair for pair in zip(ids[:count], values[:count], strict=True) if pair[1] > -np.inf)


def _ranked(scores: Floats, width: int) -> tuple[Ints, Floats]:
    """Ids and scores [R, width] of each row's best, best first, ties by id."""
    ids, values, sure = _best(scores, width)
    order = np.argsort(-values, axis=1, kind="stable")[:, :width]
    ids, values = np.take_along_axis(ids, order, axis=1), np.take_along_axis(values, order, axis=1).astype(np.float64)
    if not sure.all():
        rest = np.flatnonzero(~sure)
        ids[rest], values[rest] = _ranked_whole(scores[rest], width)
    return ids, values


def _ranked_whole(scores: Floats, width: int) -> tuple[Ints, Floats]:
    order = np.argsort(-scores, axis=1, kind="stable")[:, :width]
    return order, np.take_along_axis(scores, order, axis=1).astype(np.float64)
