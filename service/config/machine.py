"""What kind of machine this is, as files of the operating system say: a GPU, a board of an edge device, cores and the quota on them.

It loads no library of a device and does not know what follows from it. Invariant: what cannot be read counts as not there.
"""

from __future__ import annotations

import importlib.metadata
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

# In the device tree's model, in lower case. Servers with a device tree name none of these.
_EDGE_BOARDS = ("jetson", "raspberry pi", "rockchip", "orange pi", "coral")
# Files of the first version of control groups, `cpu.cfs_…_us`.
_V1 = ("quota", "period")


class Machine(NamedTuple):
    """`board` is an edge device's name or empty; `cores` may be used, `quota` of them at full speed (0: no quota)."""

    gpu: bool
    board: str
    cores: int
    quota: int


def this_machine(root: Path = Path("/")) -> Machine:
    """What the files under `root` say; the cores are those that this process may use."""
    return Machine(_has_gpu(root), _edge_board(root), usable_cores(), _quota(root))


def usable_cores() -> int:
    """The cores that this process may use, where the system can tell; else all."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def threads_note(threads: int) -> str:
    """What to tell who asks for more threads than there are cores for them, or nothing. It is slower; someone may know better."""
    cores = usable_cores()
    if threads <= cores:
        return ""
    words = f"{cores} cores" if cores > 1 else "one core"
    return (
        f"--threads {threads} is more than the {words} that this process may use: threads will wait for each other; 0 takes what there is"
    )


def _has_gpu(root: Path) -> bool:
    """Whether the driver shows a card and the installed torch can use one."""
    return (root / "dev/nvidia0").exists() and not _torch_is_for_cpus()


def _torch_is_for_cpus() -> bool:
    try:
        return importlib.metadata.version("torch").endswith("+cpu")
    except importlib.metadata.PackageNotFoundError:
        return True


def _edge_board(root: Path) -> str:
    model = _text(root / "proc/device-tree/model").strip("\0 \n")
    return model if any(board in model.lower() for board in _EDGE_BOARDS) else ""


def _quota(root: Path) -> int:
    """Whole cores that every control group around this process leaves it, at least 1; 0 where none sets a quota."""
    cores = [quota / period for quota, period in _quotas(root) if quota > 0 and period > 0]
    return max(1, math.floor(min(cores) + 1e-6)) if cores else 0


def _quotas(root: Path) -> Iterator[tuple[int, int]]:
    """(microseconds of processor time, of which period) of each group from this process's own up to the root."""
    groups = root / "sys/fs/cgroup"
    for line in _text(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers not in ("", "cpu", "cpu,cpuacct"):
            continue
        base = groups / controllers
        here = base / path.lstrip("/")
        for directory in (here, *here.parents):
            words = _text(directory / "cpu.max").split() if not controllers else [_text(directory / f"cpu.cfs_{name}_us") for name in _V1]
            if len(words) == 2 and all(word.strip().isdigit() for word in words):
                yield int(words[0]), int(words[1])
            if directory == base:
                break


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
