"""The import contracts of importlinter.ini hold, are exhaustive, and break when a room reaches upwards or a parent reaches for torch."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.house.source import ROOT

LINT = "import sys; from importlinter.cli import lint_imports; sys.exit(lint_imports(config_filename='importlinter.ini', no_cache=True))"


def lint(root: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(root)}
    return subprocess.run([sys.executable, "-c", LINT], cwd=root, env=environment, capture_output=True, text=True, check=False, timeout=120)


def test_contracts_hold() -> None:
    done = lint(ROOT)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert "0 broken" in done.stdout


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("copy")
    shutil.copytree(ROOT / "service", root / "service", ignore=shutil.ignore_patterns("__pycache__", "*.safetensors"))
    shutil.copy(ROOT / "importlinter.ini", root)
    return root


# Each plant breaks one contract: file, import, and the contract's name in the report.
PLANTED = [
    ("service/engine/planted.py", "import service.schedulers.planner", "Floors: an import may only go down"),
    ("service/kernels/planted.py", "import service.types.errors", "Kernels import nothing of ours"),
    ("service/types/planted.py", "import pydantic", "Types import the standard library only"),
    ("service/schedulers/planted.py", "import service.checkpoints.load", "API, schedulers and the supervisor never load torch"),
    ("service/schedulers/planted.py", "import service.engine.supervisor", "Schedulers know the Backend protocol, not the engine"),
    ("service/inputs/planted.py", "import fastapi", "Only api speaks HTTP"),
]


@pytest.mark.parametrize(("path", "text", "contract"), PLANTED)
def test_each_contract_can_break(copy: Path, path: str, text: str, contract: str) -> None:
    planted = copy / path
    planted.write_text(text + "\n")
    try:
        done = lint(copy)
    finally:
        planted.unlink()
    assert done.returncode == 1
    assert f"{contract} BROKEN" in done.stdout, done.stdout[-3000:]


def test_a_new_room_must_be_placed(copy: Path) -> None:
    room = copy / "service" / "cellar.py"
    room.write_text("")
    try:
        done = lint(copy)
    finally:
        room.unlink()
    assert done.returncode == 1 and "cellar" in done.stdout
