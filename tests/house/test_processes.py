"""What each process loads: the parent's commands and the schedulers come without torch, and the load generator without this service."""

from __future__ import annotations

import subprocess
import sys

import pytest

HEAVY = ("torch", "triton", "onnxruntime", "transformers", "safetensors")
PARENT = (
    "service.cli.serve",
    "service.cli.benchmark",
    "service.cli.wiring",
    "service.api.app",
    "service.api.server",
    "service.engine.supervisor",
)
ROOMS = (
    "service.schedulers.loop",
    "service.schedulers.router",
    "service.inputs.tokens",
    "service.checkpoints.manifest",
    "service.telemetry",
)


def loaded_by(code: str) -> set[str]:
    script = f"{code}\nimport sys\nprint('MODULES', *{{name.partition('.')[0] for name in sys.modules}})"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60)
    return set(done.stdout.rpartition("MODULES")[2].split())


@pytest.mark.parametrize("modules", [PARENT, ROOMS], ids=["parent", "rooms"])
def test_the_parent_has_no_torch(modules: tuple[str, ...]) -> None:
    assert not loaded_by("import " + ", ".join(modules)) & set(HEAVY)


def test_the_check_sees_torch() -> None:
    assert "torch" in loaded_by("import sys, types; sys.modules['torch'] = types.ModuleType('torch')")


def test_beginning_to_serve_imports_little() -> None:
    heavy = {"fastapi", "pydantic", "pydantic_settings", "rich", "tokenizers", "uvicorn", "numpy", "yaml", "prometheus_client"}
    assert not loaded_by("import service.cli.serve") & heavy
