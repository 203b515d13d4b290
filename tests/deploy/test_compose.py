"""The compose files: they fit the Compose specification, and every path, port, flag and variable in them is there on the other side."""

from __future__ import annotations

import json
import re
from importlib.resources import files
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from service.api.server import CLOSE_S
from service.config.definition import ENVIRONMENT_PREFIX, Definition
from service.config.load import load_settings
from tests.house.source import ROOT

DOCKER = ROOT / "docker"
FILES = ("compose.yaml", "compose.gpu.yaml")
COMPOSE: dict[str, dict[str, Any]] = {name: yaml.safe_load((DOCKER / name).read_text("utf-8")) for name in FILES}
SERVICES: dict[str, Any] = COMPOSE["compose.yaml"]["services"]
SERVICE: dict[str, Any] = SERVICES["deepseek"]
SPECIFICATION = json.loads((files("check_jsonschema") / "builtin_schemas" / "vendor" / "compose-spec.json").read_text("utf-8"))


@pytest.mark.parametrize("name", FILES)
def test_it_fits_the_specification(name: str) -> None:
    jsonschema.validate(COMPOSE[name], SPECIFICATION)


def test_a_misspelt_key_does_not_fit() -> None:
    with pytest.raises(jsonschema.ValidationError, match="read_onyl"):
        jsonschema.validate({"services": {"deepseek": {**SERVICE, "read_onyl": True}}}, SPECIFICATION)


def test_every_bound_path_exists() -> None:
    sources = [mount["source"] for service in SERVICES.values() for mount in service["volumes"] if mount["type"] == "bind"]
    assert len(sources) == 6
    assert [source for source in sources if "MODELS" not in source and not (DOCKER / source).exists()] == []


def test_every_image_can_be_built() -> None:
    build = SERVICE["build"]
    assert (DOCKER / build["context"]).resolve() == ROOT
    for kind in ("cpu", "gpu", "jetson"):
        text = (ROOT / build["dockerfile"].replace("${KIND:-cpu}", kind)).read_text("utf-8")
        assert all(re.search(rf"^ARG {name}\b", text, re.MULTILINE) for name in build["args"])


@pytest.mark.parametrize("name", FILES)
def test_flags_are_settings(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in SERVICE["environment"]:
        assert variable.removeprefix(ENVIRONMENT_PREFIX).lower() in Definition.model_fields
        monkeypatch.setenv(variable, "a-key")
    settings = load_settings([*COMPOSE[name]["services"]["deepseek"]["command"], "--host=0.0.0.0"])
    assert int(SERVICE["stop_grace_period"].rstrip("s")) >= settings.http.drain_s + CLOSE_S + 10


def test_the_service_runs_as_the_image_test_runs_it() -> None:
    assert SERVICE["read_only"] and SERVICE["cap_drop"] == ["ALL"] and SERVICE["tmpfs"][0].startswith("/tmp:")
    assert f"USER {SERVICE['user']}\n" in (DOCKER / "cpu.Dockerfile").read_text("utf-8")
    assert "EXPOSE " + SERVICE["ports"][0].rpartition(":")[2] in (DOCKER / "cpu.Dockerfile").read_text("utf-8")


def test_nothing_listens_to_the_world() -> None:
    assert all(port.startswith("127.0.0.1:") for service in SERVICES.values() for port in service["ports"])


def test_prometheus_is_configured_as_in_deploy_but_for_the_target() -> None:
    ours, theirs = (
        yaml.safe_load(path.read_text("utf-8")) for path in (DOCKER / "prometheus.yml", ROOT / "deploy/prometheus/prometheus.yml")
    )
    (target,) = ours["scrape_configs"][0]["static_configs"][0]["targets"]
    assert target == "deepseek:" + SERVICE["ports"][0].rpartition(":")[2]
    ours["scrape_configs"][0]["static_configs"] = theirs["scrape_configs"][0]["static_configs"]
    assert ours == theirs
    mounted = {Path(mount["target"]).name for mount in SERVICES["prometheus"]["volumes"]}
    assert {*ours["rule_files"], "prometheus.yml"} <= mounted


def test_grafana_finds_prometheus_and_the_dashboards() -> None:
    provisioning = ROOT / "deploy" / "grafana" / "provisioning"
    (source,) = [one for path in provisioning.glob("datasources/*.yml") for one in yaml.safe_load(path.read_text("utf-8"))["datasources"]]
    assert source["url"] == "http://prometheus:" + SERVICES["prometheus"]["ports"][0].rpartition(":")[2]
    (provider,) = [one for path in provisioning.glob("dashboards/*.yml") for one in yaml.safe_load(path.read_text("utf-8"))["providers"]]
    mounts = {mount["target"]: mount["source"] for mount in SERVICES["grafana"]["volumes"]}
    assert mounts["/etc/grafana/provisioning"] == "../deploy/grafana/provisioning"
    assert list((DOCKER / mounts[provider["options"]["path"]]).glob("*.json"))
