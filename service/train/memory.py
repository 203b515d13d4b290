"""Keep freed memory in the process: training allocates the same large buffers in every step.

It knows the C library only. Invariant: results do not depend on it.
"""

from __future__ import annotations

import ctypes
import sys

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_LARGEST = 2**31 - 1


def keep_freed_memory() -> bool:
    """Tell glibc to reuse large freed buffers instead of returning them to the system; False where the C library is another.

    A step otherwise spends most of its time in page faults: on a 2-core virtual machine this took the 5.5 M shape from 320 to 2000 tokens/s
    (together with passes of 1024 instead of 4096 tokens).
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    return bool(mallopt(_M_MMAP_THRESHOLD, _LARGEST)) and bool(mallopt(_M_TRIM_THRESHOLD, _LARGEST))
