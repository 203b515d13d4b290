"""One load against one running server: from flags or a scenario file to a plan, and from the plan to a row of what was measured.

It joins the load generator with flags and knows nothing of our server. Invariant: a plan says everything about the load; the same plan
against another server asks for the same.
"""

from __future__ import annotations

import asyncio
import json
import os
import platform
from argparse import Namespace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import service
from service.cli.benchmark_tables import progress_bar
from service.loadgen.arrivals import Load
from service.loadgen.drive import Drive, Measured
from service.loadgen.prompts import PromptPlan
from service.loadgen.scenario import Levels, Ready, Scenario, read_scenario
from service.loadgen.senders import RawSender, Sender
from service.loadgen.summary import Targets, summarise
from service.loadgen.watch import SendFailure
from service.processor import cpu_name
from service.types.errors import StartupError

# Flags that make the shape of a request, those of the load, and what of the shape a row repeats.
SHAPE = ("endpoint", "prompt_tokens", "shared_prefix_tokens", "output_tokens", "temperature", "ignore_eos")
_LOAD = ("requests", "concurrency", "rate", "warmup", "timeout_s", "abort_share", "seed")
_ASKED = SHAPE[1:]


def is_server(url: str) -> bool:
    """Whether this is the address of a server: http or https, a host, no user name and no query."""
    try:
        parts = urlsplit(url)
        valid_port = parts.port is None or parts.port > 0
    except ValueError:
        return False
    return (
        parts.scheme in ("http", "https") and bool(parts.hostname) and valid_port and not (parts.username or parts.query or parts.fragment)
    )


def plan_load(given: Namespace, named: set[str]) -> Ready:
    """The scenario, with the flags that were given in place of what it says; or one made of flags alone. Raises ScenarioError."""
    if not given.scenario:
        shape = PromptPlan(**{name: getattr(given, name) for name in SHAPE})
        load = Load(**{name: getattr(given, name) for name in _LOAD if name != "concurrency"}, concurrency=given.concurrency or 8)
        return Ready(Scenario("", "", load, [shape], Levels(given.slo_ttft_ms, given.slo_tpot_ms)), load, [])
    ready = read_scenario(Path(given.scenario))
    changes: dict[str, Any] = {name: getattr(given, name) for name in _LOAD if name in named}
    levels = {name: getattr(given, f"slo_{name}") for name in ("ttft_ms", "tpot_ms") if f"slo_{name}" in named}
    return ready.changed(changes, levels)


async def measure_server(given: Namespace, ready: Ready, url: str, model: str) -> dict[str, Any]:
    """The row of a load against the server at `url`; its first model is asked for where neither `model` nor the load names one."""
    sender = _sender(given.client, url, given.api_key)
    try:
        nameless = any(not plan.model for plan in ready.scenario.requests)
        model = model or (await _first_model(sender, url) if nameless else "")
        with progress_bar(ready.load.requests) as progress:
            measured = await Drive(sender, ready.mix(model), ready.load, progress).run()
    finally:
        await sender.close()
    return {"kind": "benchmark", **surroundings(given.label), **_row(ready, model, measured), "url": url, "client": given.client}


def surroundings(label: str) -> dict[str, Any]:
    """When and where a row was made."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "program": service.__version__,
        "python": platform.python_version(),
        "cpu": cpu_name(),
        "cores": len(os.sched_getaffinity(0)),
        "load_average": round(os.getloadavg()[0], 2),
        "label": label,
    }


def _row(ready: Ready, model: str, measured: Measured) -> dict[str, Any]:
    scenario, load, shape = ready.scenario, ready.load, ready.scenario.requests[0]
    asked = {name: getattr(shape, name) for name in _ASKED}
    return {
        "scenario": scenario.name,
        "changes": ready.changes,
        "endpoint": shape.endpoint,
        "model": model or ", ".join(sorted({plan.model for plan in scenario.requests})),
        "mode": load.mode,
        "rate": load.rate or None,
        "concurrency": None if load.mode == "open" else load.concurrency,
        "warmup": load.warmup,
        "seed": load.seed,
        "asked": {**asked, "abort_share": load.abort_share},
        **summarise(measured, Targets(scenario.slo.ttft_ms, scenario.slo.tpot_ms)),
        "failures": measured.failures,
    }


def _sender(client: str, url: str, api_key: str) -> Sender:
    if client == "httpx":
        from service.loadgen.httpx_sender import HttpxSender

        return HttpxSender(url, api_key)
    return RawSender(url, api_key)


async def _first_model(sender: Sender, url: str) -> str:
    try:
        async with asyncio.timeout(10):
            status, body = await sender.fetch("/v1/models")
    except SendFailure as failure:
        raise StartupError(f"no server answers at {url} ({failure.detail or failure.kind}): start it or correct --url.") from None
    except TimeoutError:
        raise StartupError(f"the server at {url} does not answer within 10 s: see whether it is ready.") from None
    if status == 401:
        raise StartupError(f"the server at {url} asks for a key: give --api_key.")
    try:
        return str(json.loads(body)["data"][0]["id"])
    except (ValueError, LookupError, TypeError):
        raise StartupError(f"the server at {url} lists no models (status {status}): name one with --model.") from None
