"""The outermost ASGI layer: request id, origin, key, one log line, and the last net under every failure.

It does not know bodies or routes' work. Invariants: every response carries `x-request-id`; nothing behind this layer runs for a caller
that may not call; a failure is answered in the one shape, and what an unexpected exception says reaches the log only.
"""

from __future__ import annotations

import asyncio
import time
import traceback
from collections.abc import Sequence

from service.api.auth import KeyRing, OriginRule, preflight_headers
from service.api.calls import NO_VERSION, Call
from service.api.context import Services
from service.api.errors import error_body, error_headers, public
from service.api.exchange import AsgiApp, Message, Receive, Scope, Send
from service.telemetry import log_event
from service.types.errors import ServiceError

UNKNOWN_ROUTE = "other"


class Front:
    """Wraps the app. `routes` are the paths that may serve as labels."""

    def __init__(self, app: AsgiApp, services: Services, routes: Sequence[str]) -> None:
        self._app = app
        self._services = services
        self._routes = frozenset(routes)
        self._keys = KeyRing(services.settings.api_keys, services.settings.metrics_key)
        self._origins = OriginRule(services.settings)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        path = scope["path"]
        call = Call(path if path in self._routes else UNKNOWN_ROUTE, scope["method"])
        scope.setdefault("state", {})["call"] = call
        extra: list[tuple[bytes, bytes]] = []

        async def respond(message: Message) -> None:
            if message["type"] == "http.response.start":
                call.status = message["status"]
                message = {**message, "headers": [*message.get("headers", ()), *call.headers(), *extra]}
            await send(message)

        try:
            headers = dict(scope["headers"])
            extra += self._origins.check(headers)
            if scope["method"] == "OPTIONS" and b"access-control-request-method" in headers:
                await respond({"type": "http.response.start", "status": 204, "headers": preflight_headers([])})
                await respond({"type": "http.response.body", "body": b""})
                return
            call.tenant = self._keys.check(path, headers)
            await self._app(scope, receive, respond)
        except Exception as failure:  # the HTTP boundary: everything ends here, reported
            await self._answer_failure(call, failure, respond)
        finally:
            self._log(call)

    async def _answer_failure(self, call: Call, failure: Exception, respond: Send) -> None:
        error = public(failure)
        if not isinstance(failure, ServiceError):
            log_event("request_failed", request_id=call.request_id, traceback="".join(traceback.format_exception(failure)))
        if not call.status:
            self._services.note_refusal(call, error)
            await respond_error(error, respond)

    def _log(self, call: Call) -> None:
        if not self._services.settings.access_log:
            return
        task = asyncio.current_task()
        if task is not None and task.cancelling() and not call.outcome:
            call.outcome = "cancelled"
        tokens = {} if call.tokens is None else {"prompt_tokens": call.tokens[0], "completion_tokens": call.tokens[1]}
        log_event(
            "request",
            request_id=call.request_id,
            method=call.method,
            route=call.route,
            status=call.status,
            outcome=call.outcome or "ok",
            version=call.served.artifact if call.served is not None else NO_VERSION,
            tenant=call.tenant,
            duration_ms=round((time.perf_counter() - call.started_s) * 1000, 3),
            **tokens,
        )


async def respond_error(error: ServiceError, respond: Send) -> None:
    """Send a whole error response."""
    body = error_body(error)
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode()), *error_headers(error)]
    await respond({"type": "http.response.start", "status": error.status, "headers": headers})
    await respond({"type": "http.response.body", "body": body})
