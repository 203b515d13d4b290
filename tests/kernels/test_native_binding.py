"""The compiled library: found, told from a broken one, on torch's threads, and absent without harm."""

from __future__ import annotations

import hashlib
import importlib.machinery
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from service.kernels import dispatch
from service.kernels.choices import Dispatch
from service.kernels.dispatch import TABLE
from service.kernels.native import binding, elementwise
from tests.house.source import ROOT
from tests.kernels.conftest import needs_native

SOURCES = ROOT / "service" / "kernels" / "native"
SUFFIX = importlib.machinery.EXTENSION_SUFFIXES[0]


def compile_c(text: str, target: Path) -> None:
    source = target.with_suffix(".c")
    source.write_text(text)
    subprocess.run(["cc", "-shared", "-fPIC", "-o", str(target), str(source)], check=True)


@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")
def test_a_machine_with_a_compiler_has_the_library() -> None:
    assert binding.absent() is None, "run make setup"
    assert binding.describe().startswith("compiled for ")


@needs_native
def test_the_library_was_built_from_these_sources() -> None:
    digest = hashlib.sha256()
    for path in sorted([*SOURCES.glob("*.c"), *SOURCES.glob("*.h")]):
        digest.update(path.read_bytes())
    built = binding.functions().native_sources
    built.restype = binding.ctypes.c_char_p
    assert built().decode() == digest.hexdigest()[:16], "the sources changed since the library was built: run make setup"


def test_an_empty_directory_says_that_nothing_was_built(tmp_path: Path) -> None:
    assert "were not built" in str(binding.open_library(tmp_path))


def test_a_broken_library_says_that_it_does_not_load(tmp_path: Path) -> None:
    (tmp_path / f"_native{SUFFIX}").write_bytes(b"not a library")
    assert str(binding.open_library(tmp_path)).startswith("the compiled kernels do not load: ")


@needs_native
def test_a_library_of_another_interface_is_refused(tmp_path: Path) -> None:
    compile_c("int native_abi(void) { return 999; }", tmp_path / f"_native{SUFFIX}")
    assert "interface 999" in str(binding.open_library(tmp_path))


@needs_native
def test_a_foreign_library_is_refused(tmp_path: Path) -> None:
    compile_c("int other(void) { return 1; }", tmp_path / f"_native{SUFFIX}")
    assert "native_abi" in str(binding.open_library(tmp_path))


def test_without_it_torch_computes_and_the_reason_is_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(binding, "compiled", lambda: "it was not built")
    choices = Dispatch(TABLE)
    assert choices.resolve("swiglu", "cpu", torch.float32)(torch.zeros(1, 4)).shape == (1, 2)
    assert choices.chosen() == {"swiglu[cpu,float32]": "torch"}
    assert choices.passed_over()["swiglu[cpu,float32] native"] == "it was not built"
    assert binding.describe() == "torch only: it was not built"
    with pytest.raises(RuntimeError, match="it was not built"):
        elementwise.swiglu(torch.zeros(1, 4))


@needs_native
def test_every_instruction_set_below_the_best_can_be_chosen() -> None:
    """One that the machine lacks is the one before it: processors with AVX-512 have AVX2, but seldom its VNNI."""
    loaded = binding.compiled()
    assert isinstance(loaded, binding.Library)
    best, before = loaded.name, binding.LEVELS[0]
    levels = binding.LEVELS[: binding.LEVELS.index(best) + 1]
    try:
        for level in levels:
            assert loaded.choose(level) in (level, before)
            before = loaded.name
        assert before == best and loaded.choose(levels[0]) == levels[0]
        if best in ("avx512", "amx"):
            assert [loaded.choose(level) for level in ("avx2", "avx512")] == ["avx2", "avx512"]
    finally:
        loaded.choose(binding.LEVELS[-1])
    assert loaded.name == best


THREADS = """
import os, torch
from service.kernels.native import elementwise, binding
def threads(): return len(os.listdir("/proc/self/task"))
torch.set_num_threads(3)
if "torch first" in {order!r}: torch.mm(torch.ones(700, 700), torch.ones(700, 700)); torch.ones(1 << 22).add_(1)
before = threads()
elementwise.rms_norm(torch.ones(4096, 512), torch.ones(512), 1e-5)
between = threads()
torch.mm(torch.ones(700, 700), torch.ones(700, 700)); torch.ones(1 << 22).add_(1)
print(binding.compiled().threaded, before, between, threads())
"""


@needs_native
@pytest.mark.skipif(sys.platform != "linux", reason="threads are counted in /proc")
@pytest.mark.parametrize("order", ["torch first", "native first"])
def test_parallel_regions_run_on_the_threads_of_torch(order: str) -> None:
    done = subprocess.run([sys.executable, "-c", THREADS.format(order=order)], capture_output=True, text=True, check=True, cwd=ROOT)
    threaded, before, between, after = done.stdout.split()
    assert threaded == "True"
    # Two more threads for a team of three, whoever opens it, and none for the other one.
    assert int(after) == int(between)
    assert int(between) - int(before) == (0 if order == "torch first" else 2)


def test_forced_choices_pass_over_nothing() -> None:
    choices = Dispatch(TABLE)
    choices.force("swiglu", "torch")
    choices.resolve("swiglu", "cpu", torch.float32)
    assert choices.passed_over() == {}


def test_the_process_records_what_it_passed_over() -> None:
    assert dispatch.passed_over.__self__ is dispatch.chosen.__self__  # type: ignore[attr-defined]


@pytest.mark.slow
@needs_native
def test_the_package_installs_without_a_compiler(tmp_path: Path) -> None:
    """A build whose compiler fails leaves everything but the library; what the source distribution carries builds again."""
    tree = tmp_path / "tree"
    shutil.copytree(ROOT, tree, ignore=shutil.ignore_patterns(".venv*", ".git", "*.so", "build", "*.egg-info", "results", "bundled"))
    build = [sys.executable, "setup.py", "-q", "build", "--build-lib"]
    subprocess.run([*build, str(tmp_path / "broken")], cwd=tree, check=True, capture_output=True, env={**os.environ, "CC": "false"})
    assert (tmp_path / "broken/service/kernels/native/library.c").exists()
    assert "were not built" in str(binding.open_library(tmp_path / "broken/service/kernels/native"))
    subprocess.run([*build, str(tmp_path / "whole")], cwd=tree, check=True, capture_output=True)
    assert isinstance(binding.open_library(tmp_path / "whole/service/kernels/native"), binding.Library)
