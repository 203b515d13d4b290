"""The suite itself: it collects at least as many tests as it ought to, runs under `python -O`, and its tests do not sleep."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from tests.conftest import COLLECTED
from tests.house.source import ROOT, SourceTree

# Fewer collected tests than this means that a file no longer imports, was renamed away or was emptied.
LEAST = {
    "tests/api": 373,
    "tests/checkpoints": 607,
    "tests/cli": 147,
    "tests/deploy": 174,
    "tests/engine": 147,
    "tests/house": 72,
    "tests/inputs": 71,
    "tests/kernels": 1000,
    "tests/models": 63,
    "tests/schedulers": 251,
    "tests/train": 188,
    "tests/types": 100,
    "tests/test_agreement.py": 5,
    "tests/test_config.py": 93,
    "tests/test_deterministic.py": 8,
    "tests/test_config_tiers.py": 25,
    "tests/test_docs.py": 104,
    "tests/test_docs_examples.py": 12,
    "tests/test_launch.py": 7,
    "tests/test_fake_cuda.py": 28,
    "tests/test_gpu_cases.py": 34,
    "tests/test_gpu_engine.py": 17,
    "tests/test_gpu_peers.py": 8,
    "tests/test_gpu_serving.py": 11,
    "tests/test_graph_parity.py": 12,
    "tests/test_image_parity.py": 17,
    "tests/test_loadgen.py": 64,
    "tests/test_long_context_memory.py": 5,
    "tests/test_onnx_parity.py": 12,
    "tests/test_parity.py": 60,
    "tests/test_sparse_parity.py": 71,
    "tests/test_sparse_whole_layers.py": 18,
    "tests/test_peers.py": 4,
    "tests/test_processor.py": 6,
    "tests/test_processes.py": 22,
    "tests/test_scenarios.py": 22,
    "tests/test_served_scenarios.py": 8,
    "tests/test_docs_commands.py": 4,
    "tests/test_telemetry.py": 12,
}
OPTIMISED = (
    "tests/test_config.py",
    "tests/types",
    "tests/schedulers/test_blocks.py",
    "tests/schedulers/test_sequence.py",
    "tests/schedulers/test_stops.py",
)


def pytest_run(*arguments: str, flags: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    command = [
        sys.executable,
        *flags,
        "-m",
        "pytest",
        "-p",
        "no:cacheprovider",
        "--override-ini=addopts=--import-mode=importlib",
        *arguments,
    ]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=150)


def collected(session: pytest.Session) -> Counter[str]:
    """Tests by file: of this run where it is one of the whole suite, else of one that only collects."""
    if session.config.args == ["tests"]:
        return session.stash[COLLECTED]
    done = pytest_run("--collect-only", "-qq", "tests")
    assert done.returncode == 0, done.stdout[-3000:]
    lines = (re.fullmatch(r"(tests/\S+\.py): (\d+)", line) for line in done.stdout.splitlines())
    return Counter({match[1]: int(match[2]) for match in lines if match})


def test_enough_tests_are_collected(request: pytest.FixtureRequest) -> None:
    counts: Counter[str] = Counter()
    for path, count in collected(request.session).items():
        counts[path if path.count("/") == 1 else path.rpartition("/")[0]] += count
    assert {place: counts[place] for place, least in LEAST.items() if counts[place] < least} == {}


def test_every_room_has_a_floor() -> None:
    rooms = {f"tests/{path.name}" for path in (ROOT / "tests").iterdir() if path.is_dir() and list(path.glob("test_*.py"))}
    files = {f"tests/{path.name}" for path in (ROOT / "tests").glob("test_*.py")}
    assert rooms | files == set(LEAST)


def test_the_suite_runs_optimised() -> None:
    done = pytest_run("-q", *OPTIMISED, flags=("-O",))
    assert done.returncode == 0, done.stdout[-3000:]
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) > 80  # type: ignore[index]


def test_optimised_tests_still_check(tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("planted") / "test_planted.py"
    path.write_text("def test_planted():\n    assert 1 == 2\n")
    assert pytest_run("-q", str(path), f"--rootdir={path.parent}", flags=("-O",)).returncode == 1


def sleeping(tree: SourceTree) -> list[str]:
    """Calls of time.sleep; the scripted children may, who play processes that hang. asyncio.sleep runs on a virtual clock."""
    files = [file for file in tree.files if not file.path.rpartition("/")[2].startswith("scripted_")]
    calls = [(file.path, node) for file in files for node in file.nodes(ast.Call)]
    return [f"{path}:{node.lineno}" for path, node in calls if ast.unparse(node.func) == "time.sleep"]  # type: ignore[attr-defined]


def test_no_test_sleeps() -> None:
    assert sleeping(SourceTree(ROOT, "tests")) == []


def test_sleeping_is_seen(tmp_path: Path) -> None:
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "x.py").write_text("asyncio.sleep(0)\ntime.sleep(1)\n")
    (tmp_path / "tests" / "scripted_x.py").write_text("time.sleep(1)\n")
    assert sleeping(SourceTree(tmp_path, "tests")) == ["tests/x.py:2"]
