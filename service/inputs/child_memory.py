"""The memory of a child that works on what strangers sent: what it has when idle, and so much beyond.

It does not know what the child does. Invariant: the bound is the kernel's, so that no library can miss it; going over it is a
MemoryError in the child.
"""

from __future__ import annotations

import resource


def limit_memory(extra_bytes: int) -> None:
    """Let this process take at most `extra_bytes` of address space beyond what it has now."""
    with open("/proc/self/statm", encoding="ascii") as file:
        current = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (current + extra_bytes, current + extra_bytes))
