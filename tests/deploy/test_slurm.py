"""The SLURM script with stand-ins for SLURM's programs and for the training command, which checks its flags as the real one does."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from service.cli.ending import INTERRUPTED
from service.cli.train import STATE_FILE
from tests.house.source import ROOT

SCRIPT = ROOT / "deploy" / "slurm" / "train.sbatch"
SRUN = '#!/bin/sh\nwhile [ "${1#--}" != "$1" ]; do shift; done\nexec "$@"\n'
SCONTROL = '#!/bin/sh\necho "$@" > requeued\n'
TRAIN = """#!{python}
import sys
from service.cli.train import read_flags
flags = read_flags(sys.argv[1:])
print(flags.recipe, flags.out, flags.threads, flags.resume, flags.steps)
sys.exit(int(open("code").read()))
"""


def place(directory: Path, name: str, text: str) -> None:
    path = directory / "bin" / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(text, "utf-8")
    path.chmod(0o755)


@pytest.fixture
def cluster(tmp_path: Path) -> Path:
    """A directory with the programs on its PATH."""
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL), ("deepseek-train", TRAIN.format(python=sys.executable))):
        place(tmp_path, name, text)
    return tmp_path


def submit(cluster: Path, code: int, *arguments: str) -> subprocess.CompletedProcess[str]:
    (cluster / "code").write_text(str(code))
    environment = {"PATH": f"{cluster}/bin{os.pathsep}/usr/bin{os.pathsep}/bin", "SLURM_JOB_ID": "7", "SLURM_CPUS_PER_TASK": "3"}
    return subprocess.run(
        ["bash", SCRIPT, *arguments], cwd=cluster, env=environment, capture_output=True, text=True, check=False, timeout=60
    )


def test_a_run_that_ends_is_not_put_back(cluster: Path) -> None:
    done = submit(cluster, 0, "nano-v2.3", "out", "--steps=9")
    assert (done.returncode, done.stdout, done.stderr) == (0, "nano-v2.3 out 3 False 9\n", "")
    assert not (cluster / "requeued").exists()


def test_an_interrupted_run_is_put_back_and_goes_on(cluster: Path) -> None:
    assert submit(cluster, INTERRUPTED, "nano-v2.3", "out").returncode == INTERRUPTED
    assert (cluster / "requeued").read_text() == "requeue 7\n"
    (cluster / "out").mkdir()
    (cluster / "out" / STATE_FILE).touch()
    assert submit(cluster, 0, "nano-v2.3", "out").stdout == "nano-v2.3 out 3 True 0\n"


def test_a_failure_ends_the_job(cluster: Path) -> None:
    assert submit(cluster, 2, "nano-v2.3", "out").returncode == 2
    assert not (cluster / "requeued").exists()


def test_it_says_what_it_wants(cluster: Path) -> None:
    done = submit(cluster, 0, "nano-v2.3")
    assert done.returncode != 0 and "usage: sbatch train.sbatch RECIPE OUT" in done.stderr


def test_the_signal_comes_before_the_limit() -> None:
    options = [line.removeprefix("#SBATCH ") for line in SCRIPT.read_text("utf-8").splitlines() if line.startswith("#SBATCH ")]
    assert {"--signal=TERM@300", "--requeue", "--ntasks=1", "--nodes=1"} <= set(options)
