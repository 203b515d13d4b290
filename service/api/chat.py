"""POST /v1/chat/completions: messages through the version's chat template; streaming and not.

It does not know templates' language or how answers are sent. Invariant: nothing is submitted before everything about the body was checked.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fastapi import Request, Response

from service.api.calls import Call
from service.api.choosing import Prepared, answer, demand_of
from service.api.completions import frame_of
from service.api.context import Services
from service.api.fields import UNSUPPORTED, drop_neutral, prepare_messages, validate
from service.api.images import holds_images
from service.api.outputs import ChatShape
from service.api.prompts import PromptReader
from service.api.schemas import ChatBody
from service.api.translate import Translator

if TYPE_CHECKING:
    from service.schedulers.router import ServedVersion

ROUTE = "/v1/chat/completions"
FIELDS = frozenset(ChatBody.model_fields)


def parse(data: dict[str, Any]) -> ChatBody:
    """The checked body. Raises the 400 failures that need no model."""
    fields = drop_neutral(data, UNSUPPORTED, FIELDS)
    if "messages" in fields:
        fields["messages"] = prepare_messages(fields["messages"])
    return validate(ChatBody, fields)


async def chat(services: Services, request: Request) -> Response:
    """The endpoint."""
    body = parse(await services.read(request))

    async def prepare(call: Call, served: ServedVersion) -> Prepared:
        limits = services.settings.limits
        pictures = await services.images.read(served, services.router.versions(), body.messages)
        prompt = await PromptReader(served, services.renderer, limits).chat(body.messages, body.chat_template_kwargs, pictures)
        requests = Translator(served, call, limits).chat(body, prompt)
        frame = frame_of(call, served, body, requests)
        shape = ChatShape(frame, len(requests), bool(body.logprobs))
        return Prepared(requests, shape, body.n or 1, bool(body.stream), frame.usage_in_stream)

    return await answer(services, request, body.model, demand_of(body.model, body.cost, holds_images(body.messages)), prepare)
