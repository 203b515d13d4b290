"""Chat templates: messages to prompt tokens, rendered in a child process that may be killed, contents kept apart from control tokens.

It does not know HTTP bodies or versions. A text inside a message that spells a special token is swapped for one private-use character
before rendering and swapped back while encoding (`TokenCodec.encode_protected`), so the template sees and places it, and the vocabulary
never parses it. Invariant: one warm child at most; a render that takes too long or too much ends the child and that request alone.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any

from service.inputs.template_messages import Ready, Refused, Render, Rendered, Reply, Warm
from service.inputs.tokens import TokenCodec
from service.processes import ChildLost, ChildProcess, FrameTooLarge
from service.types.errors import InternalError, InvalidRequest

CHILD = "service.inputs.template_child"
START_S = 30.0
PRIVATE_USE = range(0xF0000, 0xFFFFE)


class Protector:
    """Swaps what spells special tokens for characters that occur nowhere else in the texts of one request."""

    def __init__(self, codec: TokenCodec, texts: Sequence[str]) -> None:
        self._codec = codec
        used = set().union(*texts) if texts else set()
        self._free = (chr(code) for code in PRIVATE_USE if chr(code) not in used)
        self._marks: dict[str, str] = {}

    @property
    def table(self) -> dict[str, str]:
        """Each character in use and the text that it stands for."""
        return {mark: text for text, mark in self._marks.items()}

    def reserve(self) -> str:
        """A character that occurs nowhere in the texts and stands for nothing else."""
        return next(self._free)

    def protect(self, text: str) -> str:
        """`text` with every spelled special token swapped."""
        return "".join(self._mark(piece) if special else piece for piece, special in self._codec.split_special(text))

    def _mark(self, text: str) -> str:
        if text not in self._marks:
            self._marks[text] = next(self._free)
        return self._marks[text]


class TemplateRenderer:
    """Renders in one warm child, one render at a time. `seconds` and `memory_bytes` bound each render."""

    def __init__(self, seconds: float, memory_bytes: int) -> None:
        self._seconds = seconds
        self._memory_bytes = memory_bytes
        self._child: ChildProcess | None = None
        self._turn = asyncio.Lock()

    async def warm(self) -> None:
        """Have a child ready, so that the first render does not wait for it."""
        async with self._turn:
            await self._ready_child()

    async def close(self) -> None:
        """End the child."""
        child, self._child = self._child, None
        if child is not None:
            await child.stop()

    async def render(self, template: str, variables: Mapping[str, Any], characters: int) -> str:
        """The rendered text, at most `characters` long. Raises InvalidRequest when the template cannot or will not."""
        async with self._turn:
            child = await self._ready_child()
            try:
                reply = await child.ask(Render(template, dict(variables), characters), self._seconds)
            except FrameTooLarge:
                raise InvalidRequest("The messages are too long to be rendered.", param="messages") from None
            except ChildLost as loss:
                self._child = None
                raise InvalidRequest(self._loss_sentence(loss.reason), param="messages") from None
        if isinstance(reply, Rendered):
            return reply.text
        raise InvalidRequest(self._refusal_sentence(reply, characters), param="messages")

    async def _ready_child(self) -> ChildProcess:
        if self._child is None or not self._child.alive:
            child = await ChildProcess.spawn(CHILD, Reply)
            try:
                reply = await child.ask(Warm(self._memory_bytes), START_S)
            except ChildLost:
                reply = None
            if not isinstance(reply, Ready):
                raise InternalError("The process that renders chat templates did not start.")
            self._child = child
        return self._child

    def _loss_sentence(self, reason: str) -> str:
        if reason == "deadline":
            return f"Rendering the chat template took longer than {self._seconds:g} seconds."
        return "Rendering the chat template with these messages failed."

    def _refusal_sentence(self, reply: object, characters: int) -> str:
        kind = reply.kind if isinstance(reply, Refused) else "failed"
        if kind == "message" and isinstance(reply, Refused):
            return f"The chat template refused the messages: {reply.message[:200]}"
        if kind == "too_long":
            return f"The rendered messages are longer than {characters} characters."
        if kind == "memory":
            return f"Rendering the chat template needs more than {self._memory_bytes >> 20} MiB."
        return "The chat template cannot render these messages."


async def render_chat(
    renderer: TemplateRenderer,
    codec: TokenCodec,
    template: str,
    variables: Mapping[str, Any],
    characters: int,
    image_id: int | None = None,
) -> list[int]:
    """Prompt tokens of `variables["messages"]` (dicts of strings) through `template`. Raises InvalidRequest.

    A message's `content` may come in pieces, None for an image: it becomes one token `image_id`, which nothing that is spelled can become.
    """
    texts = [text for message in variables["messages"] for part in message.values() for text in _texts(part)]
    texts += [text for text in variables.values() if isinstance(text, str)]
    protector = Protector(codec, texts)
    picture = protector.reserve()
    safe = {name: protector.protect(value) if isinstance(value, str) else value for name, value in variables.items()}
    safe["messages"] = [_safe(message, protector, picture) for message in variables["messages"]]
    named = {name: codec.special_tokens.get(name, "") for name in ("bos_token", "eos_token", "unk_token", "pad_token")}
    text = await renderer.render(template, {"tools": None, "documents": None, **safe, **named}, characters)
    if image_id is not None:
        text = text.replace(picture, codec.token_text(image_id))
    table = protector.table
    if len(text) > 1 << 14:
        return await asyncio.to_thread(codec.encode_protected, text, table)
    return codec.encode_protected(text, table)


def _safe(message: Mapping[str, Any], protector: Protector, picture: str) -> dict[str, str]:
    """A message with its content in one text, in which `picture` stands for an image and nothing spells a special token."""
    content = "".join(picture if piece is None else protector.protect(piece) for piece in _pieces(message["content"]))
    return {name: content if name == "content" else protector.protect(text) for name, text in message.items()}


def _pieces(part: str | Sequence[str | None]) -> Sequence[str | None]:
    return [part] if isinstance(part, str) else part


def _texts(part: str | Sequence[str | None]) -> list[str]:
    return [piece for piece in _pieces(part) if piece is not None]
