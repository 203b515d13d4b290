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
from service.types.plan import SampledToken, StepResult, Want
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
        self._block_tokens = planner.space.block_tokens

    def apply(self, step: Step, result: StepResult, now: float) -> None:
        """Apply one result. Raises InvariantBroken when it does not answer the step."""
        if result.step != step.plan.step:
            raise InvariantBroken(f"step {step.plan.step} was answered by step {result.step}")
        scores = {scored.row: scored.logprobs for scored in result.prompt_logprobs}
        gaps: dict[tuple[str, float], int] = {}
        published, sampled = 0, iter(result.tokens)
        for entry in step.entries:
            sequence, want = entry.sequence, entry.slice.want
            token = next(sampled, None) if want & _TOKEN else None
            if want & _TOKEN and (token is None or token.row != entry.slice.row):
                raise InvariantBroken(f"step {result.step}: no token for row {entry.slice.row}")
            if sequence.epoch != entry.epoch:
                continue
            sequence.computed = entry.end
            if not sequence.scored:
                self._score(sequence, entry, scores.get(entry.slice.row, ()))
            if token is None:
                self._computed_without_token(sequence, now)
            elif token.failure is not None:
                self._fail(sequence)
            else:
                if sequence.last_token_s:
                    gap = (sequence.request.route, sequence.last_token_s)
                    gaps[gap] = gaps.get(gap, 0) + 1
                else:
                    self._accounting.prompt_read(sequence, now)
                sequence.last_token_s = now
                published += 1
                self._publish(sequence, token)
        self._accounting.generated(published, gaps, now)

    def _publish(self, sequence: Sequence, sampled: SampledToken) -> None:
        token = sampled.token
        sequence.in_flight -= 1
        sequence.tokens.append(token)
        if sequence.computed - sequence.proven_blocks * self._block_tokens >= self._block_tokens:
            self._planner.cache.prove(sequence)
        if sequence.leads is not None:
            self._planner.stop_leading(sequence)
        stream, generated = sequence.stream, sequence.generated
        stops_count = generated > sequence.min_tokens
        if token in sequence.end_ids and stops_count:
            stream.push_silent(token, sampled.logprob)
            self._end(sequence, FinishReason.STOP, matched=token)
            return
        matched = stream.push(token, sampled.logprob, stops_count)
        if matched is not None:
            self._end(sequence, FinishReason.STOP, matched=matched)
        elif generated >= sequence.max_tokens:
            self._end(sequence, FinishReason.LENGTH)
        elif stream.slow:
            self._end(sequence, FinishReason.ERROR, SlowReader("The stream was read too slowly and has been closed."))
        elif sequence.suspect_until and sequence.computed >= sequence.suspect_until:
            self._planner.clear_suspect(sequence)

    def _score(self, sequence: Sequence, entry: Entry, scores: tuple[TokenLogprob, ...]) -> None:
        if entry.slice.want & _SCORES:
            sequence.prompt_scores.extend(scores)
        if entry.end < sequence.prompt_tokens - 1:
            return
        if len(sequence.prompt_scores) != sequence.prompt_tokens - 1:
            raise InvariantBroken(f"{len(sequence.prompt_scores)} log-probs for a prompt of {sequence.prompt_tokens} tokens")
        sequence.scored = True
        sequence.stream.push_prompt(tuple(sequence.prompt_scores))

    def _computed_without_token(self, sequence: Sequence, now: float) -> None:
        if not sequence.max_tokens and sequence.computed >= sequence.prompt_tokens:
            self._accounting.prompt_read(sequence, now)
            self._end(sequence, FinishReason.LENGTH)

    def _fail(self, sequence: Sequence) -> None:
        self._planner.cache.disown(sequence)
        self._end(sequence, FinishReason.ERROR, NumericalFailure("The model gave no finite result for this request."))
