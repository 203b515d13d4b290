"""What appears is whole; what failed or was killed leaves nothing under the name, and what it left beside is taken away by the next."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from service.checkpoints.stage import staged_directory, staged_file, write_synced


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def test_a_directory_appears_at_the_end(tmp_path: Path) -> None:
    with staged_directory(tmp_path / "deep" / "out") as partial:
        write_synced(partial / "a", b"1")
        assert not (tmp_path / "deep" / "out").exists()
    assert names(tmp_path / "deep") == ["out"] and (tmp_path / "deep" / "out" / "a").read_bytes() == b"1"


def test_it_replaces_what_was_there(tmp_path: Path) -> None:
    for content in (b"1", b"2"):
        with staged_directory(tmp_path / "out") as partial:
            write_synced(partial / "a", content)
    assert names(tmp_path) == ["out"] and (tmp_path / "out" / "a").read_bytes() == b"2"


def test_a_file_appears_at_the_end(tmp_path: Path) -> None:
    for content in (b"1", b"2"):
        with staged_file(tmp_path / "out.pt") as partial:
            partial.write_bytes(content)
    assert names(tmp_path) == ["out.pt"] and (tmp_path / "out.pt").read_bytes() == b"2"


@pytest.mark.parametrize("stage", [staged_directory, staged_file])
def test_a_failure_leaves_nothing(tmp_path: Path, stage: object) -> None:
    with pytest.raises(RuntimeError), stage(tmp_path / "out"):  # type: ignore[operator]
        raise RuntimeError
    assert names(tmp_path) == []


KILLED = """
import os, signal, sys
from pathlib import Path
from service.checkpoints.stage import staged_directory
with staged_directory(Path(sys.argv[1])) as partial:
    (partial / "half").write_bytes(b"x" * 1000)
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_what_a_killed_process_left_is_swept_by_the_next(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": os.getcwd()}
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path / "out")], env=environment, check=False)
    assert done.returncode == -signal.SIGKILL
    (left,) = names(tmp_path)
    assert left.startswith(".out.partial-")
    with staged_directory(tmp_path / "other"):
        pass
    assert names(tmp_path) == [left, "other"]
    with staged_directory(tmp_path / "out"):
        pass
    assert names(tmp_path) == ["other", "out"]


def test_what_another_process_is_writing_is_left_alone(tmp_path: Path) -> None:
    with staged_directory(tmp_path / "out") as first:
        with staged_directory(tmp_path / "out"):
            assert first.is_dir()
        assert first.is_dir()
        write_synced(first / "a", b"1")
    assert names(tmp_path) == ["out"] and names(tmp_path / "out") == ["a"]
