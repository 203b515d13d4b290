"""The one door for the API: names to versions, requests to streams, health and readiness of all versions.

It does not know HTTP or what happens inside a loop. Invariants: a name means one version for the life of the process; a group of requests
enters one version as a whole or not at all.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from collections.abc import Sequence as Requests
from dataclasses import dataclass
from typing import TYPE_CHECKING

from service.checkpoints.names import artifact_name
from service.schedulers.loop import Identity, Loop
from service.schedulers.streams import Stream
from service.telemetry import Telemetry
from service.types.errors import InvalidRequest, ModelNotFound
from service.types.plan import Backend, BackendInfo
from service.types.request import GenerationRequest
from service.types.settings import SchedulerSettings

if TYPE_CHECKING:
    from service.checkpoints.manifest import Manifest
    from service.inputs.tokens import TokenCodec

STABLE = "stable"


@dataclass(frozen=True, slots=True)
class Model:
    """One model to serve: its served name, what its directory says, its tokenizer, and the backend that will run it."""

    name: str
    manifest: Manifest
    codec: TokenCodec
    backend: Backend


@dataclass(frozen=True, slots=True)
class ServedVersion:
    """A version as clients see it. `created` is the Unix time in seconds at which the process took it in; `aliases` name it too."""

    name: str
    artifact: str
    manifest: Manifest
    codec: TokenCodec
    aliases: tuple[str, ...]
    created: int
    loop: Loop

    @property
    def info(self) -> BackendInfo | None:
        """What the worker says of itself, once it is ready."""
        return self.loop.info

    @property
    def ready(self) -> bool:
        """Does it accept requests now?"""
        return self.loop.state == "ready"


@dataclass(frozen=True, slots=True)
class VersionHealth:
    """One version's worker: `state` of the loop or, when that is fine, of the worker; seconds of silence; restarts so far."""

    artifact: str
    state: str
    silent_s: float
    restarts: int


class Router:
    """All versions of the process. The first model is the default."""

    def __init__(
        self,
        models: Requests[Model],
        settings: SchedulerSettings,
        telemetry: Telemetry,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if not models:
            raise InvalidRequest("There is no model to serve.")
        names = _names(models)
        created = int(time.time())
        self._by_name: dict[str, ServedVersion] = {}
        versions = []
        for index, model in enumerate(models):
            manifest = model.manifest
            artifact = artifact_name(model.manifest, model.name)
            loop = Loop(Identity(artifact, manifest.digest, manifest.spec, model.codec), model.backend, settings, telemetry, clock)
            mine = tuple(name for name, owner in names.items() if owner == index)
            aliases = tuple(name for name in mine if name not in (model.name, artifact))
            version = ServedVersion(model.name, artifact, manifest, model.codec, aliases, created, loop)
            versions.append(version)
            self._by_name.update(dict.fromkeys(mine, version))
        self._versions = tuple(versions)

    def resolve(self, name: str | None) -> ServedVersion:
        """The version that a request means; None is the default. Raises ModelNotFound."""
        if name is None:
            return self._versions[0]
        version = self._by_name.get(name)
        if version is None:
            raise ModelNotFound(f"The model `{name[:100]}` is not served here.", param="model")
        return version

    def versions(self) -> tuple[ServedVersion, ...]:
        """Every version, the default first."""
        return self._versions

    def submit(self, requests: Requests[GenerationRequest]) -> list[Stream]:
        """Accept all requests (of one version), or none; a stream each, in their order.

        Raises ModelNotFound, InvalidRequest (ContextLengthExceeded, UnsupportedField), QueueFull or Unavailable.
        """
        names = {request.version for request in requests}
        if len(names) != 1:
            raise InvalidRequest("The sequences of a request must ask for one version.")
        return self.resolve(names.pop()).loop.submit(requests)

    def ready(self) -> bool:
        """True when the default version accepts requests."""
        return self._versions[0].ready

    def health(self) -> tuple[VersionHealth, ...]:
        """The state of every version's worker, in the order of `versions()`."""
        return tuple(_health(version) for version in self._versions)

    async def start(self) -> None:
        """Start all workers; returns when all are ready. Raises StartupError or Unavailable."""
        await asyncio.gather(*(version.loop.start() for version in self._versions))

    async def drain(self, seconds: float) -> None:
        """Refuse what is new and let what runs end within `seconds`; the rest is ended with an error."""
        for version in self._versions:
            version.loop.refuse()
        await asyncio.gather(*(version.loop.drain(seconds) for version in self._versions))

    async def close(self) -> None:
        """End everything and stop the workers; idempotent."""
        await asyncio.gather(*(version.loop.close() for version in self._versions))


def _names(models: Requests[Model]) -> dict[str, int]:
    """Each name and the index of the model it means: served names first, then artifacts, lines and `stable`."""
    names: dict[str, int] = {}
    for index, model in enumerate(models):
        if names.setdefault(model.name, index) != index:
            raise InvalidRequest(f"Two models are called {model.name}.")
    for index, model in enumerate(models):
        names.setdefault(artifact_name(model.manifest, model.name), index)
        if model.manifest.line:
            number = model.manifest.line.removeprefix("v")
            names.setdefault(f"v{number}", index)
            names.setdefault(number, index)
    names.setdefault(STABLE, 0)
    return names


def _health(version: ServedVersion) -> VersionHealth:
    worker = version.loop.backend.health()
    state = version.loop.state
    return VersionHealth(version.artifact, worker.state if state in ("ready", "draining") else state, worker.silent_s, worker.restarts)
