"""The door: a group of sequences is accepted as a whole, refused for good, or told when to come back.

It does not know HTTP or plans. Invariants: what is accepted is in the vocabulary, fits the context and could run alone in the worker's
memory; the waiting queue stays within its bounds in sequences and prompt tokens; a refusal changes nothing.
"""

from __future__ import annotations

from collections.abc import Sequence as Requests

from service.schedulers.blocks import BlockSpace
from service.schedulers.waiting import WaitingQueue
from service.types.errors import ContextLengthExceeded, InvalidRequest, QueueFull, UnsupportedField
from service.types.request import GenerationRequest
from service.types.settings import SchedulerSettings

_SMOOTHING = 0.1
_RETRY_LIMITS_S = (1.0, 60.0)


class Admission:
    """The bounds of one version's queue and the rate at which it empties.

    `context_tokens`, `vocab_size` and `image_tokens` are set when the worker is known.
    """

    def __init__(self, settings: SchedulerSettings) -> None:
        self.context_tokens = self.vocab_size = self.image_tokens = 0
        self._settings = settings
        self._last_end_s: float | None = None
        self._seconds_a_sequence = 1.0

    def check(self, requests: Requests[GenerationRequest], waiting: WaitingQueue, space: BlockSpace) -> None:
        """Return when all may enter. Raises InvalidRequest (or a subclass) when one never can, QueueFull when not now."""
        if not requests:
            raise InvalidRequest("A request must ask for at least one sequence.")
        for request in requests:
            self._check_alone(request, space)
        sequences, tokens = len(requests), sum(len(request.prompt) for request in requests)
        limits = self._settings
        if sequences > limits.queue_requests or tokens > limits.queue_tokens:
            raise InvalidRequest(
                f"The request asks for {sequences} sequences with {tokens} prompt tokens at once; this server queues at most "
                f"{limits.queue_requests} sequences with {limits.queue_tokens} prompt tokens."
            )
        if len(waiting) + sequences > limits.queue_requests or waiting.tokens + tokens > limits.queue_tokens:
            raise QueueFull("The queue is full; try again later.", retry_after_s=self.retry_after_s(len(waiting) + sequences))
        pixel_bytes = sum(request.pixel_bytes for request in requests)
        if pixel_bytes and waiting.tokens and waiting.pixel_bytes + pixel_bytes > limits.queue_pixel_bytes:
            raise QueueFull("The queue holds as many images as it may; try again later.", retry_after_s=self.retry_after_s(len(waiting)))

    def ended(self, now: float, others_wait: bool) -> None:
        """A sequence ended now: the rate follows while `others_wait` (an idle stretch says nothing about the rate)."""
        if self._last_end_s is not None:
            self._seconds_a_sequence += _SMOOTHING * (now - self._last_end_s - self._seconds_a_sequence)
        self._last_end_s = now if others_wait else None

    def retry_after_s(self, ahead: int) -> float:
        """Seconds until about half of `ahead` sequences have ended at the present rate."""
        least, most = _RETRY_LIMITS_S
        return min(max(ahead * self._seconds_a_sequence / 2, least), most)

    def _check_alone(self, request: GenerationRequest, space: BlockSpace) -> None:
        if request.adapter is not None:
            raise UnsupportedField("Adapters are not served by this version.", param="adapter")
        if not request.prompt:
            raise InvalidRequest("The prompt has no tokens.", param="prompt")
        if max(request.prompt) >= self.vocab_size:
            raise InvalidRequest(f"The prompt holds token {max(request.prompt)}, which this model does not have.", param="prompt")
        if request.image_tokens > self.image_tokens:
            raise InvalidRequest(
                f"The images take {request.image_tokens} tokens and this server can hold {self.image_tokens} for a request.",
                param="messages",
            )
        least = 1 if request.prompt_logprobs is None else 0
        if request.stop.max_tokens < least:
            raise InvalidRequest(f"max_tokens must be at least {least}.", param="max_tokens")
        self._check_size(len(request.prompt), request.stop.max_tokens, space)

    def still_fits(self, request: GenerationRequest, space: BlockSpace) -> bool:
        """Could an accepted request run alone in this worker too, which may have less memory than the one before?"""
        try:
            self._check_size(len(request.prompt), request.stop.max_tokens, space)
        except ContextLengthExceeded:
            return False
        return True

    def _check_size(self, prompt: int, wanted: int, space: BlockSpace) -> None:
        if prompt + wanted > self.context_tokens:
            raise ContextLengthExceeded(
                f"The prompt has {prompt} tokens and {wanted} more are asked for; together they exceed the context of "
                f"{self.context_tokens} tokens.",
                param="max_tokens" if prompt < self.context_tokens else "prompt",
            )
        if not space.fits_alone(prompt + wanted):
            raise ContextLengthExceeded(
                f"{prompt + wanted} tokens (prompt and max_tokens) do not fit the memory that this server has for its KV cache.",
                param="max_tokens",
            )
