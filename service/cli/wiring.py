"""Joins the rooms for `deepseek-serve`: address, checkpoints, workers, router and HTTP application, from settings to the last signal.

The only file that knows both the schedulers and the engine. Invariants: the address is bound before anything is loaded; whatever ends the
command, every worker is stopped.
"""

from __future__ import annotations

import asyncio
import gc
import socket
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from service.api.app import build_app
from service.api.server import bind
from service.api.server import serve as serve_http
from service.checkpoints.lock import lock_differences
from service.checkpoints.long_context import adapt
from service.checkpoints.manifest import Manifest, read_manifest
from service.checkpoints.registry import Registry
from service.cli.budget import plan_demand, share_kv
from service.cli.ending import warn
from service.cli.report import LoadProgress, StartTimes, client_url, example_request, memory_table, parent_memory_line, tier_line
from service.config.load import PROGRAM, ServeSettings
from service.config.machine import threads_note
from service.engine.backend_choice import choose_backend, graph_lacks
from service.engine.memory import available_bytes
from service.engine.supervisor import Blank, WorkerBackend
from service.inputs.tokens import TokenCodec
from service.processes import ChildProcess
from service.schedulers.router import Model, Router
from service.telemetry import Telemetry, log_event
from service.types.errors import CheckpointError, SettingsError, StartupError, Unavailable
from service.types.plan import LoadRequest
from service.types.settings import ModelSource

INTERRUPTED = 130


async def serve(settings: ServeSettings, blank: Blank, times: StartTimes) -> int:
    """Serve until a signal; returns the exit code. `blank` is a worker for the first model. Raises StartupError."""
    if note := threads_note(settings.engine.threads):
        warn(PROGRAM, note)
    listener = bind(settings.http)
    try:
        progress = LoadProgress()
        try:
            models = build_models(settings, blank, progress)
            times.mark("models")
            tier = settings.tier
            telemetry = Telemetry(settings.http.metrics_compat, (tier.how, tier.flags) if tier is not None else ("detected", ""))
            fleet = settings.fleet
            if fleet.load == "demand" and not fleet.memory_bytes:
                fleet = replace(fleet, memory_bytes=available_bytes())
            router = Router(models, settings.scheduler, telemetry, fleet=fleet)
            return await _serve(settings, router, telemetry, listener, (times, progress))
        finally:
            progress.close()
    finally:
        listener.close()


def build_models(settings: ServeSettings, blank: Blank | None, progress: LoadProgress) -> list[Model]:
    """Read every model directory (not its weights) and give each a backend. Raises StartupError."""
    adapted = _adapted([(source, read_manifest(Path(source.directory))) for source in settings.models], settings)
    served = _computed(adapted, settings)
    plans = _plan(settings, [manifest for _, manifest in served])
    models = []
    for index, ((source, manifest), (kv_bytes, planned_bytes)) in enumerate(zip(served, plans, strict=True)):
        choice = choose_backend(manifest.spec, settings.engine, settings.scheduler.batch_size)
        log_event("backend_chosen", version=source.name, backend=choice.backend, reason=choice.reason)
        request = replace(load_request(settings, manifest, kv_bytes), backend=choice.backend)
        _report_lock(manifest)

        def moved(phase: str, fraction: float, name: str = source.name) -> None:
            progress.update(name, phase, fraction)

        backend = WorkerBackend(request, settings.engine, child=_fitting(blank, choice.backend) if index == 0 else None, on_progress=moved)
        models.append(Model(source.name, manifest, TokenCodec.load(manifest.directory), backend, planned_bytes))
    return models


def _computed(models: list[tuple[ModelSource, Manifest]], settings: ServeSettings) -> list[tuple[ModelSource, Manifest]]:
    """The models without those that an exported graph, where it was asked for, does not compute; the user hears of each.

    None is left out that was named, nor where none would be left: what cannot be served is refused then.
    """
    if settings.named or settings.engine.backend != "onnx":
        return models
    lacking = {source.name: gap for source, manifest in models if (gap := graph_lacks(manifest.spec, settings.engine))}
    if len(lacking) == len(models):
        return models
    if lacking:
        reasons = ", ".join(f"{name} ({gap})" for name, gap in lacking.items())
        said = f"left out: {reasons}, which the ONNX graph does not compute; --backend torch serves every line"
        warn(PROGRAM, said)
    return [(source, manifest) for source, manifest in models if source.name not in lacking]


def _fitting(blank: Blank | None, backend: str) -> ChildProcess | None:
    """The child if its libraries are those of `backend`; another one is ended, since nobody will need it."""
    if blank is None or blank.backend == backend:
        return blank.child if blank is not None else None
    blank.child.kill("other_backend")
    return None


def _adapted(models: list[tuple[ModelSource, Manifest]], settings: ServeSettings) -> list[tuple[ModelSource, Manifest]]:
    """The models with their attention as it is to be served. Raises SettingsError, which names the model that cannot be served so.

    Of models that come because nothing was named, those behind the default are left out instead; the user hears of each.
    """
    served: list[tuple[ModelSource, Manifest]] = []
    lacking: dict[str, list[str]] = {}
    for source, manifest in models:
        try:
            served.append((source, replace(manifest, spec=adapt(manifest.spec, settings.attention))))
        except SettingsError as error:
            if settings.named or not served:
                raise SettingsError(f"{source.name}: {error}") from None
            lacking.setdefault(str(error), []).append(source.name)
    for reason, names in lacking.items():
        warn(PROGRAM, f"left out: {', '.join(names)}: {reason}")
    return served


def _plan(settings: ServeSettings, manifests: Sequence[Manifest]) -> list[tuple[int, int]]:
    """(bytes of KV blocks, bytes in all) of each version; those that are loaded together share what the machine leaves."""
    if settings.fleet.load == "demand":
        return plan_demand(manifests, settings.engine, settings.scheduler, settings.fleet.memory_bytes or available_bytes())
    return [(kv_bytes, 0) for kv_bytes in share_kv(manifests, settings.engine, settings.scheduler, available_bytes())]


def load_request(settings: ServeSettings, manifest: Manifest, kv_bytes: int) -> LoadRequest:
    """What a worker is told to load."""
    engine, scheduler = settings.engine, settings.scheduler
    return LoadRequest(
        directory=str(manifest.directory.absolute()),
        dtype=engine.dtype,
        device=engine.device,
        threads=engine.threads,
        kv_bytes=kv_bytes,
        max_rows=scheduler.batch_size,
        max_step_tokens=scheduler.step_tokens,
        context_tokens=engine.context_tokens,
        quantize=engine.quantize,
        quantize_cache=engine.quantize_cache,
        quantize_cache_bytes=engine.quantize_cache_bytes,
        deterministic=engine.deterministic,
        kv_cache_dtype=engine.kv_cache_dtype,
        cuda_graphs=engine.cuda_graphs,
        image_cache_bytes=engine.image_cache_bytes,
        machine_limits=(engine.machine_bytes_per_s, engine.machine_flops_per_s),
        attention=settings.attention,
    )


async def _serve(
    settings: ServeSettings, router: Router, telemetry: Telemetry, listener: socket.socket, display: tuple[StartTimes, LoadProgress]
) -> int:
    times, progress = display
    url = client_url(settings.http, listener.getsockname()[1])
    if settings.tier is not None:
        print(tier_line(settings.tier))
    print(f"loading {', '.join(version.name for version in router.versions())} for {url}", flush=True)
    loading = asyncio.create_task(router.start(), name="loading")
    application = build_app(router, telemetry, settings.http, settings.tier)
    serving = asyncio.create_task(serve_http(application, listener), name="serving")
    tasks = [loading, serving]
    try:
        await asyncio.wait({loading, serving}, return_when=asyncio.FIRST_COMPLETED)
        if not loading.done() or application.services.draining:
            await serving
            return INTERRUPTED
        _raise_of(loading)
        times.mark("load")
        progress.close()
        _announce(router, telemetry, times)
        recorded = await _record(settings, router)
        tasks.append(asyncio.create_task(_keep_record(settings, router, recorded), name="recording"))
        _invite(router, url, keyed=bool(settings.http.api_keys))
        _settle_collector()
        await serving
        return 0
    finally:
        await _end(tasks)
        await router.close()


async def _keep_record(settings: ServeSettings, router: Router, recorded: int) -> None:
    """Record anew whenever more than the `recorded` versions were loaded at least once, until it is cancelled."""
    while True:
        await router.loaded()
        if sum(version.was_ready for version in router.versions()) > recorded:
            recorded = await _record(settings, router)


async def _record(settings: ServeSettings, router: Router) -> int:
    """Keep in the registry what was ready so far, or in the run that is restored; returns how many.

    A registry that cannot be written is reported and no reason to end.
    """
    good = [(version.name, version.manifest) for version in router.versions() if version.was_ready or settings.restored]
    if settings.registry is not None:
        try:
            await asyncio.to_thread(Registry(settings.registry).mark_served, good)
        except CheckpointError as error:
            log_event("not_recorded", reason=str(error))
    return len(good)


def _report_lock(manifest: Manifest) -> None:
    """Say where this environment differs from the one that a version was published with."""
    differences = lock_differences(dict(manifest.lock))
    if differences:
        log_event("environment_differs", version=manifest.directory.name, digest=manifest.digest, published_with=differences)


def _settle_collector() -> None:
    """What lives now lives for ever: the collector need not look at it again, and what a token allocates is freed by its counts."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 50)


def _raise_of(loading: asyncio.Task[None]) -> None:
    try:
        loading.result()
    except Unavailable as failure:
        raise StartupError(f"the worker died each time that it loaded ({failure.message.rstrip('.')}); its log above says why.") from None


async def _end(tasks: Sequence[asyncio.Task[None]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def _announce(router: Router, telemetry: Telemetry, times: StartTimes) -> None:
    """Phases and budget; the phases into the metrics too."""
    total_s = times.total_s
    for version in router.versions():
        info = version.info
        if info is None:
            continue
        metrics = telemetry.version(version.artifact, info.tier, info.device)
        for phase, seconds in (*times.phases_s, ("ready", total_s)):
            metrics.value("startup_seconds", f"command_{phase}").set(seconds)
        print(memory_table(version.artifact, info, version.manifest.spec.context_tokens))
    waiting = [version.name for version in router.versions() if version.info is None]
    if waiting:
        print(f"loaded when asked for: {', '.join(waiting)}")
    print(parent_memory_line())
    first = router.versions()[0]
    print(times.line(first.info.phases_s if first.info else ()))


def _invite(router: Router, url: str, *, keyed: bool) -> None:
    """The address and a request to paste."""
    names = [version.name for version in router.versions()]
    print(f"serving {', '.join(names)} on {url}")
    print("try: " + example_request(url, names[0], keyed), flush=True)
