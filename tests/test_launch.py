"""Where a training process stands, from the environments of torchrun and SLURM."""

from __future__ import annotations

import pytest

from service.config.launch import read_launch
from service.types.errors import SettingsError
from service.types.settings import LaunchSettings

TORCHRUN = {"RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "1234"}
SLURM = {"SLURM_PROCID": "3", "SLURM_NTASKS": "4", "SLURM_LOCALID": "0", "SLURM_STEP_ID": "0", "SLURM_LAUNCH_NODE_IPADDR": "10.0.0.2"}


def test_torchrun_and_slurm_say_it_in_their_own_words() -> None:
    assert read_launch(TORCHRUN) == LaunchSettings(1, 4, 1, "10.0.0.1", 1234)
    assert read_launch(SLURM) == LaunchSettings(3, 4, 0, "10.0.0.2", 29500)
    assert read_launch({**SLURM, "MASTER_ADDR": "10.0.0.3", "MASTER_PORT": "77"}) == LaunchSettings(3, 4, 0, "10.0.0.3", 77)
    assert read_launch({**SLURM, **TORCHRUN}) == read_launch(TORCHRUN)


def test_a_process_alone_is_alone() -> None:
    assert read_launch({}) is None
    assert read_launch({"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}) is None
    assert read_launch({name: value for name, value in SLURM.items() if name != "SLURM_STEP_ID"}) is None


@pytest.mark.parametrize(
    ("change", "named"),
    [({"RANK": "x"}, "RANK"), ({"WORLD_SIZE": ""}, "WORLD_SIZE"), ({"RANK": "4"}, "contradict"), ({"MASTER_ADDR": ""}, "MASTER_ADDR"),
     ({"MASTER_PORT": "-1"}, "MASTER_PORT")],
)  # fmt: skip
def test_what_makes_no_sense_is_refused_by_name(change: dict[str, str], named: str) -> None:
    with pytest.raises(SettingsError, match=named):
        read_launch({**TORCHRUN, **change})
