"""Keys on every route, origins, and addresses that need a key."""

from __future__ import annotations

import pytest
from prometheus_client.parser import text_string_to_metric_families

from service.api.app import ROUTES
from service.api.server import bind, check_exposure
from service.types.errors import StartupError
from service.types.settings import HttpSettings
from tests.api.conftest import Options, Service, running

KEYED = {"api_keys": ("first-key", "second-key")}


@pytest.mark.parametrize("metrics_key", [False, True])
async def test_every_route_but_the_probes_needs_a_key(metrics_key: bool) -> None:
    open_paths = {"/health", "/live", "/ready"} | (set() if metrics_key else {"/metrics"})
    async with running(Options(http={**KEYED, "metrics_key": metrics_key})) as service:
        for row in [*((row.method, row.path) for row in ROUTES), ("GET", "/openapi.json"), ("GET", "/nope"), ("GET", "//health")]:
            method, path = row
            for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": "Basic first-key"}):
                response = await service.client.request(method, path, headers=headers)
                assert (response.status_code == 401) == (path not in open_paths), (path, response.status_code)
            for key in KEYED["api_keys"]:
                response = await service.client.request(method, path, headers={"authorization": f"Bearer {key}"})
                assert response.status_code != 401


async def test_a_wrong_key_is_refused_in_the_one_shape_and_not_echoed() -> None:
    async with running(Options(http=KEYED)) as service:
        response = await service.client.get("/v1/models", headers={"authorization": "Bearer sesame"})
    assert response.json()["error"]["code"] == "invalid_api_key"
    assert response.headers["www-authenticate"] == "Bearer"
    assert "sesame" not in response.text and "first-key" not in response.text


async def test_origins(service: Service) -> None:
    for origin, status in (("http://evil.example", 403), ("null", 403), (service.url, 200), ("http://127.0.0.1:1", 403)):
        response = await service.client.get("/live", headers={"origin": origin})
        assert response.status_code == status, origin
        assert "access-control-allow-origin" not in response.headers
    rebound = {"origin": "http://evil.example", "host": "evil.example"}
    assert (await service.client.get("/live", headers=rebound)).status_code == 403


async def test_listed_origins_are_answered_without_credentials() -> None:
    async with running(Options(http={"allowed_origins": ("https://app.example",), **KEYED})) as service:
        asked = {"origin": "https://app.example", "access-control-request-method": "POST"}
        preflight = await service.client.options("/v1/completions", headers=asked)
        assert preflight.status_code == 204
        assert preflight.headers["access-control-allow-origin"] == "https://app.example"
        assert "access-control-allow-credentials" not in preflight.headers
        refused = await service.client.options("/v1/completions", headers={**asked, "origin": "https://other.example"})
        assert refused.status_code == 403


@pytest.mark.parametrize("path", ["/nope", "/v1", "/v1/completions/"])
async def test_unknown_routes_and_methods(service: Service, path: str) -> None:
    response = await service.client.get(path)
    assert (response.status_code, response.json()["error"]["code"]) == (404, "not_found")
    assert response.headers["x-request-id"].startswith("req-")
    response = await service.client.get("/v1/completions")
    assert (response.status_code, response.json()["error"]["code"]) == (405, "method_not_allowed")
    assert response.headers["allow"] == "POST"


def test_a_public_address_needs_a_key_or_insecure() -> None:
    for host in ("0.0.0.0", "::", "192.168.1.5"):
        with pytest.raises(StartupError, match="--api_key"):
            check_exposure(HttpSettings(host=host))
        check_exposure(HttpSettings(host=host, insecure=True))
        check_exposure(HttpSettings(host=host, api_keys=("k",)))
    for host in ("127.0.0.1", "localhost", "::1"):
        check_exposure(HttpSettings(host=host))


def test_a_port_in_use_is_said_in_one_sentence() -> None:
    first = bind(HttpSettings(port=0))
    with pytest.raises(StartupError, match="in use by another program"):
        bind(HttpSettings(port=first.getsockname()[1]))
    first.close()


async def test_metrics_parse_and_carry_the_labels(service: Service) -> None:
    answer = await service.client.post("/v1/completions", json={"prompt": "xyz", "max_tokens": 4})
    assert answer.headers["x-model-version"].startswith("v2.3@")
    await service.client.post("/v1/completions", json={"prompt": "xyz", "nope": 4})
    text = (await service.client.get("/metrics")).text
    samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    assert all({"version", "tier", "device"} <= set(sample.labels) for sample in samples)
    values = {(sample.name, sample.labels["version"]): sample.value for sample in samples}
    version = answer.headers["x-model-version"]
    assert values["deepseek_generation_tokens_total", version] == 4
    assert values["deepseek_prompt_tokens_total", version] == 3
    assert values["deepseek_admission_rejections_total", "none"] == 1
    routes = {sample.labels["route"] for sample in samples if "route" in sample.labels}
    assert routes == {"/v1/completions"}
    wanted = await service.client.get("/metrics", headers={"accept": "application/openmetrics-text"})
    assert wanted.text.endswith("# EOF\n")
