"""Where a training process stands among its fellows, as `torchrun` or SLURM say it in the environment.

It does not know torch. Invariant: a variable that is set and makes no sense is refused by name; none set means one process.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

from service.types.errors import SettingsError
from service.types.settings import LaunchSettings

DEFAULT_PORT = "29500"
# (rank, size, local rank) as each launcher names them.
TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
SLURM = ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID")


def read_launch(environment: Mapping[str, str] | None = None) -> LaunchSettings | None:
    """This process's place, or None when it was started alone. Raises SettingsError.

    `torchrun` is asked first; SLURM counts only inside a step (`srun`). The address is MASTER_ADDR, else the node that launched the SLURM
    step; the port MASTER_PORT, else 29500.
    """
    values = os.environ if environment is None else environment
    names = next((names for names in (TORCHRUN, SLURM) if names[0] in values), None)
    if names is None or (names is SLURM and "SLURM_STEP_ID" not in values):
        return None
    rank, size, local = (_number(values, name) for name in names)
    if not (rank < size and local < size and size > 0):
        raise SettingsError(f"{names[0]}={rank}, {names[2]}={local} and {names[1]}={size} contradict each other.")
    if size == 1:
        return None
    address = values.get("MASTER_ADDR") or values.get("SLURM_LAUNCH_NODE_IPADDR", "")
    if not address:
        raise SettingsError("MASTER_ADDR is not set: name the host of rank 0.")
    return LaunchSettings(rank, size, local, address, _number({"MASTER_PORT": DEFAULT_PORT, **values}, "MASTER_PORT"))


def _number(values: Mapping[str, str], name: str) -> int:
    text = values.get(name, "")
    if not text.isdecimal():
        raise SettingsError(f"{name} must be a whole number, not {text[:40]!r}: start the run with torchrun or srun.")
    return int(text)
