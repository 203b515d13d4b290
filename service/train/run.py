"""One run from the first step to the last: steps until the budget is spent, held-out loss on the way, state files against a kill.

It knows a trainer and what was prepared, not terminals (a `Watcher` is told) or how the result is published. Invariant: after any
interruption the state file holds a step's end.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from torch import Tensor

from service.train.evaluate import HeldOut, held_out_loss
from service.train.loop import DTYPES, StepReport, Trainer
from service.train.prepare import PreparedRun

EVALUATION_LENGTH = 512
PROBE_CHARACTERS = 1500


class Watcher(Protocol):
    """Who is told how a run goes."""

    def stepped(self, report: StepReport) -> None:
        """A step ended."""

    def evaluated(self, report: StepReport, held_out: HeldOut) -> None:
        """The held-out loss was measured after that step."""


@dataclass(frozen=True, slots=True)
class Probe:
    """The beginning of a held-out file and its loss, kept with a checkpoint so that anyone can measure it again."""

    text: str
    tokens: int
    nats_per_token: float


@dataclass(frozen=True, slots=True)
class Outcome:
    """The weights to publish: of the last step or their average, whichever lost less on the first `evaluate.tokens` held-out tokens.

    `last` and `average` are those losses. `held_out` (stretches of EVALUATION_LENGTH tokens), `full_context` (stretches of the whole
    context) and `probe` were measured on the chosen weights rounded to the type they are stored in. After quantisation-aware training
    everything is measured as int8 computes, and `unquantised` is `held_out` of the same weights in floating point.
    """

    weights: dict[str, Tensor]
    chosen: str
    last: HeldOut
    average: HeldOut | None
    held_out: HeldOut
    full_context: HeldOut
    probe: Probe
    unquantised: HeldOut | None = None


def train(trainer: Trainer, run: PreparedRun, state_file: Path, watcher: Watcher, stopping: Callable[[], bool] = lambda: False) -> bool:
    """Step until the budget is spent (True) or `stopping` says so at a step's end (False).

    The state is saved every `checkpoint_minutes` and at the end.
    """
    saved_s = trainer.state.elapsed_s
    token_bytes = run.tokenizer.token_bytes
    while trainer.progress < 1.0 and not trainer.group.any(stopping()):
        report = trainer.step()
        watcher.stepped(report)
        if trainer.group.leads and len(trainer.state.evaluations) < int(report.progress * run.recipe.evaluate.times):
            held_out = held_out_loss(trainer.model, run.held_out.tokens, token_bytes, EVALUATION_LENGTH, run.recipe.evaluate.tokens)
            trainer.state.evaluations.append((report.step, report.tokens, held_out.nats_per_token))
            watcher.evaluated(report, held_out)
        if report.elapsed_s - saved_s >= 60.0 * run.recipe.checkpoint_minutes:
            trainer.save(state_file)
            saved_s = report.elapsed_s
    trainer.save(state_file)
    return trainer.progress >= 1.0


def conclude(trainer: Trainer, run: PreparedRun) -> Outcome:
    """Choose the weights and measure them on the `final_tokens` of the recipe. Leaves them, rounded, in the model."""
    if run.recipe.quantise is not None:
        trainer.quantise(True)
    token_bytes, tokens, model = run.tokenizer.token_bytes, run.held_out.tokens, trainer.model
    chosen, weights = "last", {name: weight.detach().clone() for name, weight in model.state_dict().items()}
    last = held_out_loss(model, tokens, token_bytes, EVALUATION_LENGTH, run.recipe.evaluate.tokens)
    average = None
    if trainer.averaged():
        model.load_state_dict(trainer.averaged())
        average = held_out_loss(model, tokens, token_bytes, EVALUATION_LENGTH, run.recipe.evaluate.tokens)
        if average.nats_per_token < last.nats_per_token:
            chosen, weights = "average", dict(trainer.averaged())
    stored = DTYPES[run.recipe.publish.dtype]
    weights = {name: weight.to(stored) for name, weight in _towards_init(weights, run).items()}
    model.load_state_dict(weights)
    final = run.recipe.evaluate.final_tokens
    held_out = held_out_loss(model, tokens, token_bytes, EVALUATION_LENGTH, final)
    full = held_out_loss(model, tokens, token_bytes, run.spec.context_tokens, final)
    probe, unquantised = _probe(trainer, run), None
    if run.recipe.quantise is not None:
        trainer.quantise(False)
        unquantised = held_out_loss(model, tokens, token_bytes, EVALUATION_LENGTH, final)
        trainer.quantise(True)
    return Outcome(weights, chosen, last, average, held_out, full, probe, unquantised)


def _towards_init(weights: dict[str, Tensor], run: PreparedRun) -> dict[str, Tensor]:
    """The weights, or what lies as far back to those that the run began with as the recipe says."""
    share = run.recipe.average.init
    if not share or run.init is None:
        return weights
    began = run.init.load(next(iter(weights.values())).device).state_dict()
    return {name: weight.lerp(began[name].to(weight.dtype), share) for name, weight in weights.items()}


def _probe(trainer: Trainer, run: PreparedRun) -> Probe:
    text = max(run.corpus.held_out, key=len)[:PROBE_CHARACTERS]
    ids = np.asarray(run.tokenizer.encode([text])[0], dtype=np.uint16)
    measured = held_out_loss(trainer.model, ids, run.tokenizer.token_bytes, run.spec.context_tokens)
    return Probe(text, measured.tokens, measured.nats_per_token)
