"""Sampling for the rows of a worker: each row's parameters as arrays, penalties and bias, one draw a row. numpy alone.

It knows nothing of tensors, blocks or scheduling, so that a worker without torch can use it. Invariant: the token of a row is a function
of its logits, its own tokens and (seed, choice, position); the batch it runs in changes nothing.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from service.engine.distribution import Filters, Floats, Ints, draw, log_probs, uniform
from service.types.request import Sampling, Stop, TokenLogprob

# Below this temperature the division would overflow float32; the distribution is greedy to the last digit long before.
GREEDY_BELOW = 1e-5
# Rows are drawn a few at a time, so that what a draw makes stays in the cache (256 KiB) and needs no fresh memory.
_CACHED_LOGITS = 1 << 16
_MASK = (1 << 64) - 1


class Samples(NamedTuple):
    """What was sampled: `tokens` [R], −1 where no logit was finite; `logprobs` has an entry for each row that asked."""

    tokens: Ints
    logprobs: dict[int, TokenLogprob]


class Sampler:
    """The sampling parameters of `max_rows` rows over one vocabulary."""

    def __init__(self, max_rows: int, vocab_size: int) -> None:
        self._vocab_size = vocab_size
        self._temperature = np.ones(max_rows, np.float32)
        self._top_k = np.zeros(max_rows, np.int64)
        self._top_p = np.ones(max_rows)
        self._min_p = np.zeros(max_rows)
        self._seed = np.zeros(max_rows, np.uint64)
        self._choice = np.zeros(max_rows, np.uint64)
        self._logprobs = np.full(max_rows, -1, np.int64)
        self._penalised = np.zeros(max_rows, np.bool_)
        self._stops_from = np.zeros(max_rows, np.int64)
        self._sampling: list[Sampling] = [Sampling()] * max_rows
        self._prompt = np.zeros(max_rows, np.int64)
        self._bias: dict[int, tuple[Ints, Floats]] = {}
        self._stop_ids: dict[int, Ints] = {}

    def open(self, row: int, sampling: Sampling, stop: Stop, prompt_tokens: int) -> None:
        """Give a row its parameters. Ids of `logit_bias` and of stop tokens beyond the vocabulary do nothing."""
        self._sampling[row] = sampling
        self._temperature[row] = sampling.temperature
        self._top_k[row] = max(sampling.top_k, 0)
        self._top_p[row] = sampling.top_p
        self._min_p[row] = sampling.min_p
        self._seed[row] = sampling.seed & _MASK
        self._choice[row] = sampling.choice & _MASK
        self._logprobs[row] = -1 if sampling.logprobs is None else sampling.logprobs
        self._prompt[row] = prompt_tokens
        self._bias.pop(row, None)
        bias = [(token, value) for token, value in sampling.logit_bias if 0 <= token < self._vocab_size]
        if bias:
            self._bias[row] = np.array([token for token, _ in bias]), np.array([value for _, value in bias], np.float32)
        neutral = sampling.repetition_penalty == 1.0 and sampling.presence_penalty == 0.0 and sampling.frequency_penalty == 0.0
        self._penalised[row] = bool(bias) or not neutral
        stops = [token for token in stop.effective_ids if 0 <= token < self._vocab_size]
        self._stop_ids[row] = np.array(stops, np.int64)
        self._stops_from[row] = prompt_tokens + stop.min_tokens if stops else 0

    def is_plain(self, rows: Ints, positions: Ints) -> NDArray[np.bool_]:
        """Whether the token at positions [R] of rows [R] needs its logits, filters and one number only: no penalty, bias, forbidden stop or
        log-prob."""
        return ~self._penalised[rows] & (self._logprobs[rows] < 0) & (positions >= self._stops_from[rows])

    def draw_parameters(self, rows: Ints, positions: Ints) -> tuple[NDArray[Any], ...]:
        """(temperature float32, top_k int64, top_p float64, min_p float32, number in [0, 1) float64), each [R]."""
        numbers = uniform(self._seed[rows], self._choice[rows], positions)
        return self._temperature[rows], self._top_k[rows], self._top_p[rows], self._min_p[rows].astype(np.float32), numbers

    def sample(self, logits: Floats, rows: Ints, positions: Ints, tokens: NDArray[np.int32]) -> Samples:
        """Sample the token at positions [R] of table rows [R] from logits [R, V] float32, which are overwritten.

        `tokens` [max_rows, …] is the worker's table; what stands before a row's position counts for its penalties.
        """
        for index in np.flatnonzero(self._penalised[rows]).tolist():
            row = int(rows[index])
            self._penalise(logits[index], row, tokens[row, : positions[index]])
        for index in np.flatnonzero(positions < self._stops_from[rows]).tolist():
            logits[index, self._stop_ids[int(rows[index])]] = -np.inf
        everyone = np.arange(len(rows))
        chosen: Ints = logits.argmax(axis=1)
        peaks = logits[everyone, chosen]
        sound = np.isfinite(peaks)
        logprob_rows = np.flatnonzero((self._logprobs[rows] >= 0) & sound)
        kept = logits[logprob_rows] if len(logprob_rows) else None
        random = np.flatnonzero((self._temperature[rows] >= GREEDY_BELOW) & sound)
        step = max(1, _CACHED_LOGITS // self._vocab_size)
        for at in range(0, len(random), step):
            some = random[at : at + step]
            chosen[some] = self._draw(logits[some] - peaks[some, None], rows[some], positions[some])
        chosen[~sound] = -1
        logprobs: dict[int, TokenLogprob] = {}
        if kept is not None:
            entries = log_probs(kept, chosen[logprob_rows], self._logprobs[rows[logprob_rows]])
            logprobs = dict(zip(logprob_rows.tolist(), entries, strict=True))
        return Samples(chosen, logprobs)

    def _draw(self, scores: Floats, rows: Ints, positions: Ints) -> Ints:
        """Draw for scores [R, V], which are logits minus their row's maximum."""
        temperature = self._temperature[rows]
        if (temperature != 1.0).any():
            with np.errstate(over="ignore"):
                scores /= temperature[:, None]
        filters = Filters(self._top_k[rows], self._top_p[rows], self._min_p[rows])
        return draw(scores, filters, uniform(self._seed[rows], self._choice[rows], positions))

    def _penalise(self, logits: Floats, row: int, history: NDArray[np.int32]) -> None:
        """Repetition (Keskar et al. 2019) over prompt and generated tokens, presence and frequency over generated ones, then bias."""
        sampling = self._sampling[row]
        if sampling.repetition_penalty != 1.0:
            seen = np.flatnonzero(np.bincount(history, minlength=self._vocab_size))
            values = logits[seen]
            logits[seen] = np.where(values > 0, values / sampling.repetition_penalty, values * sampling.repetition_penalty)
        if sampling.presence_penalty != 0.0 or sampling.frequency_penalty != 0.0:
            counts = np.bincount(history[int(self._prompt[row]) :], minlength=self._vocab_size)
            seen = np.flatnonzero(counts)
            logits[seen] -= (sampling.presence_penalty + sampling.frequency_penalty * counts[seen]).astype(np.float32)
        if row in self._bias:
            ids, values = self._bias[row]
            np.add.at(logits, ids, values)
