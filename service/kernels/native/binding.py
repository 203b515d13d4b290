"""The compiled kernels as a shared library: found beside this file, loaded once, joined to torch's own threads.

It does not know what the kernels compute: `elementwise.py` and its neighbours wrap them. Invariants: a library that is absent, does not
load or was built from other sources is a sentence that says so, never an exception; its parallel regions run on the pool of torch's own.
"""

from __future__ import annotations

import ctypes
from functools import cache
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import torch

# What `NATIVE_ABI` in native.h has to be.
ABI = 16
# Instruction sets by level, as `native_choose` takes them.
LEVELS = ("baseline", "avx2", "avxvnni", "avx512", "amx", "dotprod")
ELEMENTS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
# Cached keys and values may also be int8, with the scale of each row behind it.
KEPT = {**ELEMENTS, torch.int8: 3}
# Far blocks are int8, or int4 two in a byte, with their scales apart.
STORED = {**KEPT, torch.uint8: 4}

_OPENMP = ("GOMP_parallel", "omp_get_thread_num", "omp_get_num_threads")

_pointer, _size, _int, _float = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_float
# What both kinds of attention take: queries, keys, values, tables, sizes, scoring, output.
_ATTENTION = (
    *(_int, _pointer, _size, _size),
    *(_int, _pointer, _size, _size, _size),
    *(_pointer, _size, _size, _size),
    *(_pointer, _size, _pointer, _pointer, _size),
    *(_size, _size, _size, _size, _size),
    *(_float, _size, _float, _pointer),
    _pointer,
)
SIGNATURES: dict[str, tuple[object, ...]] = {
    "native_has_quantised": (),
    "native_add_rms_norm": (_int, _pointer, _pointer, _pointer, _float, _pointer, _pointer, _size, _size, _int),
    "native_decoder_layers": (_pointer, _pointer, _size, _int),
    "native_int8_rows": (_pointer, _pointer, _pointer, _size),
    "native_quantised_linear": (_pointer, _pointer, _pointer, _size, _int),
    "native_rotate": (_int, _pointer, _size, _size, _pointer, _pointer, _pointer, _size, _size, _size, _size, _int),
    "native_swiglu": (_int, _pointer, _pointer, _size, _size, _int),
    "native_head_gate": (_int, _pointer, _size, _size, _pointer, _pointer, _size, _size, _size, _int),
    "native_linear_scratch": (),
    "native_has_pairs": (),
    "native_linear": (_int, _int, _pointer, _size, _size, _pointer, _int, _size, _pointer, _int, _pointer, _pointer, _int),
    "native_paged_attention": (*_ATTENTION, _pointer, _size, _int),
    "native_window_sparse_attention": (
        *_ATTENTION,
        *(_size, _size),
        *(_int, _pointer, _pointer, _pointer, _pointer, _size, _size),
        *(_pointer, _size, _pointer, _size, _pointer, _pointer),
        *(_pointer, _size, _int),
    ),
    "native_choose_bytes": (_size, _size, _size, _size, _size, _size),
    "native_choose_far": (
        *(_int, _pointer, _size, _size),
        *(_int, _pointer, _pointer),
        *(_pointer, _pointer, _size, _pointer, _pointer, _pointer, _pointer),
        *(_size,) * 11,
        *(_pointer, _int),
    ),
    "native_demote_scratch": (_int, _size, _size, _size, _size),
    "native_demote": (
        *(_int, _int),
        *(_pointer, _size, _size, _size),
        *(_pointer, _size, _size, _size),
        *(_pointer,) * 7,
        *(_size,) * 7,
        *(_pointer, _int),
    ),
}
# Functions that return something.
RESULTS: dict[str, object] = {"native_has_quantised": _int, "native_quantised_linear": _int, "native_paged_attention": _size}
RESULTS |= {"native_has_pairs": _int, "native_linear_scratch": _size, "native_window_sparse_attention": _size, "native_choose_bytes": _size}
RESULTS |= {"native_decoder_layers": _size, "native_demote_scratch": _size, "native_demote": _int}


class Library:
    """A loaded library. `name` is the instruction set in use, `threaded` whether it has torch's threads."""

    def __init__(self, loaded: ctypes.CDLL) -> None:
        self.functions = loaded
        loaded.native_choose.argtypes, loaded.native_choose.restype = [ctypes.c_int], ctypes.c_char_p
        for name, arguments in SIGNATURES.items():
            function = getattr(loaded, name)
            function.argtypes, function.restype = arguments, RESULTS.get(name)
        entries = _openmp_entries()
        self.threaded = entries is not None
        loaded.native_use_threads.argtypes, loaded.native_use_threads.restype = [ctypes.c_void_p] * 3, None
        loaded.native_use_threads(*(entries or (None,) * 3))
        self.name = self.choose(LEVELS[-1])

    def choose(self, level: str) -> str:
        """Use the instruction set `level`, or the best below it that the machine has; its name."""
        chosen: bytes = self.functions.native_choose(LEVELS.index(level))
        self.name = chosen.decode()
        return self.name


def _openmp_entries() -> tuple[int, ...] | None:
    """Addresses of the _OPENMP functions as torch's own library resolves them; None where it has no OpenMP.

    Looking a name up through a library searches it and what it depends on: the runtime that torch links against, whichever others are
    loaded. LLVM's runtime has the same names.
    """
    libraries = sorted((Path(torch.__file__).parent / "lib").glob("*torch_cpu.*"))
    for path in libraries:
        try:
            runtime = ctypes.CDLL(str(path))
            addresses = [ctypes.cast(getattr(runtime, name), ctypes.c_void_p).value for name in _OPENMP]
        except (OSError, AttributeError):
            continue
        found = tuple(address for address in addresses if address)
        if len(found) == len(_OPENMP):
            return found
    return None


def open_library(directory: Path) -> Library | str:
    """The library in `directory`, or why there is none."""
    names = [directory / f"_native{suffix}" for suffix in EXTENSION_SUFFIXES]
    path = next((name for name in names if name.exists()), None)
    if path is None:
        return "the compiled kernels were not built when the package was installed (no C compiler); install one and install again"
    try:
        loaded = ctypes.CDLL(str(path))
        abi = loaded.native_abi()
    except (OSError, AttributeError) as error:
        return f"the compiled kernels do not load: {error}"
    if abi != ABI:
        return f"the compiled kernels were built from other sources (interface {abi}, not {ABI}); install the package again"
    return Library(loaded)


@cache
def compiled() -> Library | str:
    """The library of this installation, loaded at the first call, or why there is none."""
    return open_library(Path(__file__).parent)


def absent() -> str | None:
    """Why the compiled kernels cannot be used, or None."""
    found = compiled()
    return found if isinstance(found, str) else None


def describe() -> str:
    """One line for people: the instruction set in use, or why there is none."""
    found = compiled()
    if isinstance(found, str):
        return f"torch only: {found}"
    return f"compiled for {found.name}" + ("" if found.threaded else ", on one thread: torch's OpenMP was not found")


def functions() -> ctypes.CDLL:
    """The library's functions; raises RuntimeError where there is none."""
    found = compiled()
    if isinstance(found, str):
        raise RuntimeError(found)
    return found.functions
