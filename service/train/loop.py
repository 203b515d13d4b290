"""The training loop: take a batch, compute its gradient in passes, step, average, and remember everything needed to go on after a kill.

It knows a model, a stream of tokens, an objective and a recipe; not the corpus, the tokenizer, terminals or publishing. Invariants:
master weights and optimiser state are float32; the state file is replaced whole or not at all; a run resumed from it continues as if never
stopped (exactly so under a budget of steps; under a budget of minutes the time already spent counts).
"""

from __future__ import annotations

import os
import pickle
import shutil
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from service.models.build import init_weights
from service.models.decoder import Decoder
from service.models.layers import DIFFERENTIABLE, FAKE_INT8
from service.processor import computes_bfloat16
from service.train.objective import Batch, NextToken, Objective, sequence_loss
from service.train.optimizer import build_optimizers, set_rates
from service.train.parallel import Group
from service.train.recipe import Recipe
from service.train.stream import TokenStream
from service.types.errors import CheckpointError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, slots=True)
class StepReport:
    """One step: its number from 1 on, tokens and seconds so far, its mean loss in nats, rate factor, budget spent (0 … 1)."""

    step: int
    tokens: int
    loss: float
    rate: float
    elapsed_s: float
    progress: float


@dataclass(slots=True)
class RunState:
    """Where a run stands. `tokens` is also the data position; `losses` holds (step, tokens, loss) of every step so far."""

    step: int = 0
    tokens: int = 0
    elapsed_s: float = 0.0
    averaged_steps: int = 0
    losses: list[tuple[int, int, float]] = field(default_factory=list)
    evaluations: list[tuple[int, int, float]] = field(default_factory=list)


class Trainer:
    """One run of a recipe on one device, alone or as one of a group.

    `identity` (recipe, corpus, tokenizer, teacher, init) must match for a state file to be resumed. `objective` (the next token's loss) and
    `group` (one process) may be set before the first step.
    """

    def __init__(
        self, recipe: Recipe, model: Decoder, stream: TokenStream, identity: str, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.recipe, self.model, self.stream = recipe, model, stream
        self.group = Group()
        self.state = RunState()
        self.device = next(model.parameters()).device
        self.dtype = compute_dtype(recipe.dtype, model, self.device)
        self._identity = identity
        self._clock = clock
        loss = torch.compile(sequence_loss, dynamic=False) if recipe.compile and has_compiler() else sequence_loss
        self.objective: Objective = NextToken(loss)
        init_weights(model, recipe.seed)
        model.rope.rows(torch.arange(model.spec.context_tokens, device=self.device))  # grown once, so that steps compile whole
        self._optimizers = build_optimizers(model, model.spec, recipe.optimizer)
        self._average: dict[str, Tensor] = {}
        scaling = self.dtype == torch.float16 and model.spec.precision.loss_scaling
        self._scaler = torch.amp.GradScaler(self.device.type, enabled=scaling)

    @property
    def progress(self) -> float:
        """Budget spent, 0 … 1."""
        plan = self.recipe.schedule
        return min(1.0, self.state.step / plan.steps if plan.steps else self.state.elapsed_s / (60.0 * plan.minutes))

    def quantise(self, on: bool) -> None:
        """Compute matrix products as int8 would from now on, or as floating point does."""
        self.model.use(FAKE_INT8 if on else DIFFERENTIABLE)

    def step(self) -> StepReport:
        """One optimiser step on `batch_tokens` tokens, the group's passes together."""
        started, progress, plan = self._clock(), self.progress, self.recipe.schedule
        factor, length = plan.rate(progress, self.state.step + 1), plan.length(progress)
        set_rates(self._optimizers, factor)
        if self.recipe.quantise is not None:
            self.quantise(progress >= self.recipe.quantise.start)
        loss = self.group.sum(self._accumulate(length))
        self.group.sum_gradients(self.model.parameters())
        for optimizer in self._optimizers:
            self._scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.optimizer.clip)
        for optimizer in self._optimizers:
            self._scaler.step(optimizer)
            optimizer.zero_grad(set_to_none=True)
        self._scaler.update()
        self._update_average(progress)
        state = self.state
        state.step += 1
        state.tokens += plan.batch_tokens
        state.losses.append((state.step, state.tokens, loss))
        state.elapsed_s = self.group.leaders(state.elapsed_s + self._clock() - started)
        return StepReport(state.step, state.tokens, loss, factor, state.elapsed_s, self.progress)

    def _accumulate(self, length: int) -> float:
        """Gradients of this process's passes of the batch, and their share of its mean loss in nats."""
        plan, total = self.recipe.schedule, 0.0
        taken = plan.pass_tokens(length)
        for first in range(self.group.rank * taken, plan.batch_tokens, self.group.size * taken):
            *arrays, each = self.stream.one_pass(self.state.tokens + first, taken, length)
            inputs, targets = (torch.from_numpy(array).to(self.device) for array in arrays)
            parts = self.objective.parts(self.model, Batch(inputs, targets, each))
            while True:
                with self._autocast():
                    part = next(parts, None)
                    if part is None:
                        break
                    loss = part / plan.batch_tokens
                torch.autograd.backward(self._scaler.scale(loss))
                total += float(loss.detach())
        return total

    def _autocast(self) -> AbstractContextManager[Any]:
        if self.dtype == torch.float32:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=self.dtype)

    @torch.no_grad()
    def _update_average(self, progress: float) -> None:
        part = self.recipe.average
        if part.decay == 0 or progress < part.start:
            return
        self.state.averaged_steps += 1
        decay = min(part.decay, 1.0 - 1.0 / self.state.averaged_steps)
        for name, weight in self.model.state_dict().items():
            if name not in self._average:
                self._average[name] = weight.detach().clone()
            else:
                self._average[name].lerp_(weight, 1.0 - decay)

    def averaged(self) -> dict[str, Tensor]:
        """The averaged weights; empty before averaging began."""
        return self._average

    def save(self, path: Path) -> None:
        """Replace the state file at `path` whole; only rank 0 of a group does."""
        if not self.group.leads:
            return
        state = self.state
        content = {
            "identity": self._identity,
            "model": self.model.state_dict(),
            "average": self._average,
            "optimizers": [optimizer.state_dict() for optimizer in self._optimizers],
            "scaler": self._scaler.state_dict(),
            "run": {name: getattr(state, name) for name in RunState.__slots__},
        }
        beside = path.with_suffix(".writing")
        with beside.open("wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)

    def resume(self, path: Path) -> None:
        """Go on from the state file at `path`. Raises CheckpointError when it is not this run's."""
        try:
            content = torch.load(path, map_location=self.device, weights_only=True)
        except (OSError, RuntimeError, ValueError, EOFError, pickle.UnpicklingError) as error:
            raise CheckpointError(
                f"The training state {path.name} cannot be read ({type(error).__name__}); start without --resume."
            ) from None
        if content.get("identity") != self._identity:
            raise CheckpointError(
                "The training state belongs to another recipe, corpus, tokenizer, --teacher or --init: give those of the run, or leave "
                "--resume out."
            )
        self.model.load_state_dict(content["model"])
        self._average = content["average"]
        for optimizer, saved in zip(self._optimizers, content["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self._scaler.load_state_dict(content["scaler"])
        self.state = RunState(**content["run"])


def compute_dtype(wanted: str, model: Decoder, device: torch.device) -> torch.dtype:
    """The type of the matrix products: the one asked for, or for `auto` the line's policy where the device computes it fast.

    A GPU without bfloat16 takes float16; a CPU without 16-bit units takes float32.
    """
    if wanted != "auto":
        return DTYPES[wanted]
    policy = DTYPES[model.spec.precision.train_compute]
    if policy == torch.float32:
        return policy
    if device.type == "cuda":
        return policy if policy == torch.float16 or torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    return torch.bfloat16 if computes_bfloat16() else torch.float32


def has_compiler() -> bool:
    """Whether torch.compile can build code for the CPU: there is a C++ compiler."""
    return any(shutil.which(name) for name in ("g++", "clang++"))
