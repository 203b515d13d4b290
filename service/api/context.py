"""What every endpoint of the app is given, and the two ways an endpoint answers.

It does not know routes. Invariant: bodies are read and parsed in one place, and every JSON answer is encoded here.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import msgspec
from fastapi import Request, Response

from service.api.bodies import read_json
from service.api.calls import NO_VERSION, Call, call_of
from service.api.exchange import Receive, Scope, Send
from service.api.images import ImageReader
from service.inputs.templates import TemplateRenderer
from service.telemetry import Telemetry
from service.types.errors import QueueFull, RequestCancelled, ServiceError
from service.types.settings import HttpSettings, TierChoice

if TYPE_CHECKING:
    from service.schedulers.router import Router, ServedVersion


@dataclass(slots=True)
class Services:
    """The rooms below, as the endpoints see them. `draining` is set by the server when it is told to stop."""

    router: Router
    telemetry: Telemetry
    settings: HttpSettings
    renderer: TemplateRenderer
    images: ImageReader
    tier: TierChoice | None = None
    draining: bool = False

    async def read(self, request: Request) -> dict[str, Any]:
        """The body of a request as a JSON object."""
        return await read_json(request.scope, request.receive, self.settings.limits)

    def resolve(self, request: Request, name: str | None) -> tuple[Call, ServedVersion]:
        """The call and the version that will answer it. Raises ModelNotFound."""
        call = call_of(request.scope)
        call.served = self.router.resolve(name)
        return call, call.served

    def note_refusal(self, call: Call, error: ServiceError) -> None:
        """Count a request that this room refused (full queues and workers are counted where they are noticed)."""
        call.outcome = call.outcome or error.code
        if call.method != "POST" or error.status >= 500 or error.status in (QueueFull.status, RequestCancelled.status):
            return
        info = call.served.info if call.served is not None else None
        version = call.served.artifact if call.served is not None else NO_VERSION
        labels = (version, info.tier if info is not None else NO_VERSION, info.device if info is not None else NO_VERSION)
        self.telemetry.version(*labels).value("admission_rejections_total", error.code).add()


class JsonAnswer(Response):
    """A value as JSON."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        """Encode with msgspec, which refuses what is not JSON."""
        return msgspec.json.encode(content)


class Deferred(Response):
    """An answer that writes itself when the framework calls it, with the connection in its hands."""

    def __init__(self, write: Callable[[Scope, Receive, Send], Awaitable[None]]) -> None:
        super().__init__()
        self._write = write

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Write the answer."""
        await self._write(scope, receive, send)
