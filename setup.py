"""Builds the compiled CPU kernels; everything else about the package is in pyproject.toml.

Without a C compiler, or where the build fails, the package installs without them and computes with torch alone.
"""

import hashlib
from pathlib import Path

from setuptools import Extension, setup

HERE = Path("service/kernels/native")
SOURCES = sorted([*HERE.glob("*.c"), *HERE.glob("*.h")])
DIGEST = hashlib.sha256(b"".join(path.read_bytes() for path in SOURCES)).hexdigest()[:16]
FLAGS = ["-O3", "-std=gnu11", "-fvisibility=hidden", "-fno-math-errno", "-fno-trapping-math", "-Wall", "-Wextra", "-Wno-psabi"]

setup(
    ext_modules=[
        Extension(
            "service.kernels.native._native",
            sources=[path.as_posix() for path in SOURCES if path.suffix == ".c"],
            depends=["setup.py", *(path.as_posix() for path in SOURCES)],
            define_macros=[("NATIVE_SOURCES", f'"{DIGEST}"')],
            extra_compile_args=FLAGS,
            optional=True,
        )
    ]
)
