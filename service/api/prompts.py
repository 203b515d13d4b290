"""Prompts of every shape to token ids: texts, ids, and messages through the version's chat template. Bounded before tokenizing.

It does not know sampling or streams. Invariant: a prompt's characters are counted before any work is spent on them.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from service.api.placement import ChatPrompt, place_images
from service.api.schemas import ChatMessage, ContentPart, TextPart
from service.api.translate import context_of
from service.inputs.image_preparer import PreparedImage
from service.inputs.templates import TemplateRenderer, render_chat
from service.types.errors import ContextLengthExceeded, InvalidRequest
from service.types.settings import HttpLimits

if TYPE_CHECKING:
    from service.schedulers.router import ServedVersion

THREAD_CHARACTERS = 1 << 14
RESERVED = frozenset({"messages", "tools", "documents", "add_generation_prompt", "bos_token", "eos_token", "unk_token", "pad_token"})


@dataclass(frozen=True, slots=True)
class PromptReader:
    """Reads prompts for one version."""

    served: ServedVersion
    renderer: TemplateRenderer
    limits: HttpLimits

    @property
    def characters(self) -> int:
        """The most characters of one prompt."""
        return self.limits.prompt_characters_per_token * context_of(self.served)

    async def prompts(self, prompt: str | list[Any]) -> list[list[int]]:
        """Token ids of each prompt. Raises InvalidRequest or ContextLengthExceeded."""
        single = isinstance(prompt, str) or isinstance(prompt[0], int)
        listed = [prompt] if single else prompt
        if len(listed) > self.limits.prompts:
            raise InvalidRequest(f"`prompt` may hold at most {self.limits.prompts} prompts.", param="prompt")
        return [await self.text(item) if isinstance(item, str) else self._ids(item) for item in listed]

    async def text(self, text: str, add_special: bool = True, param: str = "prompt") -> list[int]:
        """Token ids of a text, never a control token that the text spells."""
        self._check_length(len(text), param)
        codec = self.served.codec
        if len(text) > THREAD_CHARACTERS:
            ids = await asyncio.to_thread(codec.encode, text, add_special=add_special)
        else:
            ids = codec.encode(text, add_special=add_special)
        bos = self.served.manifest.spec.bos_id
        if not ids and add_special:
            if bos is None:
                raise InvalidRequest("The prompt is empty.", param=param)
            ids = [bos]
        return ids

    async def chat(
        self, messages: list[ChatMessage], extra: Mapping[str, Any] | None = None, pictures: Sequence[PreparedImage] = ()
    ) -> ChatPrompt:
        """Messages through the version's chat template, ready for an answer; `pictures` are their image parts' in order."""
        template = self.served.manifest.chat_template
        if template is None:
            raise InvalidRequest(f"The model {self.served.name} has no chat template; use /v1/completions.", param="messages")
        reserved = sorted(RESERVED.intersection(extra or {}))
        if reserved:
            raise InvalidRequest(f"`chat_template_kwargs` may not set {reserved[0]}.", param="chat_template_kwargs")
        plain = [_plain(message) for message in messages]
        self._check_length(sum(len(piece) for message in plain for piece in message["content"] if piece is not None), "messages")
        variables = {**(extra or {}), "messages": plain, "add_generation_prompt": True}
        image_id = self.served.manifest.spec.image_id
        ids = await render_chat(self.renderer, self.served.codec, template, variables, self.characters, image_id)
        if not ids:
            raise InvalidRequest("The messages render to an empty prompt.", param="messages")
        return place_images(ids, image_id, pictures) if pictures else ChatPrompt(ids)

    def _ids(self, ids: list[int]) -> list[int]:
        vocabulary = self.served.manifest.spec.vocab_size
        if min(ids) < 0 or max(ids) >= vocabulary:
            raise InvalidRequest(f"`prompt`: token ids of this model lie between 0 and {vocabulary - 1}.", param="prompt")
        if (image_id := self.served.manifest.spec.image_id) in ids:
            raise InvalidRequest(f"`prompt`: token {image_id} stands for an image, which only messages can bring.", param="prompt")
        return ids

    def _check_length(self, characters: int, param: str) -> None:
        if characters > self.characters:
            raise ContextLengthExceeded(
                f"The prompt has {characters} characters; this model takes at most {self.characters} "
                f"({self.limits.prompt_characters_per_token} for each of its {context_of(self.served)} tokens).",
                param=param,
            )


def _plain(message: ChatMessage) -> dict[str, Any]:
    """A message as templates know it; `content` in pieces, None for each image."""
    content = message.content
    role = "system" if message.role == "developer" else message.role
    named = {} if message.name is None else {"name": message.name}
    return {"role": role, "content": [content or ""] if not isinstance(content, list) else _pieces(content), **named}


def _pieces(parts: Sequence[ContentPart]) -> list[str | None]:
    """Texts, and None for each image; a line break between two texts."""
    pieces: list[str | None] = []
    for part in parts:
        if isinstance(part, TextPart):
            pieces.append(part.text if not pieces or pieces[-1] is None else "\n" + part.text)
        else:
            pieces.append(None)
    return pieces
