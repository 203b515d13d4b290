"""A worker process on the fake device: what a `sitecustomize.py` imports before the worker's own modules are.

It does nothing in other processes of the service, which know no torch. The machine's limits are measured with small products.
"""

from __future__ import annotations

import os
import sys
from contextlib import ExitStack

KEPT = ExitStack()

if "service.engine.worker" in sys.orig_argv:
    os.environ["TRITON_INTERPRET"] = "1"
    from service.engine import limits
    from tests.fake_cuda.install import fake_cuda
    from tests.interpreter import patch_once

    limits._CUDA_BYTES, limits._CUDA_WIDTH = 1 << 16, 32
    patch_once()
    KEPT.enter_context(fake_cuda())
