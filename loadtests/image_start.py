"""Seconds from starting a container of an image to ready and to the first token of the bundled model, and the image's size.

    python -m loadtests.image_start [--image NAME] [--rounds 5] [--keep]

docker/run.py runs the container (root, buildah): its root is read-only, its user unprivileged. The clock starts before the container is
made from the image. The first round warms the disk cache and is not counted. It does not know how the image was built.
"""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from loadtests.first_token import TIMEOUT_S, ask, free_port, wait_ready
from loadtests.rows import keep, spread, surroundings

RUN = Path(__file__).parents[1] / "docker" / "run.py"


def one_round(image: str) -> tuple[float, float]:
    """Seconds to ready and to the first token of a fresh container."""
    port = free_port()
    command = [sys.executable, str(RUN), f"--env=DEEPSEEK_PORT={port}", "--env=DEEPSEEK_HOST=127.0.0.1", image]
    began_s = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait_ready(port, began_s + TIMEOUT_S)
        ready_s = time.perf_counter()
        return ready_s - began_s, ask(port) - began_s
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)


def image_bytes(image: str) -> int:
    """Bytes of the files of an image, each file once."""
    sys.path.insert(0, str(RUN.parent))
    from run import unpacked_bytes

    return int(unpacked_bytes(image))


def main() -> None:
    """Measure, print the row, keep it when asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--image", default="localhost/deepseek-service:cpu")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--keep", action="store_true", help="append the row to results/image_start.jsonl")
    options = parser.parse_args()
    around = surroundings()
    found = [one_round(options.image) for _ in range(options.rounds + 1)][1:]
    row: dict[str, Any] = {
        "what": "image_start",
        "image": options.image.rpartition("/")[2],
        **around,
        "unpacked_mb": round(image_bytes(options.image) / 1e6, 1),
        "ready_s": spread([ready for ready, _ in found]),
        "first_token_s": spread([first for _, first in found]),
    }
    print(json.dumps(row))
    if options.keep:
        keep("image_start", row)


if __name__ == "__main__":
    main()
