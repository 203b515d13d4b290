"""The Kubernetes manifests: they build, fit the schemas, hang together, and name only flags, ports, paths and metrics that exist."""

from __future__ import annotations

import copy
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from cloudcoil.models.prometheus_operator.v1 import PrometheusRule, ServiceMonitor

from service.api.app import ROUTES
from service.api.server import CLOSE_S
from service.config.definition import ENVIRONMENT_PREFIX, Definition
from service.config.load import load_settings
from service.telemetry import METRICS, NAMESPACE
from service.types.settings import EngineSettings
from tests.deploy.kustomize import build
from tests.house.source import ROOT

KUBERNETES = ROOT / "deploy" / "kubernetes"
PROMETHEUS = ROOT / "deploy" / "prometheus"
TIERS = ("cpu", "edge", "gpu")
# preStop's sleep is on by default from 1.30; the other end is the newest that the schemas know.
API_VERSIONS = ("1.30", "1.37")
BUILT = {tier: build(KUBERNETES / "overlays" / tier) for tier in TIERS}
KINDS = {"Deployment", "Service", "PodDisruptionBudget", "NetworkPolicy", "PersistentVolumeClaim", "ServiceMonitor", "PrometheusRule"}
# Kinds of the Prometheus operator, by their models.
OPERATOR = {"ServiceMonitor": ServiceMonitor, "PrometheusRule": PrometheusRule}
Tree = dict[str, Any]


def one(tier: str, kind: str) -> Tree:
    (found,) = [copy.deepcopy(each) for each in BUILT[tier] if each["kind"] == kind]
    return found


def pod(tier: str) -> Tree:
    return dict(one(tier, "Deployment")["spec"]["template"]["spec"])


def container(tier: str) -> Tree:
    (found,) = pod(tier)["containers"]
    return dict(found)


# They build, and fit the schemas.


@pytest.mark.parametrize("tier", TIERS)
def test_every_tier_has_every_object(tier: str) -> None:
    scaled = set() if tier == "edge" else {"HorizontalPodAutoscaler"}
    assert sorted(each["kind"] for each in BUILT[tier]) == sorted(KINDS | scaled)
    assert {each["metadata"]["namespace"] for each in BUILT[tier]} == {"deepseek"}


@pytest.mark.skipif(
    shutil.which("kubectl") is None, reason="kubectl is not installed: the build is that of tests/deploy/kustomize.py alone"
)
@pytest.mark.parametrize("tier", TIERS)
def test_kubectl_builds_the_same(tier: str) -> None:
    done = subprocess.run(["kubectl", "kustomize", KUBERNETES / "overlays" / tier], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr
    theirs = {(each["kind"], each["metadata"]["name"]): each for each in yaml.safe_load_all(done.stdout)}
    assert theirs == {(each["kind"], each["metadata"]["name"]): each for each in BUILT[tier]}


def test_a_field_that_is_not_built_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "kustomization.yaml").write_text("resources: []\nnamePrefix: x-\n")
    with pytest.raises(ValueError, match="namePrefix"):
        build(tmp_path)


@pytest.mark.parametrize("version", API_VERSIONS)
@pytest.mark.parametrize("tier", TIERS)
def test_objects_fit_the_schemas(tier: str, version: str) -> None:
    for each in BUILT[tier]:
        if each["kind"] not in OPERATOR:
            kubernetes_validate.validate(each, version, strict=True)


def test_a_misspelt_field_does_not_fit() -> None:
    wrong = one("cpu", "Deployment")
    wrong["spec"]["template"]["spec"]["containers"][0]["readinessProb"] = {}
    with pytest.raises(kubernetes_validate.ValidationError, match="readinessProb"):
        kubernetes_validate.validate(wrong, "1.37", strict=True)


def kept_by_the_model(each: Tree) -> Tree:
    """What the operator's own model keeps of an object: a field that it does not know is lost."""
    return dict(json.loads(OPERATOR[each["kind"]].model_validate(each).model_dump_json(by_alias=True, exclude_none=True)))


@pytest.mark.parametrize("kind", sorted(OPERATOR))
@pytest.mark.parametrize("tier", TIERS)
def test_the_operators_objects_fit_their_models(tier: str, kind: str) -> None:
    each = one(tier, kind)
    assert kept_by_the_model(each) == each
    each["spec"]["endpoints" if kind == "ServiceMonitor" else "groups"][0]["pathh"] = "/metrics"
    assert kept_by_the_model(each) != each


# They hang together.


@pytest.mark.parametrize("tier", TIERS)
def test_selectors_find_the_pods(tier: str) -> None:
    deployment, service = one(tier, "Deployment"), one(tier, "Service")
    labels = deployment["spec"]["template"]["metadata"]["labels"]
    assert deployment["spec"]["selector"]["matchLabels"] == service["spec"]["selector"] == labels
    assert one(tier, "PodDisruptionBudget")["spec"]["selector"]["matchLabels"] == labels
    assert one(tier, "NetworkPolicy")["spec"]["podSelector"]["matchLabels"] == labels
    assert one(tier, "ServiceMonitor")["spec"]["selector"]["matchLabels"] == service["metadata"]["labels"]


@pytest.mark.parametrize("tier", TIERS)
def test_names_lead_somewhere(tier: str) -> None:
    ports = {port["name"] for port in container(tier)["ports"]}
    service_ports = one(tier, "Service")["spec"]["ports"]
    used = {port["targetPort"] for port in service_ports} | {container(tier)[probe]["httpGet"]["port"] for probe in PROBES}
    used |= {port["port"] for rule in one(tier, "NetworkPolicy")["spec"]["ingress"] for port in rule["ports"]}
    assert used == ports == {port["name"] for port in service_ports}
    assert {end["port"] for end in one(tier, "ServiceMonitor")["spec"]["endpoints"]} <= ports
    volumes = {volume["name"]: volume for volume in pod(tier)["volumes"]}
    assert {mount["name"] for mount in container(tier)["volumeMounts"]} == set(volumes)
    assert volumes["models"]["persistentVolumeClaim"]["claimName"] == one(tier, "PersistentVolumeClaim")["metadata"]["name"]
    if tier != "edge":
        deployment = one(tier, "Deployment")
        target = one(tier, "HorizontalPodAutoscaler")["spec"]["scaleTargetRef"]
        assert target == {"apiVersion": deployment["apiVersion"], "kind": "Deployment", "name": deployment["metadata"]["name"]}


@pytest.mark.parametrize("tier", TIERS)
def test_the_grace_period_is_longer_than_the_drain(tier: str) -> None:
    settings = load_settings(container(tier)["args"])
    asleep = container(tier)["lifecycle"]["preStop"]["sleep"]["seconds"]
    assert pod(tier)["terminationGracePeriodSeconds"] >= asleep + settings.http.drain_s + CLOSE_S + 10


@pytest.mark.parametrize("tier", TIERS)
def test_a_roll_out_waits_for_the_slowest_load(tier: str) -> None:
    assert one(tier, "Deployment")["spec"]["progressDeadlineSeconds"] > EngineSettings().load_deadline_s


@pytest.mark.parametrize("tier", TIERS)
def test_pods_are_without_privileges(tier: str) -> None:
    assert pod(tier)["securityContext"]["runAsNonRoot"] and pod(tier)["automountServiceAccountToken"] is False
    dockerfile = (ROOT / "docker" / f"{ {'edge': 'jetson'}.get(tier, tier) }.Dockerfile").read_text("utf-8")
    assert f"USER {pod(tier)['securityContext']['runAsUser']}:{pod(tier)['securityContext']['runAsGroup']}\n" in dockerfile
    assert container(tier)["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    writable = [mount["mountPath"] for mount in container(tier)["volumeMounts"] if not mount.get("readOnly")]
    assert set(writable) == {"/tmp", "/var/cache/deepseek"}
    assert "DEEPSEEK_QUANTIZE_CACHE=/var/cache/deepseek/" in dockerfile
    assert tier == "cpu" or "TRITON_CACHE_DIR=/var/cache/deepseek/" in dockerfile


@pytest.mark.parametrize("tier", TIERS)
def test_the_cache_has_room_for_what_is_kept(tier: str) -> None:
    (cache,) = [volume for volume in pod(tier)["volumes"] if volume["name"] == "cache"]
    assert int(cache["emptyDir"]["sizeLimit"].removesuffix("Gi")) << 30 > load_settings(container(tier)["args"]).engine.quantize_cache_bytes


# What is the service's own exists.

PROBES = ("startupProbe", "readinessProbe", "livenessProbe")


@pytest.mark.parametrize("tier", TIERS)
def test_flags_and_variables_are_settings(tier: str, monkeypatch: pytest.MonkeyPatch) -> None:
    given = container(tier)
    for variable in given["env"]:
        assert variable["name"].removeprefix(ENVIRONMENT_PREFIX).lower() in Definition.model_fields
        monkeypatch.setenv(variable["name"], "8")
    settings = load_settings([*given["args"], "--host=0.0.0.0"])
    assert settings.engine.tier == tier and settings.engine.threads == 8 and settings.http.api_keys == ("8",)
    assert pod(tier)["enableServiceLinks"] is False


@pytest.mark.parametrize("tier", TIERS)
def test_threads_are_the_cores_of_the_limit(tier: str) -> None:
    (threads,) = [variable for variable in container(tier)["env"] if variable["name"] == "DEEPSEEK_THREADS"]
    assert threads["valueFrom"]["resourceFieldRef"] == {"containerName": container(tier)["name"], "resource": "limits.cpu"}
    resources = container(tier)["resources"]
    assert resources["limits"] == resources["requests"] and int(resources["limits"]["cpu"]) >= 2


@pytest.mark.parametrize("tier", TIERS)
def test_paths_and_ports_are_served(tier: str) -> None:
    routes = {row.path for row in ROUTES if row.method == "GET"}
    assert {probe: container(tier)[probe]["httpGet"]["path"] for probe in PROBES} == {
        "startupProbe": "/live",
        "readinessProbe": "/ready",
        "livenessProbe": "/live",
    }
    assert {"/live", "/ready", *(end["path"] for end in one(tier, "ServiceMonitor")["spec"]["endpoints"])} <= routes
    image = {"edge": "jetson"}.get(tier, tier)
    assert container(tier)["image"] == f"deepseek-service:{image}"
    dockerfile = (ROOT / "docker" / f"{image}.Dockerfile").read_text("utf-8")
    assert f"EXPOSE {container(tier)['ports'][0]['containerPort']}\n" in dockerfile


ADAPTER = yaml.safe_load((KUBERNETES / "autoscaling" / "adapter-values.yaml").read_text("utf-8"))["rules"]["custom"]
SERIES = {NAMESPACE + metric.name + part: metric for metric in METRICS for part in (("_bucket",) if metric.kind == "histogram" else ("",))}


def adapted() -> set[str]:
    """The names under which the adapter offers its series."""
    names = set()
    for rule in ADAPTER:
        series = re.match(r"\w+", rule["seriesQuery"])
        assert series is not None
        pattern, name = rule["name"]["matches"], rule["name"]["as"].replace("${1}", r"\1")
        names.add(re.sub(pattern, name, series[0]))
    return names


def test_the_adapter_reads_metrics_of_the_service() -> None:
    for rule in ADAPTER:
        used = set(re.findall(r"\bdeepseek_\w+", rule["seriesQuery"] + rule["metricsQuery"]))
        assert used and used <= set(SERIES), used - set(SERIES)
        assert set(rule["resources"]["overrides"]) == {"namespace", "pod"}


@pytest.mark.parametrize("tier", ["cpu", "gpu"])
def test_the_scaler_reads_what_the_adapter_offers(tier: str) -> None:
    spec = one(tier, "HorizontalPodAutoscaler")["spec"]
    assert {metric["pods"]["metric"]["name"] for metric in spec["metrics"]} == adapted()
    assert adapted() == {"deepseek_queue_seconds_p90", "deepseek_kv_cache_usage_ratio"}
    assert spec["minReplicas"] >= one(tier, "PodDisruptionBudget")["spec"]["maxUnavailable"] + 1


def test_the_job_is_the_one_of_the_rules() -> None:
    jobs = {job["job_name"] for job in yaml.safe_load((PROMETHEUS / "prometheus.yml").read_text("utf-8"))["scrape_configs"]}
    assert {one(tier, "Service")["metadata"]["name"] for tier in TIERS} <= jobs


def test_the_rules_are_those_of_deploy_prometheus() -> None:
    groups = [
        group
        for path in ("recording", "alerts")
        for group in yaml.safe_load((PROMETHEUS / f"{path}.rules.yml").read_text("utf-8"))["groups"]
    ]
    assert one("cpu", "PrometheusRule")["spec"]["groups"] == groups and len(groups) > 2


def test_the_rules_are_written_by_their_generator(tmp_path: Path) -> None:
    copy_of_deploy = tmp_path / "deploy"
    for part in ("kubernetes", "prometheus"):
        shutil.copytree(ROOT / "deploy" / part, copy_of_deploy / part)
    command = [sys.executable, copy_of_deploy / "kubernetes" / "generate_rules.py", "--check"]
    assert subprocess.run(command, check=False, capture_output=True, timeout=60).returncode == 0
    with (copy_of_deploy / "prometheus" / "alerts.rules.yml").open("a", encoding="utf-8") as file:
        file.write("      - alert: New\n        expr: up == 0\n")
    assert subprocess.run(command, check=False, capture_output=True, timeout=60).returncode == 1
