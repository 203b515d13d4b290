"""Two processes over Gloo take the steps that one takes; a group of one needs nothing."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from service.train.parallel import Group
from service.train.prepare import PreparedRun
from service.train.recipe import Recipe
from service.train.start import start
from service.types.errors import SettingsError
from service.types.settings import LaunchSettings

CODE = """
import sys
from pathlib import Path
import service.train.corpus as corpus
corpus.library_root = lambda: Path({library!r})
from service.cli.train import main
sys.exit(main({arguments!r}))
"""


def launched(code: str, processes: int) -> list[subprocess.CompletedProcess[str]]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    running = []
    for rank in range(processes):
        names = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        environment = {**os.environ, **names, "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-c", code]
        running.append(
            subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, encoding="utf-8")
        )
    done = []
    for process in running:
        out, err = process.communicate(timeout=120)
        done.append(subprocess.CompletedProcess(process.args, process.returncode, out, err))
    return done


def test_two_processes_learn_what_one_learns(tmp_path: Path, content: dict[str, Any], library: Path) -> None:
    schedule = content["schedule"] | {"steps": 6, "lengths": [{"until": 1.0, "tokens": 32}], "batch_tokens": 256, "micro_tokens": 64}
    small = content | {"shape": "nano", "schedule": schedule, "evaluate": {"times": 1, "tokens": 64, "final_tokens": 64}}
    small["samples"] = {"prompts": [], "chats": [], "temperatures": [], "tokens": 1}
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(small))
    curves = []
    for processes in (1, 2):
        arguments = [
            "--recipe",
            str(tmp_path / "tiny.yaml"),
            "--out",
            str(tmp_path / f"by{processes}"),
            "--threads",
            "1",
            "--device",
            "cpu",
        ]
        done = launched(CODE.format(library=str(library), arguments=arguments), processes)
        assert [run.returncode for run in done] == [0] * processes, done[-1].stderr
        assert all(run.stdout == "" and run.stderr == "" for run in done[1:])
        row = json.loads(done[0].stdout.splitlines()[-1])
        assert row.get("processes", 1) == processes
        curves.append([loss for _, loss in row["curve"]])
    assert curves[0] == pytest.approx(curves[1], abs=2e-3) and curves[0][-1] < curves[0][0]


def test_a_group_of_one_changes_nothing() -> None:
    group = Group()
    assert group.leads and (group.sum(2.5), group.leaders(1.5), group.any(False), group.any(True)) == (2.5, 1.5, False, True)
    group.sum_gradients([])
    group.close()


def test_passes_that_cannot_be_shared_are_refused(prepared: PreparedRun, recipe_with: Callable[..., Recipe]) -> None:
    run = replace(prepared, recipe=recipe_with(schedule={"batch_tokens": 256, "micro_tokens": 256}))
    with pytest.raises(SettingsError, match=r"1 passes at 32 tokens, which 2 processes cannot share"):
        start(run, "cpu", 1, LaunchSettings(0, 2, 0, "127.0.0.1", 1))
