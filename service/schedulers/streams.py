"""One bounded stream of events for each sequence: text decoded as tokens arrive, stop strings, exactly one ending.

The loop pushes, one reader takes. It does not know HTTP, plans or why a sequence ends. Invariants: nothing follows the FinishEvent and
there is exactly one; a token is delivered once, with its log-probs; text that a stop string cut off is never delivered; at most `bound`
events wait undelivered (beside the ending), and a reader is woken only while it waits.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable
from typing import Protocol

from service.schedulers.stops import StopStrings
from service.types.request import Event, FinishEvent, FinishReason, PromptEvent, TokenEvent, TokenLogprob

_new = tuple.__new__


class IncrementalDecoder(Protocol):
    """Turns tokens into text as they come; bytes of an incomplete character are kept back."""

    def push(self, token: int) -> str:
        """The text that became certain with `token`."""

    def flush(self) -> str:
        """The text kept back, at the end."""


class Codec(Protocol):
    """What a stream needs of a version's tokenizer."""

    def decoder(self, skip_special: bool = True) -> IncrementalDecoder:
        """A new decoder with nothing pushed yet."""


class Stream:
    """What the API reads: an async iterator over the events of one sequence, ending after its FinishEvent.

    `request_id` is the request's. One reader only. `cancel()` may be called at any time and is idempotent.
    """

    __slots__ = ("_bound", "_decoder", "_ended", "_events", "_logprobs", "_on_cancel", "_stops", "_tokens", "_waiter", "request_id", "slow")

    def __init__(self, request_id: str, decoder: IncrementalDecoder, strings: tuple[str, ...], bound: int) -> None:
        self.request_id = request_id
        self.slow = False
        self._decoder = decoder
        self._stops = StopStrings(strings) if strings else None
        self._bound = bound
        self._events: deque[Event] = deque()
        self._tokens: list[int] = []
        self._logprobs: list[TokenLogprob] = []
        self._ended = False
        self._waiter: asyncio.Future[None] | None = None
        self._on_cancel: Callable[[], None] | None = None

    # The reader's side.

    def __aiter__(self) -> AsyncIterator[Event]:
        """The stream itself."""
        return self

    async def __anext__(self) -> Event:
        """The next event; StopAsyncIteration after the FinishEvent was taken."""
        events = self._events
        while not events:
            if self._ended:
                raise StopAsyncIteration
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        return events.popleft()

    def drain_ready(self) -> list[Event]:
        """Everything that is there now, without waiting; empty when nothing is."""
        ready = list(self._events)
        self._events.clear()
        return ready

    def cancel(self) -> None:
        """The reader left: the sequence ends, its blocks are free at once. Nothing happens when it has ended already."""
        if self._on_cancel is not None:
            self._on_cancel()

    # The loop's side.

    @property
    def ended(self) -> bool:
        """True once the FinishEvent was published (taken or not)."""
        return self._ended

    def on_cancel(self, callback: Callable[[], None]) -> None:
        """Call `callback` when the reader cancels before the end."""
        self._on_cancel = callback

    def push(self, token: int, logprob: TokenLogprob | None = None, stops_count: bool = True) -> str | None:
        """Publish a generated token; gives the stop string that it completed, if one. `stops_count` False: stop strings do not count yet.

        Sets `slow` when the reader has left more events than the bound.
        """
        text = self._decoder.push(token)
        stops = self._stops
        if stops is None and not self._tokens:
            events = self._events
            events.append(_new(TokenEvent, (text, (token,), () if logprob is None else (logprob,))))
            if len(events) > self._bound:
                self.slow = True
            if self._waiter is not None:
                self._wake()
            return None
        self._tokens.append(token)
        if logprob is not None:
            self._logprobs.append(logprob)
        if stops is None or not stops_count:
            self._emit(text)
            return None
        certain, matched = stops.push(text)
        if certain or matched is not None or not text:
            self._emit(certain)
        return matched

    def push_silent(self, token: int, logprob: TokenLogprob | None = None) -> None:
        """Publish the token that ends the sequence: billed, with its log-prob, without text."""
        self._tokens.append(token)
        if logprob is not None:
            self._logprobs.append(logprob)

    def push_prompt(self, logprobs: tuple[TokenLogprob, ...]) -> None:
        """Publish the prompt's log-probs (before any token)."""
        self._add(PromptEvent(logprobs))

    def finish(self, ending: FinishEvent) -> None:
        """Publish the one ending, after the text that was held back (unless a stop string cut it off). A second ending is refused."""
        if self._ended:
            raise RuntimeError("a stream ends once")
        text = ""
        if not (ending.reason is FinishReason.STOP and isinstance(ending.matched_stop, str)):
            tail = self._decoder.flush()
            text = (self._stops.flush() if self._stops is not None else "") + tail
        if text or self._tokens:
            self._emit(text)
        self._ended = True
        self._on_cancel = None
        self._add(ending)

    def _emit(self, text: str) -> None:
        self._add(TokenEvent(text, tuple(self._tokens), tuple(self._logprobs)))
        self._tokens.clear()
        self._logprobs.clear()

    def _add(self, event: Event) -> None:
        events = self._events
        events.append(event)
        if len(events) > self._bound:
            self.slow = True
        if self._waiter is not None:
            self._wake()

    def _wake(self) -> None:
        waiter, self._waiter = self._waiter, None
        if waiter is not None and not waiter.done():
            waiter.set_result(None)
