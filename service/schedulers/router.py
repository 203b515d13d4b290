"""The one door for the API: names to versions, requests to streams, health and readiness of all versions.

It does not know HTTP or what happens inside a loop. Invariants: a name means one version for the life of the process; a group of requests
enters one version as a whole or not at all.
"""

from __future__ import annotations

import asyncio
import functools
import time
from collections.abc import Callable
from collections.abc import Sequence as Requests
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from service.checkpoints.names import artifact_name, version_key
from service.schedulers.choice import Demand, Facts, rank
from service.schedulers.loop import Identity, Loop
from service.schedulers.residency import Residency, Resident
from service.schedulers.streams import Stream
from service.telemetry import Telemetry
from service.types.errors import InvalidRequest, ModelNotFound
from service.types.plan import Backend, BackendInfo
from service.types.request import GenerationRequest
from service.types.settings import FleetSettings, SchedulerSettings

if TYPE_CHECKING:
    from service.checkpoints.manifest import Manifest
    from service.inputs.tokens import TokenCodec

STABLE, AUTO = "stable", "auto"


@dataclass(frozen=True, slots=True)
class Model:
    """One model to serve: its served name, what its directory says, its tokenizer, and the backend that will run it.

    `planned_bytes` is the memory that it takes while it is loaded.
    """

    name: str
    manifest: Manifest
    codec: TokenCodec
    backend: Backend
    planned_bytes: int = 0


@dataclass(frozen=True, slots=True)
class ServedVersion:
    """A version as clients see it. `created` is the Unix time in seconds at which the process took it in; `aliases` name it too."""

    name: str
    artifact: str
    manifest: Manifest
    codec: TokenCodec
    aliases: tuple[str, ...]
    created: int
    resident: Resident

    @property
    def loop(self) -> Loop:
        """Its loop; another one after it was unloaded."""
        return self.resident.loop

    @property
    def info(self) -> BackendInfo | None:
        """What the worker says of itself, once it is ready."""
        return self.loop.info

    @property
    def ready(self) -> bool:
        """Does it accept requests now?"""
        return self.loop.state == "ready"

    @property
    def was_ready(self) -> bool:
        """Was it loaded at least once?"""
        return self.resident.was_ready


@dataclass(frozen=True, slots=True)
class Choice:
    """A version for a request; `reason` says why `auto` means it, None where the request named it."""

    version: ServedVersion
    reason: str | None = None


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
        fleet: FleetSettings | None = None,
    ) -> None:
        if not models:
            raise InvalidRequest("There is no model to serve.")
        names = _names(models)
        created = int(time.time())
        self._telemetry = telemetry
        self._fleet = fleet or FleetSettings()
        self._residency = Residency(self._fleet.memory_bytes, self._fleet.load_wait_s)
        self._by_name: dict[str, ServedVersion] = {}
        versions = []
        for index, model in enumerate(models):
            manifest = model.manifest
            artifact = artifact_name(manifest, model.name)
            identity = Identity(artifact, manifest.digest, manifest.spec, model.codec)
            make = functools.partial(Loop, identity, model.backend, settings, telemetry, clock)
            resident = self._residency.add(artifact, make, model.planned_bytes)
            mine = tuple(name for name, owner in names.items() if owner == index)
            aliases = tuple(name for name in mine if name not in (model.name, artifact))
            version = ServedVersion(model.name, artifact, manifest, model.codec, aliases, created, resident)
            versions.append(version)
            self._by_name.update(dict.fromkeys(mine, version))
        self._versions = tuple(versions)
        for version in self._first_loaded():
            version.loop.state = "loading"

    def resolve(self, name: str | None) -> ServedVersion:
        """The version that a request means; None is the default. Raises ModelNotFound."""
        if name is None:
            return self._versions[0]
        version = self._by_name.get(name)
        if version is None:
            raise ModelNotFound(f"The model `{name[:100]}` is not served here.", param="model")
        return version

    def choose(self, name: str | None, demand: Demand) -> list[Choice]:
        """The versions for a request, best first: the one named, or for `auto` those that the 3C rule names.

        Of several the caller takes the first whose context the request fits. Raises ModelNotFound or InvalidRequest.
        """
        if name != AUTO or self._by_name[AUTO].name == AUTO:
            return [Choice(self.resolve(name))]
        info = self._versions[0].info
        asked = demand if demand.cost else replace(demand, cost=self._fleet.cost)
        ranked = rank([_facts(version) for version in self._versions], asked, info.tier if info is not None else "none")
        if not ranked:
            raise InvalidRequest("No version that is served here reads images.", param="model")
        return [Choice(self._versions[one.index], one.reason) for one in ranked]

    async def hold(self, choice: Choice) -> None:
        """Return when the version accepts requests; submit at once. Counts the choice. Raises Unavailable when it is not loaded in time."""
        await self._residency.hold(choice.version.resident)
        if choice.reason is not None:
            info = choice.version.info
            labels = (info.tier, info.device) if info is not None else ("none", "none")
            self._telemetry.version(choice.version.artifact, *labels).value("version_choices_total", choice.reason).add()

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
        """True when the default version accepts requests, is loaded when one comes, or is being loaded again for one that waits."""
        default = self._versions[0]
        return default.loop.state in ("ready", "unloaded") or (default.loop.state == "loading" and default.was_ready)

    def health(self) -> tuple[VersionHealth, ...]:
        """The state of every version's worker, in the order of `versions()`."""
        return tuple(_health(version) for version in self._versions)

    async def start(self) -> None:
        """Start the workers of all versions, or of the default alone; returns when they are ready. Raises StartupError or Unavailable."""
        await asyncio.gather(*(self._residency.start(version.resident) for version in self._first_loaded()))

    async def loaded(self) -> None:
        """Return when a version was loaded since the last call; for one caller."""
        await self._residency.loaded()

    async def drain(self, seconds: float) -> None:
        """Refuse what is new and let what runs end within `seconds`; the rest is ended with an error."""
        for version in self._versions:
            version.loop.refuse()
        await asyncio.gather(*(version.loop.drain(seconds) for version in self._versions))

    async def close(self) -> None:
        """End everything and stop the workers; idempotent."""
        await self._residency.close()

    def _first_loaded(self) -> tuple[ServedVersion, ...]:
        return self._versions[:1] if self._fleet.load == "demand" else self._versions


def _names(models: Requests[Model]) -> dict[str, int]:
    """Each name and the index of the model it means: served names first, then artifacts, lines and `stable`."""
    names: dict[str, int] = {}
    for index, model in enumerate(models):
        if names.setdefault(model.name, index) != index:
            raise InvalidRequest(f"Two models are called {model.name}.")
    for index, model in enumerate(models):
        names.setdefault(artifact_name(model.manifest, model.name), index)
    # A line means its newest patch; of equal ones the first.
    for index, model in sorted(enumerate(models), key=lambda entry: version_key(entry[1].manifest.version), reverse=True):
        for number in (model.manifest.version, model.manifest.line):
            if number:
                names.setdefault(f"v{number.removeprefix('v')}", index)
                names.setdefault(number.removeprefix("v"), index)
    names.setdefault(STABLE, 0)
    names.setdefault(AUTO, 0)
    return names


def _facts(version: ServedVersion) -> Facts:
    spec, info = version.manifest.spec, version.info
    context = info.context_tokens if info is not None else spec.context_tokens
    line = version.manifest.line
    return Facts(version.name, line and line.removeprefix("v"), version.manifest.modalities, context, spec.flops(1, 0.0))


def _health(version: ServedVersion) -> VersionHealth:
    worker = version.loop.backend.health()
    state = version.loop.state
    return VersionHealth(version.artifact, worker.state if state in ("ready", "draining") else state, worker.silent_s, worker.restarts)
