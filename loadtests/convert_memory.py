"""Peak memory and time of converting a large checkpoint into a directory: `python -m loadtests.convert_memory DIR [--storage bin]`.

DIR keeps the input (2 GB, written once). The limit: the bytes must be read and written once, and hashed once. Invariant: the peak is the
converter's own process, as the kernel counted it.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import load_file

from loadtests.rows import keep, surroundings
from loadtests.shapes import write_shape

MIB = 1 << 20


def peak_and_seconds(command: list[str]) -> tuple[int, float]:
    """The largest resident size of a command in bytes, and its time."""
    began = time.perf_counter()
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        raise SystemExit(f"the conversion ended with {child.returncode}")
    return usage.ru_maxrss * 1024, time.perf_counter() - began


def main() -> None:
    """Write the input where it is missing, convert it, print and keep a row."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--shape", default="llama-1b")
    parser.add_argument("--storage", choices=("safetensors", "bin"), default="safetensors")
    given = parser.parse_args()
    source = write_shape(given.shape, given.directory / given.shape, torch.bfloat16)
    if given.storage == "bin":
        source = _as_bin(source, given.directory / f"{given.shape}-bin")
    size = sum(path.stat().st_size for path in source.iterdir())
    with tempfile.TemporaryDirectory(dir=given.directory) as scratch:
        flags = ["--input_model", str(source), "--output_model", f"{scratch}/out", "--target_version", "2.3"]
        peak, seconds = peak_and_seconds([sys.executable, "-m", "service.cli.convert", *flags])
    row = {
        "what": "convert_memory",
        "shape": given.shape,
        "storage": given.storage,
        **surroundings(),
        "input_bytes": size,
        "peak_bytes": peak,
        "peak_mib": round(peak / MIB, 1),
        "seconds": round(seconds, 2),
        "mib_per_s": round(size / MIB / seconds, 1),
    }
    print(row)
    keep("convert_memory", row)


def _as_bin(source: Path, target: Path) -> Path:
    if not target.exists():
        shutil.copytree(source, target, ignore=shutil.ignore_patterns("*.safetensors"))
        torch.save(load_file(source / "model.safetensors"), target / "pytorch_model.bin")
    return target


if __name__ == "__main__":
    main()
