"""From a prepared run to a trainer on a device: threads, memory policy, module.

It does not know recipes' contents or files. Invariant: an explicit device that is missing is refused, never replaced.
"""

from __future__ import annotations

import torch

from service.models.build import build
from service.train.loop import Trainer
from service.train.memory import keep_freed_memory
from service.train.prepare import PreparedRun
from service.types.errors import SettingsError


def start(run: PreparedRun, device: str = "auto", threads: int = 0) -> Trainer:
    """A trainer at step 0. `device` auto takes a GPU when there is one; `threads` 0 leaves torch's choice. Raises SettingsError."""
    if device == "cuda" and not torch.cuda.is_available():
        raise SettingsError("--device cuda: this machine has no usable CUDA device; use --device cpu.")
    if threads:
        torch.set_num_threads(threads)
    keep_freed_memory()
    chosen = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    model = build(run.spec, torch.device(chosen), torch.float32)
    return Trainer(run.recipe, model, run.train, run.identity)
