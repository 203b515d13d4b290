"""What a processor is and can do, from what the system says of it."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from pathlib import Path

import pytest

from service import processor

ZEN2 = "processor\t: 0\nmodel name\t: AMD EPYC 7002\nflags\t\t: fpu avx2 fma\n\n" * 2
ARM = "processor\t: 0\nFeatures\t: fp asimd asimddp\n"


@pytest.fixture(autouse=True)
def asked_anew() -> Iterator[None]:
    yield
    for answer in (processor.cpu_flags, processor.cpu_name):
        answer.cache_clear()


def tell(monkeypatch: pytest.MonkeyPatch, path: Path, text: str | None, machine: str) -> None:
    if text is not None:
        path.write_text(text)
    monkeypatch.setattr(processor, "CPUINFO", path)
    monkeypatch.setattr(platform, "machine", lambda: machine)
    for answer in (processor.cpu_flags, processor.cpu_name):
        answer.cache_clear()


def test_this_machine_has_a_name() -> None:
    assert processor.cpu_name()


@pytest.mark.parametrize(
    ("flags", "saturates", "bfloat16"),
    [("avx2", True, False), ("avx2 avx512f", True, False), ("avx2 avx_vnni", False, False), ("avx512_vnni avx512_bf16", False, True)],
)
def test_instruction_sets(flags: str, saturates: bool, bfloat16: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tell(monkeypatch, tmp_path / "cpuinfo", ZEN2.replace("avx2 fma", flags), "x86_64")
    assert (processor.saturates_bytes(), processor.computes_bfloat16()) == (saturates, bfloat16)
    assert processor.cpu_name() == "AMD EPYC 7002"


def test_threads_follow_the_size_of_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    assert 1 <= processor.usable_cores() <= (os.cpu_count() or 1)
    monkeypatch.setattr(processor, "usable_cores", lambda: 6)
    assert [processor.worthwhile_threads(4e6, rows) for rows in (1, 32, 63, 64, 128, 512)] == [1, 1, 1, 2, 4, 6]
    assert [processor.worthwhile_threads(16e6, rows) for rows in (1, 8, 32)] == [2, 2, 4]
    assert [processor.worthwhile_threads(products) for products in (0.0, 4e6, 15.9e6, 16e6, 39e6, 385e6)] == [1, 1, 1, 2, 4, 6]


def test_other_architectures_and_systems(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tell(monkeypatch, tmp_path / "arm", ARM, "aarch64")
    assert not processor.saturates_bytes() and not processor.computes_bfloat16() and processor.cpu_flags() == frozenset()
    tell(monkeypatch, tmp_path / "none", None, "AMD64")
    assert processor.saturates_bytes() and processor.cpu_name()
