"""What this machine's processor is and can do, as the system tells it. No torch.

It does not know what is computed. Invariant: where the system tells nothing, nothing is assumed to be there.
"""

from __future__ import annotations

import platform
from functools import cache
from pathlib import Path

CPUINFO = Path("/proc/cpuinfo")
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
