"""What a worker is told to load is what the flags say."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import pytest

from service.checkpoints.manifest import read_manifest
from service.cli.wiring import load_request
from service.config.load import load_settings
from service.types.settings import EngineSettings
from tests.tiny_models import build_tiny

# Settings of the engine that its parent side obeys, or that a request carries under another name.
PARENT = {"tier", "backend", "backend_table", "heartbeat_s", "step_deadline_s", "load_deadline_s", "spare_worker", "kv_bytes"}
PARENT |= {"machine_bytes_per_s", "machine_flops_per_s"}


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny(tmp_path_factory.mktemp("wiring") / "model", "llama")


@pytest.mark.parametrize("flags", [(), ("--deterministic", "--threads", "3", "--dtype", "bfloat16", "--quantize", "int4")])
def test_the_engine_s_settings_reach_the_worker(directory: Path, flags: tuple[str, ...]) -> None:
    settings = load_settings(["--model", str(directory), *flags])
    request = load_request(settings, read_manifest(directory), 1 << 20)
    for name in {field.name for field in fields(EngineSettings)} - PARENT:
        assert getattr(request, name) == getattr(settings.engine, name), name
    assert request.deterministic == bool(flags) and request.kv_bytes == 1 << 20
    assert request.machine_limits == (settings.engine.machine_bytes_per_s, settings.engine.machine_flops_per_s)
