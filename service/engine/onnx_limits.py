"""What this machine can do at most, measured without torch in a few hundredths of a second: see `limits.py`.

It does not know models. Invariant: the best of the rounds counts, since whatever else the machine does only makes a round slower.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from service.checkpoints.onnx_graph import product

ROUNDS = 3
# Larger than the last cache of a core, small enough to be touched in a moment.
_BYTES = 96 << 20


def machine_limits(directory: Path, threads: int, given: tuple[float, float]) -> tuple[tuple[str, float], ...]:
    """(kind, a second) for `bytes` and `flops`; what is `given` is taken as it is, what is 0 is measured.

    `flops` are operations of a square product in the kind of weights of the graph in `directory`.
    """
    read, computed = given
    return ("bytes", read or bytes_a_second(threads)), ("flops", computed or operations_a_second(directory, threads))


def bytes_a_second(threads: int) -> float:
    """Bytes a second that `threads` sums over parts of a large array read."""
    numbers = np.ones(_BYTES // 4, np.float32)
    parts = np.array_split(numbers, threads)
    with ThreadPoolExecutor(threads) as pool:
        return numbers.nbytes / _best(lambda: list(pool.map(np.sum, parts)))


def operations_a_second(directory: Path, threads: int) -> float:
    """Operations a second of the product that was exported beside a graph."""
    work, operations = product(directory, threads)
    return operations / _best(work)


def _best(work: Callable[[], object]) -> float:
    """Seconds of the fastest of some rounds, after one that warms up."""
    seconds = []
    for _ in range(1 + ROUNDS):
        began_s = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - began_s)
    return max(min(seconds[1:]), 1e-9)
