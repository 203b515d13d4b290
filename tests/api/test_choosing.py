"""The model `auto` over HTTP: the version, its reason in a header and a metric, prompts that need a longer context, loading on demand."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import httpx
import pytest

from service.api.app import build_app
from service.schedulers.router import Model, Router
from service.telemetry import Telemetry
from service.types.settings import FleetSettings, HttpSettings, SchedulerSettings
from tests.api.conftest import BYTE_CODEC
from tests.fakes import FakeBackend, FakeBehaviour, FakeManifest, fake_spec

Post = Any


@contextlib.asynccontextmanager
async def fleet(**settings: Any) -> AsyncIterator[tuple[httpx.AsyncClient, Router, Telemetry]]:
    """v5.2 (context 512, default), v2.3 (64) and a v2.3.1 (128), the default loaded."""
    telemetry = Telemetry()
    models = []
    for name, line, context, version in (("v5.2", "5.2", 512, "5.2"), ("old", "2.3", 64, "2.3"), ("new", "2.3", 128, "2.3.1")):
        backend = FakeBackend(behaviour=FakeBehaviour(step_s=0.001, start_s=0.0), context_tokens=context)
        spec = fake_spec(context)
        manifest = FakeManifest(replace(spec, layers=spec.layers * context), digest=f"{context:064d}", line=line, version=version)
        models.append(Model(name, manifest, BYTE_CODEC, backend, 10))  # type: ignore[arg-type]
    router = Router(models, SchedulerSettings(), telemetry, fleet=FleetSettings(memory_bytes=100, load="demand", **settings))
    await router.start()
    app = build_app(router, telemetry, HttpSettings())
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://test") as client:
        yield client, router, telemetry
    await router.close()


async def complete(client: httpx.AsyncClient, **body: Any) -> httpx.Response:
    return await client.post("/v1/completions", json={"prompt": "hi", "max_tokens": 4, **body})


async def test_auto_answers_with_its_reason() -> None:
    async with fleet() as (client, _, telemetry):
        answer = await complete(client, model="auto")
        assert answer.status_code == 200 and answer.json()["model"] == "v5.2"
        assert answer.headers["x-model-choice"] == "default" and answer.headers["x-model-version"].startswith("v5.2@")
        named = await complete(client, model="v5.2")
        assert "x-model-choice" not in named.headers
        assert 'version_choices_total{device="fake"' in telemetry.snapshot().render()[0].decode()


@pytest.mark.parametrize(
    ("prompt", "model", "reason"), [("x" * 50, "old", "cost"), ("x" * 100, "new", "complexity"), ("x" * 300, "v5.2", "complexity")]
)
async def test_low_cost_takes_the_cheapest_that_the_prompt_fits(prompt: str, model: str, reason: str) -> None:
    async with fleet() as (client, router, _):
        answer = await complete(client, model="auto", cost="low", prompt=prompt)
        assert (answer.status_code, answer.json()["model"], answer.headers["x-model-choice"]) == (200, model, reason)
        assert router.resolve(model).ready and [version.ready for version in router.versions()].count(True) <= 2


async def test_the_servers_cost_applies_where_a_request_says_nothing() -> None:
    async with fleet(cost="low") as (client, _, _):
        assert (await complete(client, model="auto")).json()["model"] == "old"
        assert (await complete(client, model="auto", cost="any")).json()["model"] == "v5.2"
        assert (await complete(client)).json()["model"] == "v5.2"


async def test_a_prompt_too_long_for_all_is_refused_and_loads_nothing() -> None:
    async with fleet() as (client, router, _):
        answer = await complete(client, model="auto", cost="low", prompt="x" * 600)
        assert answer.status_code == 400 and answer.json()["error"]["code"] == "context_length_exceeded"
        assert [version.ready for version in router.versions()] == [True, False, False]


async def test_cost_is_for_auto() -> None:
    async with fleet() as (client, _, _):
        for body in ({"model": "v5.2"}, {}):
            answer = await complete(client, cost="low", **body)
            assert answer.status_code == 400 and answer.json()["error"]["param"] == "cost"
        assert (await complete(client, model="auto", cost="free")).status_code == 400


async def test_a_line_means_its_newest_patch_and_the_list_names_all() -> None:
    async with fleet() as (client, _, _):
        for name, model in (("v2.3", "new"), ("2.3.1", "new"), ("old", "old"), ("stable", "v5.2")):
            assert (await complete(client, model=name)).json()["model"] == model
        listed = {entry["id"]: entry for entry in (await client.get("/v1/models")).json()["data"]}
        assert {"auto", "stable", "v5.2", "old", "new", "v2.3", "v2.3.1"} <= set(listed)
        assert listed["auto"]["root"] == "v5.2" and (await client.get("/v1/models/auto")).status_code == 200


async def test_what_is_not_loaded_is_no_fault() -> None:
    async with fleet() as (client, _, _):
        assert (await client.get("/health")).status_code == 200
        listed = {entry["id"]: entry["ready"] for entry in (await client.get("/v1/models")).json()["data"]}
        assert listed["v5.2"] and not listed["old"]


async def test_images_for_auto_where_none_reads_them() -> None:
    picture = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
    async with fleet() as (client, _, _):
        body = {"model": "auto", "messages": [{"role": "user", "content": [picture]}]}
        answer = await client.post("/v1/chat/completions", json=body)
        assert answer.status_code == 400 and answer.json()["error"]["message"] == "No version that is served here reads images."
