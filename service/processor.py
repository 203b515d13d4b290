"""What this machine's processor is and can do, as the system tells it. No torch.

It does not know what is computed. Invariant: where the system tells nothing, nothing is assumed to be there.
"""

from __future__ import annotations

import os
import platform
from functools import cache
from pathlib import Path

CPUINFO = Path("/proc/cpuinfo")
# Multiplications of a row, that is parameters, for which another thread is worth waiting for.
_THREAD_PRODUCTS = 8e6
# The same of all rows of a step together: many rows wait for memory less.
_STEP_PRODUCTS = 128e6
# Instructions that sum four products of bytes in 32 bits.
_DOTS_OF_BYTES = {"avx512_vnni", "avx_vnni", "amx_int8"}


@cache
def cpu_flags() -> frozenset[str]:
    """The names of instruction sets that Linux gives an x86 processor; empty elsewhere."""
    return frozenset(flag for value in _values("flags") for flag in value.split())


@cache
def cpu_name() -> str:
    """The processor's name, or that of its architecture."""
    return next(iter(_values("model name")), platform.processor() or platform.machine())


def usable_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def worthwhile_threads(products: float, rows: int = 1) -> int:
    """Threads for a step of rows of so many multiplications each: threads of a small model wait for each other longer than they compute."""
    return max(1, min(usable_cores(), int(max(products / _THREAD_PRODUCTS, products * rows / _STEP_PRODUCTS))))


def computes_bfloat16() -> bool:
    """Whether there are matrix units or dot products for bfloat16; without them it is emulated and slower than float32."""
    return bool(cpu_flags() & {"avx512_bf16", "amx_bf16"})


def saturates_bytes() -> bool:
    """Whether libraries sum two products of bytes in 16 bits, which large ones exceed: on x86 without dot products of bytes (VNNI)."""
    return platform.machine().lower() in ("x86_64", "amd64") and not cpu_flags() & _DOTS_OF_BYTES


def _values(key: str) -> list[str]:
    try:
        lines = CPUINFO.read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    return [value.strip() for line in lines for name, _, value in [line.partition(":")] if name.strip() == key]
