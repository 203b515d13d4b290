"""A child that exports one graph and ends: what the worker of exported graphs asks, so that torch comes into no process that serves.

Run as `python -m service.engine.export_child`. It does not know caches or plans. Invariant: the directory it was given is there, whole and
checked against the torch decoder, when it answers `Exported`, and not there after any other end.
"""

from __future__ import annotations

import contextlib
import importlib.util
import sys
from dataclasses import replace
from pathlib import Path

from service.engine.export_messages import Answer, Export, Exported, Refused
from service.processes import ChannelClosed, ChildChannel
from service.processor import usable_cores
from service.types.errors import StartupError


def main() -> int:
    """Answer one question; the exit code."""
    channel = ChildChannel.open(Export)
    with contextlib.suppress(ChannelClosed):
        asked = channel.receive()
        use_threads(asked.threads)
        channel.send(answer(asked))
    return 0


def use_threads(threads: int) -> None:
    """Compute with so many threads, 0 for one on each core; without torch `answer` says what is missing."""
    if importlib.util.find_spec("torch") is not None:
        import torch

        torch.set_num_threads(threads or usable_cores())


def answer(asked: Export) -> Answer:
    """Export, or say why not."""
    try:
        from service.checkpoints.long_context import adapt
        from service.checkpoints.manifest import read_manifest
        from service.checkpoints.onnx_export import export
    except ModuleNotFoundError as missing:
        return Refused(f"Exporting a model for ONNX Runtime needs {missing.name}: pip install 'deepseek-service[torch,onnx]'.")
    try:
        manifest = read_manifest(Path(asked.directory))
        export(replace(manifest, spec=adapt(manifest.spec, asked.attention)), Path(asked.target), asked.quantize)
    except StartupError as error:
        return Refused(str(error))
    except OSError as error:
        return Refused(f"The exported graph cannot be written to {asked.target}: {error.strerror}.")
    return Exported()


if __name__ == "__main__":
    sys.exit(main())
