"""Timing one streamed answer: when it was sent, when each piece of text came, how it ended and what the server counted.

It does not know sockets; a sender hands it events with their times. Times are seconds of one monotonic clock (`time.perf_counter`).
Invariant: a watch that is `ended` has exactly one outcome: `ok`, `aborted` or the kind of its failure.
"""

from __future__ import annotations

from array import array

import msgspec


class SendFailure(Exception):
    """A request failed; `kind` is a short word for the error counts, `detail` one line for people."""

    def __init__(self, kind: str, detail: str = "") -> None:
        super().__init__(f"{kind}: {detail}" if detail else kind)
        self.kind, self.detail = kind, detail


class _Delta(msgspec.Struct):
    content: str | None = None
    reasoning_content: str | None = None


class _Choice(msgspec.Struct):
    text: str | None = None
    delta: _Delta | None = None


class _Usage(msgspec.Struct):
    prompt_tokens: int = 0
    completion_tokens: int = 0


class _Event(msgspec.Struct):
    choices: list[_Choice] = []
    usage: _Usage | None = None
    error: object = None


_DECODER = msgspec.json.Decoder(_Event)


class Watch:
    """One request as seen by the client. `due_s` is when it should have been sent; `gaps_s` the times between pieces of text; `kind`
    the word under which it is counted."""

    __slots__ = (
        "_abort",
        "done",
        "due_s",
        "end_s",
        "first_s",
        "gaps_s",
        "kind",
        "last_s",
        "outcome",
        "output_tokens",
        "pieces",
        "prompt_tokens",
        "sent_s",
    )

    def __init__(self, due_s: float = 0.0, abort: bool = False) -> None:
        self._abort = abort
        self.due_s, self.sent_s, self.first_s, self.last_s, self.end_s = due_s, 0.0, 0.0, 0.0, 0.0
        self.pieces, self.gaps_s = 0, array("d")
        self.prompt_tokens: int | None = None
        self.output_tokens: int | None = None
        self.done, self.outcome, self.kind = False, "", ""

    def event(self, data: bytes, now_s: float) -> bool:
        """Take the data of one server-sent event; False when the client now leaves. Raises SendFailure."""
        if data == b"[DONE]":
            self.done = True
            return True
        try:
            event = _DECODER.decode(data)
        except msgspec.DecodeError as error:
            raise SendFailure("bad_event", str(error)[:200]) from None
        if event.error is not None:
            raise SendFailure("stream_error", str(event.error)[:200])
        if event.usage is not None:
            self.prompt_tokens, self.output_tokens = event.usage.prompt_tokens, event.usage.completion_tokens
        if any(choice.text or (choice.delta and (choice.delta.content or choice.delta.reasoning_content)) for choice in event.choices):
            self._text(now_s)
            return not self._abort
        return True

    def finish(self, now_s: float, failure: SendFailure | None = None) -> None:
        """Close the watch with its outcome; a stream without its last event counts as truncated."""
        self.end_s = now_s
        if failure is not None:
            self.outcome = failure.kind
        elif self.done:
            self.outcome = "ok"
        else:
            self.outcome = "aborted" if self._abort and self.pieces else "truncated"

    @property
    def tokens(self) -> int:
        """Generated tokens: the server's count, else the pieces of text."""
        return self.pieces if self.output_tokens is None else self.output_tokens

    @property
    def ttft_s(self) -> float | None:
        """Sending to the first piece of text."""
        return self.first_s - self.sent_s if self.pieces else None

    @property
    def tpot_s(self) -> float | None:
        """Mean time of an output token after the first."""
        return (self.last_s - self.first_s) / (self.tokens - 1) if self.pieces and self.tokens > 1 else None

    def _text(self, now_s: float) -> None:
        if self.pieces:
            self.gaps_s.append(now_s - self.last_s)
        else:
            self.first_s = now_s
        self.last_s = now_s
        self.pieces += 1
