"""From a prepared run to a trainer on a device: threads, memory policy, module.

It does not know files. Invariants: an explicit device that is missing is refused, never replaced; every process of a group gets as many
passes of a step as every other.
"""

from __future__ import annotations

import torch

from service.models.build import build
from service.train.loop import Trainer
from service.train.memory import keep_freed_memory
from service.train.objective import Distilled, Objective, Segmented
from service.train.parallel import Group
from service.train.picture_stream import Pictured
from service.train.prepare import PreparedRun
from service.train.recipe import Recipe
from service.types.errors import SettingsError
from service.types.settings import LaunchSettings


def start(run: PreparedRun, device: str = "auto", threads: int = 0, launch: LaunchSettings | None = None) -> Trainer:
    """A trainer at step 0, with the weights that the run begins with. `device` auto takes a GPU when there is one; `threads` 0 leaves
    torch's choice; `launch` joins a group.

    Raises SettingsError.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise SettingsError("--device cuda: this machine has no usable CUDA device; use --device cpu.")
    if threads:
        torch.set_num_threads(threads)
    keep_freed_memory()
    chosen = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    if launch is not None:
        _check_passes(run.recipe, launch.size)
        # A launcher may show each process its own device alone, or all of them.
        chosen = f"cuda:{launch.local_rank % torch.cuda.device_count()}" if chosen == "cuda" else chosen
    group = Group(launch, chosen)
    model = build(run.spec, torch.device(chosen), torch.float32)
    model.gradient_checkpointing_enable(run.recipe.gradient_checkpointing)
    trainer = Trainer(run.recipe, model, run.train, run.identity)
    if run.init is not None:
        model.load_state_dict(run.init.load(torch.device(chosen)).state_dict())
    trainer.group = group
    trainer.objective = _objective(run, torch.device(chosen), trainer.objective)
    return trainer


def _objective(run: PreparedRun, device: torch.device, plain: Objective) -> Objective:
    """What the recipe asks for beyond `plain`, the loss of the next token."""
    segments, distil = run.recipe.segments, run.recipe.distil
    if run.pictures is not None:
        return Pictured(run.pictures, device, plain)
    if segments is not None:
        return Segmented(segments.tokens, segments.memory_tokens)
    if distil is not None and run.teacher is not None:
        return Distilled(run.teacher.load(device), distil.kl, distil.mse, distil.temperature)
    return plain


def _check_passes(recipe: Recipe, processes: int) -> None:
    plan = recipe.schedule
    for phase in plan.lengths:
        passes = plan.batch_tokens // plan.pass_tokens(phase.tokens)
        if passes % processes:
            raise SettingsError(
                f"A step of recipe {recipe.name} has {passes} passes at {phase.tokens} tokens, which {processes} processes cannot share "
                f"evenly: start another number of processes, or change batch_tokens or micro_tokens."
            )
