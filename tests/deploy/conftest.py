"""A real Prometheus over a real service, both for a whole run of these tests."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from tests.deploy.programs import DEPLOY, free_port, program, serving
from tests.deploy.watched import Watched
from tests.tiny_models import build_tiny


@pytest.fixture(scope="session")
def watched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    """The service with load on it whenever a test asks for more, and the Prometheus that scrapes it every second."""
    prometheus, directory = program("prometheus"), tmp_path_factory.mktemp("prometheus")
    model = build_tiny(tmp_path_factory.mktemp("watched") / "tiny", "qwen3")
    with serving(model, "--metrics_compat", "vllm", "--batch_size", "8", "--threads", "1") as url:
        port = free_port()
        configuration = configured(url, directory)
        command = [prometheus, f"--config.file={configuration}", f"--storage.tsdb.path={directory / 'data'}"]
        command += [f"--web.listen-address=127.0.0.1:{port}", "--log.level=warn"]
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
            try:
                yield Watched(url, f"http://127.0.0.1:{port}")
            finally:
                process.terminate()
                process.communicate(timeout=60)


def configured(url: str, directory: Path) -> Path:
    """The configuration of deploy/prometheus with our target, in seconds instead of quarters of a minute."""
    text = yaml.safe_load((DEPLOY / "prometheus" / "prometheus.yml").read_text("utf-8"))
    text["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    text["rule_files"] = [str(DEPLOY / "prometheus" / name) for name in text["rule_files"]]
    text["scrape_configs"][0]["static_configs"][0]["targets"] = [url.removeprefix("http://")]
    path = directory / "prometheus.yml"
    path.write_text(yaml.safe_dump(text), "utf-8")
    return path
