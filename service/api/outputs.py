"""The protocol's shapes of what is generated: whole answers and stream chunks, for chat and for completions.

It does not know streams or sockets. A chunk is bytes that are the same for a whole response around one JSON-escaped text, so that a
token costs one small encode and one concatenation. Invariant: a stream's chunks put together say what the whole answer would.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec

from service.api.logprobs import chat_entry, completion_logprobs
from service.inputs.tokens import TokenCodec
from service.types.request import FinishReason, TokenEvent, TokenLogprob, Usage

encode = msgspec.json.Encoder().encode
DONE = b"data: [DONE]\n\n"
_MARK = "\ue000mark\ue000"
_MARK_BYTES = encode(_MARK)


@dataclass(slots=True)
class ChoiceResult:
    """What one choice came to. `prompt_logprobs` are of the prompt's tokens from the second on."""

    text: str = ""
    logprobs: list[TokenLogprob] = field(default_factory=list)
    prompt_logprobs: tuple[TokenLogprob, ...] = ()
    reason: FinishReason = FinishReason.STOP
    matched: str | int | None = None


class RunningUsage:
    """Tokens of each choice until now, for streams that show them in every chunk; `prompts` are the prompt tokens of each choice."""

    def __init__(self, prompts: Sequence[int]) -> None:
        self._prompts, self._made = prompts, [0] * len(prompts)

    def take(self, index: int, event: TokenEvent) -> None:
        """Count what an event brought."""
        self._made[index] += len(event.tokens)

    def of(self, index: int) -> dict[str, int]:
        """`usage` of one choice until now; what was cached is only known at the end."""
        return _counts(self._prompts[index], self._made[index])


@dataclass(frozen=True, slots=True)
class Frame:
    """What is the same in every part of one response. `running` is there when every chunk shows the usage until then."""

    request_id: str
    model: str
    codec: TokenCodec
    usage_in_stream: bool = False
    running: RunningUsage | None = None
    created: int = field(default_factory=lambda: int(time.time()))

    def usage_of_chunk(self, index: int) -> dict[str, Any]:
        """What a chunk of a choice says of its usage."""
        if self.running is not None:
            return {"usage": self.running.of(index)}
        return {"usage": None} if self.usage_in_stream else {}


def usage_object(usages: list[Usage], n: int) -> dict[str, Any]:
    """`usage` over the choices of a request; a prompt shared by `n` choices counts once."""
    cached = sum(usage.cached_tokens for usage in usages[::n])
    counts = _counts(sum(usage.prompt_tokens for usage in usages[::n]), sum(usage.generated_tokens for usage in usages))
    return {**counts, "prompt_tokens_details": {"cached_tokens": cached}}


def _counts(prompt: int, generated: int) -> dict[str, int]:
    return {"prompt_tokens": prompt, "completion_tokens": generated, "total_tokens": prompt + generated}


def _split(chunk: dict[str, Any]) -> tuple[bytes, bytes]:
    before, _, after = encode(chunk).partition(_MARK_BYTES)
    return b"data: " + before, after + b"\n\n"


class ChatShape:
    """/v1/chat/completions."""

    def __init__(self, frame: Frame, choices: int, logprobs: bool) -> None:
        self.frame = frame
        self.logprobs = logprobs
        self._around = [_split(self._chunk(index, {"content": _MARK}, None)) for index in range(choices)]

    def opening(self, index: int, prompt_logprobs: tuple[TokenLogprob, ...]) -> bytes:
        """The first chunk of a choice."""
        del prompt_logprobs
        return b"data: " + encode(self._chunk(index, {"role": "assistant", "content": ""}, None)) + b"\n\n"

    def delta(self, index: int, event: TokenEvent) -> bytes:
        """A chunk for text that became certain; empty when there is nothing to show."""
        if self.frame.running is not None:
            self.frame.running.take(index, event)
        if not self.logprobs:
            if not event.text:
                return b""
            if self.frame.running is None:
                before, after = self._around[index]
                return before + encode(event.text) + after
        chunk = self._chunk(index, {"content": event.text}, None)
        if self.logprobs:
            chunk["choices"][0]["logprobs"] = {
                "content": [chat_entry(self.frame.codec, entry) for entry in event.logprobs],
                "refusal": None,
            }
        return b"data: " + encode(chunk) + b"\n\n"

    def closing(self, index: int, result: ChoiceResult) -> bytes:
        """The chunk with the finish reason."""
        chunk = self._chunk(index, {}, result.reason.value)
        chunk["choices"][0]["stop_reason"] = result.matched
        return b"data: " + encode(chunk) + b"\n\n"

    def usage(self, usage: dict[str, Any]) -> bytes:
        """The last chunk: no choices, the usage."""
        chunk = self._chunk(0, {}, None)
        return b"data: " + encode({**chunk, "choices": [], "usage": usage}) + b"\n\n"

    def whole(self, results: list[ChoiceResult], usage: dict[str, Any]) -> bytes:
        """The answer of a request that does not stream."""
        choices = [
            {
                "index": index,
                "message": {"role": "assistant", "content": result.text, "refusal": None},
                "logprobs": self._logprobs_object(result),
                "finish_reason": result.reason.value,
                "stop_reason": result.matched,
            }
            for index, result in enumerate(results)
        ]
        return encode({**self._head("chat.completion"), "choices": choices, "usage": usage})

    def _logprobs_object(self, result: ChoiceResult) -> dict[str, Any] | None:
        if not self.logprobs:
            return None
        return {"content": [chat_entry(self.frame.codec, entry) for entry in result.logprobs], "refusal": None}

    def _chunk(self, index: int, delta: dict[str, Any], reason: str | None) -> dict[str, Any]:
        choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": reason}
        return {**self._head("chat.completion.chunk"), "choices": [choice], **self.frame.usage_of_chunk(index)}

    def _head(self, kind: str) -> dict[str, Any]:
        frame = self.frame
        return {"id": f"chatcmpl-{frame.request_id[4:]}", "object": kind, "created": frame.created, "model": frame.model}


@dataclass(slots=True)
class Echo:
    """The prompt of one choice as it is to be shown: its text and its tokens."""

    text: str
    tokens: tuple[int, ...]


class CompletionShape:
    """/v1/completions. `echoes` has an entry a choice when the prompts are to be shown."""

    def __init__(self, frame: Frame, choices: int, top_logprobs: int | None, echoes: list[Echo] | None = None) -> None:
        self.frame = frame
        self.top_logprobs = top_logprobs
        self.echoes = echoes
        self._lengths = [0] * choices
        self._around = [_split(self._chunk(index, _MARK, None)) for index in range(choices)]

    def opening(self, index: int, prompt_logprobs: tuple[TokenLogprob, ...]) -> bytes:
        """The echo, if asked for."""
        if self.echoes is None:
            return b""
        chunk = self._chunk(index, self.echoes[index].text, None)
        if self.top_logprobs is not None:
            chunk["choices"][0]["logprobs"] = self._echo_logprobs(index, prompt_logprobs)
        self._lengths[index] = len(self.echoes[index].text)
        return b"data: " + encode(chunk) + b"\n\n"

    def delta(self, index: int, event: TokenEvent) -> bytes:
        """A chunk for text that became certain; empty when there is nothing to show."""
        if self.frame.running is not None:
            self.frame.running.take(index, event)
        if self.top_logprobs is None:
            if not event.text:
                return b""
            if self.frame.running is None:
                before, after = self._around[index]
                return before + encode(event.text) + after
        chunk = self._chunk(index, event.text, None)
        if self.top_logprobs is not None:
            chunk["choices"][0]["logprobs"] = self._generated_logprobs(event.logprobs, self._lengths[index])
        self._lengths[index] += len(event.text)
        return b"data: " + encode(chunk) + b"\n\n"

    def closing(self, index: int, result: ChoiceResult) -> bytes:
        """The chunk with the finish reason."""
        chunk = self._chunk(index, "", result.reason.value)
        chunk["choices"][0]["stop_reason"] = result.matched
        return b"data: " + encode(chunk) + b"\n\n"

    def usage(self, usage: dict[str, Any]) -> bytes:
        """The last chunk: no choices, the usage."""
        return b"data: " + encode({**self._head(), "choices": [], "usage": usage}) + b"\n\n"

    def whole(self, results: list[ChoiceResult], usage: dict[str, Any]) -> bytes:
        """The answer of a request that does not stream."""
        choices = [
            {
                "index": index,
                "text": (self.echoes[index].text if self.echoes is not None else "") + result.text,
                "logprobs": self._logprobs_object(index, result),
                "finish_reason": result.reason.value,
                "stop_reason": result.matched,
            }
            for index, result in enumerate(results)
        ]
        return encode({**self._head(), "choices": choices, "usage": usage})

    def _logprobs_object(self, index: int, result: ChoiceResult) -> dict[str, Any] | None:
        if self.top_logprobs is None:
            return None
        if self.echoes is None:
            return self._generated_logprobs(tuple(result.logprobs), 0)
        shown = self._echo_logprobs(index, result.prompt_logprobs)
        generated = self._generated_logprobs(tuple(result.logprobs), len(self.echoes[index].text))
        return {name: shown[name] + generated[name] for name in shown}

    def _echo_logprobs(self, index: int, entries: tuple[TokenLogprob, ...]) -> dict[str, Any]:
        tokens = self.echoes[index].tokens if self.echoes is not None else ()
        return completion_logprobs(self.frame.codec, [TokenLogprob(tokens[0], float("nan")), *entries], 0)

    def _generated_logprobs(self, entries: tuple[TokenLogprob, ...], offset: int) -> dict[str, Any]:
        return completion_logprobs(self.frame.codec, list(entries), offset)

    def _chunk(self, index: int, text: str, reason: str | None) -> dict[str, Any]:
        choice = {"index": index, "text": text, "logprobs": None, "finish_reason": reason}
        return {**self._head(), "choices": [choice], **self.frame.usage_of_chunk(index)}

    def _head(self) -> dict[str, Any]:
        frame = self.frame
        return {"id": f"cmpl-{frame.request_id[4:]}", "object": "text_completion", "created": frame.created, "model": frame.model}


Shape = ChatShape | CompletionShape
