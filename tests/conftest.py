"""For the whole suite: tests compute with one thread, and what needs a library that is not installed says so and is skipped.

Tiny matrices gain nothing from a second thread and lose much when the machine is busy. Without torch (or transformers) everything else is
still tested: files that import it are skipped with that reason. With torch installed nothing is skipped for want of it.
"""

from __future__ import annotations

import importlib.util
import os
from collections import Counter
from pathlib import Path

import pytest

OPTIONAL = ("torch", "transformers")
MISSING = tuple(name for name in OPTIONAL if importlib.util.find_spec(name) is None)
# What needs torch without importing it in every file: their conftest imports it, or they start commands and workers that do.
NEED_TORCH = ("engine", "kernels", "models", "train", "cli/test_serve.py", "cli/test_benchmark.py")

COLLECTED = pytest.StashKey[Counter[str]]()

# Children do not look into the current directory; those of the tests live in `tests`.
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(Path(__file__).parent.parent), os.environ.get("PYTHONPATH"))))

collect_ignore = list(NEED_TORCH) if "torch" in MISSING else []

if "torch" not in MISSING:
    import torch

    torch.set_num_threads(1)
    if torch.cuda.is_available():
        os.environ.pop("EMULATE_SM", None)
    elif "EMULATE_SM" in os.environ:
        # Before a kernel is imported: without a device they are compiled for this chip, and what was compiled is run on CPU tensors.
        from tests.kernels.gpu.ptx import driver

        driver.use(int(os.environ["EMULATE_SM"]))
    else:
        # Read by triton when it is first imported: they are interpreted on CPU tensors.
        os.environ["TRITON_INTERPRET"] = "1"
        if importlib.util.find_spec("triton") is not None:
            from tests.interpreter import patch_once

            patch_once()


class FileWithLibraries(pytest.Module):
    """A test file; importing a library of `OPTIONAL` that is missing skips it."""

    def collect(self) -> list[pytest.Item | pytest.Collector]:
        try:
            return list(super().collect())
        except self.CollectError as error:
            cause = error.__cause__
            if isinstance(cause, ModuleNotFoundError) and cause.name in MISSING:
                pytest.skip(f"{cause.name} is not installed")
            raise


def pytest_itemcollected(item: pytest.Item) -> None:
    """For the tests of the suite itself: how many tests each file has."""
    item.session.stash.setdefault(COLLECTED, Counter())[item.location[0]] += 1


def pytest_pycollect_makemodule(module_path: Path, parent: pytest.Collector) -> pytest.Module:
    return FileWithLibraries.from_parent(parent, path=module_path)


def pytest_report_header() -> str | None:
    if "torch" not in MISSING:
        return None
    return f"torch is not installed: left out are {', '.join(f'tests/{room}' for room in NEED_TORCH)} and files that import it"
