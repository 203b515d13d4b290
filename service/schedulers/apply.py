"""Applying the result of a step: sequences move on, proven blocks are named, tokens are published, endings are called.

It does not know plans to come, the worker or the queue. Invariants: a result that belongs to an earlier epoch of its sequence (it ended,
was preempted or its worker died since) is dropped unseen; tokens reach a stream in order, once.
"""

from __future__ import annotations

from typing import Protocol

from service.schedulers.accounting import Accounting
from service.schedulers.planner import Entry, Planner, Step
from service.schedulers.sequence import InvariantBroken, Sequence
from service.types.errors import NumericalFailure, ServiceError, SlowReader
from service.types.plan import StepResult, Want
from service.types.request import FinishReason, TokenLogprob

_TOKEN, _SCORES = int(Want.TOKEN), int(Want.PROMPT_LOGPROBS)


class End(Protocol):
    """Ends a sequence, exactly once."""

    def __call__(
        self, sequence: Sequence, reason: FinishReason, error: ServiceError | None = None, matched: str | int | None = None
    ) -> None:
        """Take the sequence out, publish its ending and count it."""


class Application:
    """Applies results to the sequences of one planner."""

    def __init__(self, planner: Planner, accounting: Accounting, end: End) -> None:
        self._planner = planner
        self._accounting = accounting
        self._end = end
        self._last_s = 0.0

    def apply(self, step: Step, result: StepResult, now: float) -> None:
        """Apply one result. Raises InvariantBroken when it does not answer the step."""
        if result.step != step.plan.step:
            raise InvariantBroken(f"step {step.plan.step} was answered by step {result.step}")
        if len(result.tokens) != step.samples:
            raise InvariantBroken(f"step {result.step}: {len(result.tokens)} tokens for {step.samples} rows")
        published = self._apply_decodes(step, result, now)
        if step.decodes < len(step.entries):
            published += self._apply_prefills(step, result, now)
        self._accounting.generated(published, self._last_s, now)
        self._last_s = now

    def _apply_decodes(self, step: Step, result: StepResult, now: float) -> int:
        """The first `step.decodes` entries and tokens belong together; gives the number of tokens published."""
        published, take, last_s = 0, self._take, self._last_s
        for (sequence, epoch, end, piece), (row, token, logprob, failure) in zip(step.entries[: step.decodes], result.tokens, strict=False):
            if row != piece[0]:
                raise InvariantBroken(f"step {result.step}: row {row} was answered for row {piece[0]}")
            if sequence.epoch != epoch:
                continue
            sequence.computed = end
            if failure is not None:
                self._fail(sequence)
                continue
            published += 1
            if sequence.last_token_s == last_s:
                sequence.latencies.lockstep += 1
            else:
                sequence.latencies.gap.observe(now - sequence.last_token_s)
            sequence.last_token_s = now
            take(sequence, token, logprob)
        return published

    def _apply_prefills(self, step: Step, result: StepResult, now: float) -> int:
        published, sampled = 0, iter(result.tokens[step.decodes :])
        scores = {scored.row: scored for scored in result.prompt_logprobs}
        for entry in step.entries[step.decodes :]:
            sequence, row = entry.sequence, entry.slice.row
            token = next(sampled) if entry.slice.want & _TOKEN else None
            if token is not None and token.row != row:
                raise InvariantBroken(f"step {result.step}: row {token.row} was answered for row {row}")
            if sequence.epoch != entry.epoch:
                continue
            sequence.computed = entry.end
            scored = scores.get(row)
            if scored is not None and scored.failure is not None:
                self._fail(sequence)
                continue
            if not sequence.scored:
                self._score(sequence, entry, () if scored is None else scored.logprobs)
            if token is not None and token.failure is not None:
                self._fail(sequence)
            elif token is not None:
                published += 1
                self._first_since_opened(sequence, now)
                self._take(sequence, token.token, token.logprob)
            elif not sequence.max_tokens and entry.end >= sequence.prompt_tokens:
                self._accounting.prompt_read(sequence, now)
                self._end(sequence, FinishReason.LENGTH)
        return published

    def _take(self, sequence: Sequence, token: int, logprob: TokenLogprob | None) -> None:
        """Append one good token, publish it, and end the sequence where it ends."""
        sequence.in_flight -= 1
        tokens = sequence.tokens
        tokens.append(token)
        if sequence.computed >= sequence.next_proof:
            self._planner.cache.prove(sequence)
        length = len(tokens)
        stops_count = length > sequence.min_length
        stream = sequence.stream
        if token in sequence.end_ids and stops_count:
            stream.push_silent(token, logprob)
            self._end(sequence, FinishReason.STOP, matched=token)
            return
        matched = stream.push(token, logprob, stops_count)
        if matched is not None:
            self._end(sequence, FinishReason.STOP, matched=matched)
        elif length >= sequence.max_length:
            self._end(sequence, FinishReason.LENGTH)
        elif stream.slow:
            self._end(sequence, FinishReason.ERROR, SlowReader("The stream was read too slowly and has been closed."))
        elif sequence.suspect_until and sequence.computed >= sequence.suspect_until:
            self._planner.clear_suspect(sequence)

    def _fail(self, sequence: Sequence) -> None:
        self._planner.cache.disown(sequence)
        self._end(sequence, FinishReason.ERROR, NumericalFailure("The model gave no finite result for this request."))

    def _first_since_opened(self, sequence: Sequence, now: float) -> None:
        """The first token since the sequence entered its row: of its life, or after it lost its place."""
        if not sequence.decoding:
            sequence.decoding = True
            self._planner.stop_leading(sequence)
        if sequence.last_token_s:
            sequence.latencies.gap.observe(now - sequence.last_token_s)
        else:
            self._accounting.prompt_read(sequence, now)
        sequence.last_token_s = now

    def _score(self, sequence: Sequence, entry: Entry, scores: tuple[TokenLogprob, ...]) -> None:
        if entry.slice.want & _SCORES:
            sequence.prompt_scores.extend(scores)
        if entry.end < sequence.prompt_tokens - 1:
            return
        if len(sequence.prompt_scores) != sequence.prompt_tokens - 1:
            raise InvariantBroken(f"{len(sequence.prompt_scores)} log-probs for a prompt of {sequence.prompt_tokens} tokens")
        sequence.scored = True
        sequence.stream.push_prompt(tuple(sequence.prompt_scores))
