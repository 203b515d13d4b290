"""Bring the events of one request's streams to its client: as one answer, or as server-sent events.

It does not know what the events look like on the wire (outputs.py) or how requests are scheduled. Invariants: when the client leaves, every
stream is cancelled at once, streaming or not; a stream that has begun ends with `[DONE]` or with one error event, never silently; what
is ready at one time goes out in one write.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from service.api.calls import Call
from service.api.errors import error_event, public
from service.api.exchange import WRITE_EXTENSION, Receive, Scope, Send
from service.api.outputs import DONE, ChoiceResult, Shape, usage_object
from service.types.errors import RequestCancelled, ServiceError, Unavailable
from service.types.request import Event, FinishEvent, FinishReason, PromptEvent, TokenEvent, Usage

if TYPE_CHECKING:
    from service.schedulers.streams import Stream

Write = Callable[[bytes], Awaitable[None]]

STREAM_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]


@dataclass(slots=True)
class Answer:
    """The streams of one request with what is needed to show them. `n` choices share a prompt."""

    call: Call
    streams: Sequence[Stream]
    shape: Shape
    n: int = 1
    include_usage: bool = False

    async def send_whole(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Collect every choice, then answer. Raises the failure of the first choice that fails; RequestCancelled when the client left."""
        del scope
        results = [ChoiceResult() for _ in self.streams]
        usages: list[Usage] = []
        async with self._watched(receive):
            for stream, result in zip(self.streams, results, strict=True):
                usages.append(await self._collect(stream, result))
        body = self.shape.whole(results, self._usage(usages))
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    async def send_stream(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Server-sent events. A failure before the first event is raised, so that it becomes a plain error response."""
        write = writer_of(scope, send)
        async with self._watched(receive):
            first = await anext(self.streams[0])
            if isinstance(first, FinishEvent):
                raise_failure(first)
            await send({"type": "http.response.start", "status": 200, "headers": STREAM_HEADERS})
            usages: list[Usage | None] = [None] * len(self.streams)
            try:
                await self._pump_all(write, first, usages)
            except ServiceError as failure:
                self.call.outcome = failure.code
                await send({"type": "http.response.body", "body": error_event(failure)})
                return
            done = [usage for usage in usages if usage is not None]
            total = self._usage(done)
            tail = self.shape.usage(total) if self.include_usage else b""
            await send({"type": "http.response.body", "body": tail + DONE})

    async def _pump_all(self, write: Write, first: Event, usages: list[Usage | None]) -> None:
        """A task for each stream, also for one alone: waking a task costs a walk down its frames, and here there are two and not twenty."""

        async def pump(index: int) -> None:
            usages[index] = await self._pump(index, write, first if index == 0 else None)

        tasks = [asyncio.ensure_future(pump(index)) for index in range(len(self.streams))]
        try:
            await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _pump(self, index: int, write: Write, first: Event | None) -> Usage:
        """Forward one stream to its end. Raises its failure."""
        stream, shape = self.streams[index], self.shape
        event: Event = first if first is not None else await anext(stream)
        prompt = event.logprobs if isinstance(event, PromptEvent) else ()
        data = shape.opening(index, prompt)
        while True:
            if type(event) is TokenEvent:
                data += shape.delta(index, event)
            for event in stream.drain_ready():
                if type(event) is TokenEvent:
                    data += shape.delta(index, event)
            if type(event) is FinishEvent:
                raise_failure(event)
                data += shape.closing(index, ChoiceResult(reason=event.reason, matched=event.matched_stop))
                await write(data)
                return event.usage
            if data:
                await write(data)
                data = b""
            event = await anext(stream)

    async def _collect(self, stream: Stream, result: ChoiceResult) -> Usage:
        texts: list[str] = []
        async for event in stream:
            if isinstance(event, TokenEvent):
                texts.append(event.text)
                result.logprobs.extend(event.logprobs)
            elif isinstance(event, PromptEvent):
                result.prompt_logprobs = event.logprobs
            else:
                raise_failure(event)
                result.text, result.reason, result.matched = "".join(texts), event.reason, event.matched_stop
                return event.usage
        raise Unavailable("The answer ended without an ending.")

    def _usage(self, usages: list[Usage]) -> dict[str, object]:
        total = usage_object(usages, self.n)
        self.call.tokens = (total["prompt_tokens"], total["completion_tokens"])
        return total

    @contextlib.asynccontextmanager
    async def _watched(self, receive: Receive) -> AsyncIterator[None]:
        """Cancel every stream when the client leaves, and in any case when the body of this context ends early."""
        watcher = asyncio.ensure_future(self._watch(receive))
        try:
            yield
        finally:
            watcher.cancel()
            self._cancel()

    async def _watch(self, receive: Receive) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        self.call.outcome = "client_left"
        self._cancel()

    def _cancel(self) -> None:
        for stream in self.streams:
            stream.cancel()


def writer_of(scope: Scope, send: Send) -> Write:
    """The shortest way to send a piece of a body that has started."""

    async def write(data: bytes) -> None:
        await send({"type": "http.response.body", "body": data, "more_body": True})

    direct: Write | None = scope.get("extensions", {}).get(WRITE_EXTENSION)
    return direct or write


def raise_failure(ending: FinishEvent) -> None:
    """Raise what a choice failed with, if it failed."""
    if ending.reason is FinishReason.CANCELLED:
        raise RequestCancelled("The request was cancelled before its end.")
    if ending.reason is FinishReason.ERROR:
        raise public(ending.error or Unavailable("The answer was cut off."))
