"""What the worker is told of sequences that enter a row, and whether it can keep their images; pixels travel once in a plan.

It does not know blocks or step budgets. Invariant: what is told suffices to compute the sequence from nothing.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import replace

from service.schedulers.sequence import Sequence
from service.types.plan import OpenSequence
from service.types.request import ImageInput

# A plan stops opening sequences when their pixels pass this: messages to the worker are bounded.
OPENED_PIXEL_BYTES = 64 << 20


def has_image_room(sequence: Sequence, running: Collection[Sequence], most_tokens: int) -> bool:
    """Can a worker that keeps `most_tokens` image tokens hold those of `sequence` beside the `running` ones'? One alone always fits."""
    taken = sum(other.image_tokens for other in running)
    return not running or taken + sequence.image_tokens <= most_tokens


def openings(sequences: Iterable[Sequence]) -> tuple[OpenSequence, ...]:
    """One opening a sequence, in order."""
    sent: set[str] = set()
    return tuple([_opening(sequence, sent) for sequence in sequences])


def _opening(sequence: Sequence, sent: set[str]) -> OpenSequence:
    request = sequence.request
    return OpenSequence(
        row=sequence.row,
        tokens=tuple(sequence.tokens),
        prompt_tokens=sequence.prompt_tokens,
        sampling=request.sampling,
        stop=request.stop,
        prompt_logprobs=request.prompt_logprobs,
        images=tuple([_once(image, sent) for image in request.images]),
    )


def _once(image: ImageInput, sent: set[str]) -> ImageInput:
    if image.digest in sent:
        return replace(image, pixels=b"")
    sent.add(image.digest)
    return image
