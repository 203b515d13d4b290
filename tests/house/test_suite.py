"""The suite itself: it collects at least as many tests as it ought to, runs under `python -O`, and its tests do not sleep."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections import Counter

import pytest

from tests.house.source import ROOT, SourceTree

# Fewer collected tests than this means that a file no longer imports, was renamed away or was emptied.
LEAST = {
    "tests/house": 60,
    "tests/test_config.py": 80,
    "tests/test_loadgen.py": 55,
}
OPTIMISED = ("tests/test_config.py", "tests/types", "tests/schedulers/test_planner.py", "tests/schedulers/test_blocks.py")


def pytest_run(*arguments: str, flags: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *flags, "-m", "pytest", "-p", "no:cacheprovider", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=150)


def collected() -> Counter[str]:
    done = pytest_run("--collect-only", "-q", "tests")
    assert done.returncode == 0, done.stdout[-3000:]
    counts: Counter[str] = Counter()
    for line in done.stdout.splitlines():
        if match := re.match(r"(tests/[^:]+)::", line):
            path = match[1]
            counts[path if path.count("/") == 1 else path.rpartition("/")[0]] += 1
    return counts


def test_enough_tests_are_collected() -> None:
    counts = collected()
    assert {place: counts[place] for place, least in LEAST.items() if counts[place] < least} == {}


def test_every_room_has_a_floor() -> None:
    rooms = {f"tests/{path.name}" for path in (ROOT / "tests").iterdir() if path.is_dir() and list(path.glob("test_*.py"))}
    files = {f"tests/{path.name}" for path in (ROOT / "tests").glob("test_*.py")}
    assert rooms | files == set(LEAST)


def test_the_suite_runs_optimised() -> None:
    done = pytest_run("-q", *[path for path in OPTIMISED if (ROOT / path).exists()], flags=("-O",))
    assert done.returncode == 0, done.stdout[-3000:]
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) > 80  # type: ignore[index]


def test_optimised_tests_still_check(tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("planted") / "test_planted.py"
    path.write_text("def test_planted():\n    assert 1 == 2\n")
    assert pytest_run("-q", str(path), f"--rootdir={path.parent}", flags=("-O",)).returncode == 1


def sleeping(tree: SourceTree) -> list[str]:
    found = []
    for file in tree.files:
        for node in file.nodes(ast.Call):
            name = ast.unparse(node.func)  # type: ignore[attr-defined]
            if name == "time.sleep" or (name == "asyncio.sleep" and ast.unparse(node.args[0]) not in ("0", "delay")):  # type: ignore[attr-defined]
                found.append(f"{file.path}:{node.lineno}")  # type: ignore[attr-defined]
    return found


def test_no_test_sleeps() -> None:
    assert sleeping(SourceTree(ROOT, "tests")) == []


def test_sleeping_is_seen(tmp_path: pytest.TempPathFactory) -> None:
    (tmp_path / "tests").mkdir()  # type: ignore[operator]
    (tmp_path / "tests" / "x.py").write_text("time.sleep(1)\nasyncio.sleep(0)\nasyncio.sleep(0.1)\n")  # type: ignore[operator]
    assert sleeping(SourceTree(tmp_path, "tests")) == ["tests/x.py:1", "tests/x.py:3"]  # type: ignore[arg-type]
