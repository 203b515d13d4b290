"""The application: routes to endpoints, and the framework's own failures in our shape.

It does not know sockets, keys or bodies. Invariant: every route is in ROUTES, and the index, the labels of logs and the schema are
made from it.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import TYPE_CHECKING, Any, NamedTuple

from fastapi import FastAPI, Request, Response
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from service import __version__
from service.api import catalog, chat, completions, probes, tokenize
from service.api.calls import call_of
from service.api.context import JsonAnswer, Services
from service.api.errors import error_body, error_headers, public
from service.api.front import Front
from service.api.images import ImageReader
from service.api.schemas import ChatBody, CompletionBody, DetokenizeBody, TokenizeBody
from service.inputs.templates import TemplateRenderer
from service.telemetry import Telemetry
from service.types.errors import InvalidRequest, MethodNotAllowed, RouteNotFound, ServiceError
from service.types.settings import HttpSettings, TierChoice

if TYPE_CHECKING:
    from service.schedulers.router import Router

Endpoint = Callable[[Services, Request], Awaitable[Response]]


class RouteRow(NamedTuple):
    """One route: its method, path, endpoint, what it is for, and the schema of its body."""

    method: str
    path: str
    endpoint: Endpoint
    summary: str
    body: type[BaseModel] | None = None


async def _index(services: Services, request: Request) -> Response:
    del services, request
    return JsonAnswer(probes.index_of([f"{row.method} {row.path}" for row in ROUTES]))


ROUTES: tuple[RouteRow, ...] = (
    RouteRow("POST", chat.ROUTE, chat.chat, "Answer a conversation", ChatBody),
    RouteRow("POST", completions.ROUTE, completions.complete, "Continue a text", CompletionBody),
    RouteRow("GET", "/v1/models", catalog.list_models, "List versions and aliases"),
    RouteRow("GET", "/v1/models/{name:path}", catalog.get_model, "Describe one version or alias"),
    RouteRow("POST", tokenize.TOKENIZE_ROUTE, tokenize.tokenize, "Text or messages to token ids", TokenizeBody),
    RouteRow("POST", tokenize.DETOKENIZE_ROUTE, tokenize.detokenize, "Token ids to text", DetokenizeBody),
    RouteRow("GET", "/health", probes.health, "Whether every worker is sound"),
    RouteRow("GET", "/live", probes.live, "Whether the process is sound"),
    RouteRow("GET", "/ready", probes.ready, "Whether traffic may come"),
    RouteRow("GET", "/metrics", probes.metrics, "Prometheus metrics"),
    RouteRow("GET", "/", _index, "This list"),
)


class Application:
    """The ASGI app with its front, and what the server must know of it."""

    def __init__(self, front: Front, services: Services) -> None:
        self._front = front
        self.services = services

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """ASGI."""
        await self._front(scope, receive, send)


def build_app(router: Router, telemetry: Telemetry, settings: HttpSettings, tier: TierChoice | None = None) -> Application:
    """The whole HTTP application over a router. Its lifespan keeps the processes that render templates and decode images."""
    limits = settings.limits
    renderer = TemplateRenderer(limits.template_s, limits.template_bytes)
    services = Services(router, telemetry, settings, renderer, ImageReader(settings), tier)

    async def refuse(request: Request, failure: Exception) -> Response:
        error = public(failure)
        services.note_refusal(call_of(request.scope), error)
        return _error_answer(error)

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        del app
        warming = asyncio.ensure_future(_warm(services))
        try:
            yield
        finally:
            warming.cancel()
            await asyncio.gather(warming, return_exceptions=True)
            await services.renderer.close()
            await services.images.close()

    app = FastAPI(
        title="deepseek-service",
        version=__version__,
        docs_url=None,
        redoc_url=None,
        lifespan=lifespan,
        redirect_slashes=False,
        exception_handlers={HTTPException: _framework_failure, ServiceError: refuse, Exception: refuse},
    )
    for row in ROUTES:
        app.add_api_route(
            row.path,
            _bind(row.endpoint, services),
            methods=[row.method],
            summary=row.summary,
            response_model=None,
            openapi_extra=_schema(row.body),
        )
    return Application(Front(app, services, [row.path for row in ROUTES]), services)


def _bind(endpoint: Endpoint, services: Services) -> Callable[[Request], Awaitable[Response]]:
    async def answer(request: Request) -> Response:
        return await endpoint(services, request)

    return answer


@functools.cache
def _schema(body: type[BaseModel] | None) -> dict[str, Any] | None:
    if body is None:
        return None
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": body.model_json_schema()}}}}


async def _warm(services: Services) -> None:
    manifests = [version.manifest for version in services.router.versions()]
    if any(manifest.chat_template is not None for manifest in manifests):
        await services.renderer.warm()
    if any("image" in manifest.modalities for manifest in manifests):
        await services.images.warm()


async def _framework_failure(request: Request, failure: Exception) -> Response:
    """What the framework's router refuses, in our shape."""
    status = failure.status_code if isinstance(failure, HTTPException) else 500
    error: ServiceError
    if status == RouteNotFound.status:
        error = RouteNotFound(f"There is no route {request.method[:16]} {request.url.path[:100]}.")
    elif status == MethodNotAllowed.status:
        error = MethodNotAllowed(f"This route does not take {request.method[:16]}.")
    else:
        error = InvalidRequest("The request cannot be served.")
    call_of(request.scope).outcome = error.code
    answer = _error_answer(error)
    answer.headers.update(dict(failure.headers or {}) if isinstance(failure, HTTPException) else {})
    return answer


def _error_answer(error: ServiceError) -> Response:
    headers = {name.decode(): value.decode() for name, value in error_headers(error)}
    return Response(error_body(error), status_code=error.status, media_type="application/json", headers=headers)
