"""POST /v1/completions: prompts as text, texts, ids or lists of ids; streaming and not.

It does not know how limits are checked (translate.py) or answers are sent (delivery.py).
Invariant: nothing is submitted before everything about the body was checked.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from fastapi import Request, Response

from service.api.calls import Call
from service.api.choosing import Prepared, answer, demand_of
from service.api.context import Services
from service.api.fields import UNSUPPORTED, drop_neutral, validate
from service.api.outputs import CompletionShape, Echo, Frame, RunningUsage
from service.api.prompts import PromptReader
from service.api.schemas import CompletionBody, SamplingBody, StreamOptions
from service.api.translate import Translator
from service.inputs.tokens import TokenCodec
from service.types.errors import InvalidRequest
from service.types.request import GenerationRequest

if TYPE_CHECKING:
    from service.schedulers.router import ServedVersion

ROUTE = "/v1/completions"
FIELDS = frozenset(CompletionBody.model_fields)


def parse(data: dict[str, Any]) -> CompletionBody:
    """The checked body. Raises the 400 failures that need no model."""
    return validate(CompletionBody, drop_neutral(data, UNSUPPORTED, FIELDS))


async def complete(services: Services, request: Request) -> Response:
    """The endpoint."""
    body = parse(await services.read(request))

    async def prepare(call: Call, served: ServedVersion) -> Prepared:
        limits = services.settings.limits
        prompts = await PromptReader(served, services.renderer, limits).prompts(body.prompt)
        requests = Translator(served, call, limits).completion(body, prompts)
        frame = frame_of(call, served, body, requests)
        echoes = _echoes(body, prompts, served.codec) if body.echo else None
        shape = CompletionShape(frame, len(requests), body.logprobs, echoes)
        return Prepared(requests, shape, body.n or 1, bool(body.stream), frame.usage_in_stream)

    return await answer(services, request, body.model, demand_of(body.model, body.cost), prepare)


def frame_of(call: Call, served: ServedVersion, body: SamplingBody, requests: Sequence[GenerationRequest]) -> Frame:
    """What surrounds every part of the answer. Raises InvalidRequest for stream options that contradict each other."""
    options = body.stream_options or StreamOptions()
    if options.continuous_usage_stats and not options.include_usage:
        raise InvalidRequest(
            "`stream_options.continuous_usage_stats` needs `include_usage`: give both.", param="stream_options.continuous_usage_stats"
        )
    with_usage = bool(body.stream and options.include_usage)
    running = RunningUsage([len(request.prompt) for request in requests]) if with_usage and options.continuous_usage_stats else None
    return Frame(call.request_id, served.name, served.codec, with_usage, running)


def _echoes(body: CompletionBody, prompts: list[list[int]], codec: TokenCodec) -> list[Echo]:
    given = [body.prompt] if isinstance(body.prompt, str) else body.prompt
    echoes: list[Echo] = []
    for index, ids in enumerate(prompts):
        text = given[index] if isinstance(given[index], str) else codec.decode(ids, skip_special=False)
        echoes.extend([Echo(str(text), tuple(ids))] * (body.n or 1))
    return echoes
