"""Keeping freed memory."""

from __future__ import annotations

import platform

from service.train.memory import keep_freed_memory


def test_glibc_is_told() -> None:
    assert keep_freed_memory() is (platform.libc_ver()[0] == "glibc")
