"""From logits and samples to a step's results: what every backend answers in the same words. numpy alone.

It does not know who computed the logits. Invariant: what is not finite becomes a failure of its row and never a token or a number.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from service.engine.batch import Ints
from service.engine.sampler import Samples
from service.types.plan import PromptLogprobs, SampledToken
from service.types.request import TokenLogprob

NUMERICAL_FAILURE = "numerical_failure"


def sampled_tokens(rows: Ints, samples: Samples) -> list[SampledToken]:
    """One entry for each of rows [R]; −1 is a failure."""
    entries = zip(rows.tolist(), samples.tokens.tolist(), strict=True)
    tokens = [SampledToken(row, token, None, None if token >= 0 else NUMERICAL_FAILURE) for row, token in entries]
    for index, entry in samples.logprobs.items():
        tokens[index] = tokens[index]._replace(logprob=entry)
    return tokens


def prompt_scores(row: int, first: int, found: Sequence[TokenLogprob]) -> PromptLogprobs:
    """The log-probs of the prompt tokens from position `first` on, or their failure."""
    if not all(math.isfinite(entry.logprob) for entry in found):
        return PromptLogprobs(row, first, (), NUMERICAL_FAILURE)
    return PromptLogprobs(row, first, tuple(found))


def joined(parts: Sequence[PromptLogprobs]) -> tuple[PromptLogprobs, ...]:
    """One entry a row: a slice that was computed in parts gave several, in order. A row with a failed part failed."""
    rows: dict[int, PromptLogprobs] = {}
    for part in parts:
        before = rows.setdefault(part.row, part)
        if before is not part and before.failure is None:
            rows[part.row] = part if part.failure else before._replace(logprobs=before.logprobs + part.logprobs)
    return tuple(rows.values())
