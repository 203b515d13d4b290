"""The child for exported graphs, run as `python -m service.engine.onnx_worker`: the same worker with ONNX Runtime in torch's place.

It knows only which loader to import. Invariant: this process never imports torch, not at its first start either: a graph that is not there
yet is exported by a child of its own.
"""

from __future__ import annotations

import sys

from service.engine.loaded import Loader
from service.engine.worker import run


def main() -> int:
    """Serve one parent with ONNX Runtime until it closes the channel; the exit code."""
    return run(_import_runtime)


def _import_runtime() -> Loader:
    from service.engine.onnx_loading import load_graph

    return load_graph


if __name__ == "__main__":
    sys.exit(main())
