"""GET /v1/models and /v1/models/{id}: what is served, one entry for each version and alias.

It does not know how versions are chosen. Invariant: every id listed here resolves.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fastapi import Request, Response

from service.api.context import JsonAnswer, Services
from service.api.translate import context_of

if TYPE_CHECKING:
    from service.schedulers.router import ServedVersion


async def list_models(services: Services, request: Request) -> Response:
    """Every version and alias."""
    del request
    versions = services.router.versions()
    entries = [_entry(served, name) for served in versions for name in (served.name, *served.aliases)]
    return JsonAnswer({"object": "list", "data": entries})


async def get_model(services: Services, request: Request) -> Response:
    """One version or alias. Raises ModelNotFound."""
    name = request.path_params["name"]
    _, served = services.resolve(request, name)
    return JsonAnswer(_entry(served, name))


def _entry(served: ServedVersion, name: str) -> dict[str, Any]:
    info = served.info
    return {
        "id": name,
        "object": "model",
        "created": int(served.created),
        "owned_by": "deepseek-service",
        "root": served.name,
        "version": served.artifact,
        "digest": served.manifest.digest,
        "context_length": context_of(served),
        "max_model_len": context_of(served),
        "modalities": list(served.manifest.modalities),
        "tier": info.tier if info is not None else None,
        "device": info.device if info is not None else None,
        "backend": info.backend if info is not None else None,
        "quantize": info.quantize if info is not None else None,
        "kv_cache_dtype": (info.kv_cache_dtype or info.dtype) if info is not None else None,
        "ready": served.ready,
    }
