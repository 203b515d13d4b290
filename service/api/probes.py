"""What operators ask: /health, /live, /ready, /metrics, and the index of routes.

It does not know what the states come from. Invariant: none of these waits for a worker; metrics are formatted off the event loop.
"""

from __future__ import annotations

import asyncio

from fastapi import Request, Response

from service import __version__
from service.api.context import JsonAnswer, Services

OPENMETRICS = "application/openmetrics-text"


async def health(services: Services, request: Request) -> Response:
    """200 while the worker of every loaded version is sound; 503 names the state of each.

    A version that is loaded because it was asked for is no fault; while the service itself starts it is.
    """
    del request
    versions = services.router.health()
    fine = ("ready", "unloaded", "loading") if services.router.ready() else ("ready", "unloaded")
    sound = all(version.state in fine for version in versions)
    states = [
        {"version": one.artifact, "state": one.state, "silent_s": round(one.silent_s, 3), "restarts": one.restarts} for one in versions
    ]
    tier = services.tier
    shown = {"tier": {"name": tier.name, "how": tier.how, "flags": tier.flags}} if tier is not None else {}
    return JsonAnswer({"status": "ok" if sound else "unhealthy", **shown, "versions": states}, status_code=200 if sound else 503)


async def live(services: Services, request: Request) -> Response:
    """200 while this process answers."""
    del services, request
    return JsonAnswer({"status": "ok"})


async def ready(services: Services, request: Request) -> Response:
    """200 when traffic may come."""
    del request
    if services.draining:
        return JsonAnswer({"status": "draining"}, status_code=503)
    if not services.router.ready():
        return JsonAnswer({"status": "loading"}, status_code=503)
    return JsonAnswer({"status": "ok"})


async def metrics(services: Services, request: Request) -> Response:
    """Prometheus text, or OpenMetrics when asked for."""
    openmetrics = OPENMETRICS in request.headers.get("accept", "")
    body, content_type = await asyncio.to_thread(services.telemetry.snapshot().render, openmetrics)
    return Response(body, headers={"content-type": content_type})


def index_of(routes: list[str]) -> dict[str, object]:
    """The answer of GET /."""
    return {"service": "deepseek-service", "program_version": __version__, "routes": routes}
