"""The dashboards: files are what the generator writes, and every query of every panel returns data from a real Prometheus."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import yaml

from service.telemetry import METRICS
from tests.deploy.programs import DEPLOY
from tests.deploy.test_prometheus_rules import NAMESPACE, RECORDED, used_metrics
from tests.deploy.watched import Watched

GENERATOR = DEPLOY / "grafana" / "generate.py"
BOARDS = {path.stem: json.loads(path.read_text("utf-8")) for path in sorted((DEPLOY / "grafana" / "dashboards").glob("*.json"))}


def queries(board: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """(title, expression) of every query, as a browser would send it with all tiers and versions chosen."""
    for panel in board["panels"]:
        for target in panel["targets"]:
            text = re.sub(r"\$(tier|version)\b", ".*", target["expr"]).replace("$__rate_interval", "1m")
            assert "$" not in text, (panel["title"], text)
            yield panel["title"], text


def test_the_files_are_current_and_the_check_can_fail(tmp_path: Any) -> None:
    done = subprocess.run([sys.executable, str(GENERATOR), "--check"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, "current")
    copy = tmp_path / "generate.py"
    copy.write_text(GENERATOR.read_text("utf-8"), "utf-8")
    assert subprocess.run([sys.executable, str(copy), "--check"], capture_output=True, check=False).returncode == 1
    assert subprocess.run([sys.executable, str(copy)], capture_output=True, check=False).returncode == 0
    assert subprocess.run([sys.executable, str(copy), "--check"], capture_output=True, check=False).returncode == 0


@pytest.mark.parametrize("name", ["service", "tiers", "long_context"])
async def test_every_query_returns_data(watched: Watched, name: str) -> None:
    asked = dict(queries(BOARDS[name]))
    assert len(asked) > 8
    await watched.until_answered(expression for _, expression in queries(BOARDS[name]))


@pytest.mark.parametrize("name", ["service", "tiers", "long_context"])
def test_panels_ask_for_what_exists_and_do_not_overlap(name: str) -> None:
    board = BOARDS[name]
    text = " ".join(expression for _, expression in queries(board))
    assert used_metrics(text) <= {NAMESPACE + metric.name for metric in METRICS}
    assert set(re.findall(r"deepseek:[\w:]+", text)) <= set(RECORDED)
    cells = [
        (x, y)
        for place in (panel["gridPos"] for panel in board["panels"])
        for x in range(place["x"], place["x"] + place["w"])
        for y in range(place["y"], place["y"] + place["h"])
    ]
    assert len(cells) == len(set(cells)) and all(x < 24 for x, _ in cells)
    assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"])


def test_provisioning_names_the_source_of_the_panels() -> None:
    folder = DEPLOY / "grafana" / "provisioning"
    source = yaml.safe_load((folder / "datasources" / "prometheus.yml").read_text("utf-8"))["datasources"][0]
    used = {panel["datasource"]["uid"] for board in BOARDS.values() for panel in board["panels"]}
    assert used == {source["uid"]}
    assert {variable["datasource"]["uid"] for board in BOARDS.values() for variable in board["templating"]["list"]} == used
    provider = yaml.safe_load((folder / "dashboards" / "deepseek.yml").read_text("utf-8"))["providers"][0]
    assert provider["type"] == "file" and provider["options"]["path"]
