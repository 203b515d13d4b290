"""From a request to its version and its answer: the version named or, for `auto`, the first of those chosen that the request fits.

It does not know bodies or how a version is chosen. Invariant: a version is loaded only for a request that is right in every other way.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, NamedTuple

from fastapi import Request, Response

from service.api.calls import Call, call_of
from service.api.context import Deferred, Services
from service.api.delivery import Answer
from service.api.outputs import Shape
from service.schedulers.choice import Demand
from service.schedulers.router import AUTO
from service.types.errors import ContextLengthExceeded, InvalidRequest, ModelNotFound
from service.types.request import GenerationRequest

if TYPE_CHECKING:
    from service.schedulers.router import ServedVersion


class Prepared(NamedTuple):
    """What a body became for one version: the requests to submit, and how their streams are shown. `n` choices share a prompt."""

    requests: list[GenerationRequest]
    shape: Shape
    n: int
    stream: bool
    include_usage: bool


Prepare = Callable[[Call, "ServedVersion"], Awaitable[Prepared]]


def demand_of(model: str | None, cost: str | None, images: bool = False) -> Demand:
    """What a body asks of the rule. Raises InvalidRequest where a cost is given for a version that is named."""
    if cost is not None and model != AUTO:
        raise InvalidRequest("`cost` is for the model `auto`, which chooses by it.", param="cost")
    return Demand(images, cost or "")


async def answer(services: Services, request: Request, model: str | None, demand: Demand, prepare: Prepare) -> Response:
    """Choose, prepare, load if need be, submit. Raises the failures of each."""
    call = call_of(request.scope)
    choices = services.router.choose(model, demand)
    for choice in choices:
        call.served, call.choice = choice.version, choice.reason
        try:
            prepared = await prepare(call, choice.version)
        except ContextLengthExceeded:
            if choice is choices[-1]:
                raise
            continue
        await services.router.hold(choice)
        streams = services.router.submit(prepared.requests)
        shown = Answer(call, streams, prepared.shape, prepared.n, prepared.include_usage)
        return Deferred(shown.send_stream if prepared.stream else shown.send_whole)
    raise ModelNotFound("No version is served here.", param="model")
