"""What every result row says about where it was measured, and how a row is kept: one JSON object a line, appended.

It does not know what was measured. Invariant: a row names the commit, the time, the processor, the cores and the load of the machine when
it was made. On a machine to which the sources were copied without their history, ROWS_COMMIT names the commit, and ROWS_DIRECTORY the
directory for rows.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from service.processor import cpu_name

RESULTS = Path(os.environ.get("ROWS_DIRECTORY") or Path(__file__).parent / "results")


def surroundings() -> dict[str, Any]:
    """Commit, time, processor, usable cores, load average and Python version."""
    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": _commit(),
        "cpu": cpu_name(),
        "cores": len(os.sched_getaffinity(0)),
        "load_average": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
    }


def keep(name: str, row: dict[str, Any]) -> Path:
    """Append `row` to results/<name>.jsonl; returns the file."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / f"{name}.jsonl"
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
    return path


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, smallest and largest of some rounds."""
    return {
        "median": round(statistics.median(values), 3),
        "min": round(min(values), 3),
        "max": round(max(values), 3),
        "rounds": len(values),
    }


def _commit() -> str:
    named, root = os.environ.get("ROWS_COMMIT") or "unknown", Path(__file__).parent
    try:
        found = subprocess.run(["git", "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=False, cwd=root)  # noqa: S607
    except OSError:
        return named
    return found.stdout.strip() or named
