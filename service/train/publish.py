"""The end of a run: its row, its card, its loss plot and the checkpoint directory in this project's own format.

It does not train. Invariant: what the card and the row say was measured on the weights as they are stored.
"""

from __future__ import annotations

import json
import platform
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from service.checkpoints.store import save
from service.processor import cpu_name
from service.train.card import Sample, write_card
from service.train.loop import Trainer
from service.train.picture_stream import PictureStream, right_answers
from service.train.plot import plot_losses
from service.train.prepare import PreparedRun
from service.train.run import EVALUATION_LENGTH, Outcome
from service.train.sample import continue_ids

CHECKPOINT = "checkpoint"
PICTURE_QUESTIONS = 200


def publish(trainer: Trainer, run: PreparedRun, outcome: Outcome, out: Path, results: Path | None) -> str:
    """Write DIR/checkpoint, DIR/row.json and, where matplotlib is there, DIR/loss.png; append the row to `results`. Returns the row."""
    row = _row(trainer, run, outcome)
    extras = run.tokenizer.files(run.spec.context_tokens)
    extras["README.md"] = write_card(run, row, _samples(trainer, run)).encode()
    extras["corpus.txt"] = run.corpus.manifest.encode()
    extras["training.json"] = (json.dumps(row, indent=1) + "\n").encode()
    part = run.recipe.publish
    generation = {"temperature": part.temperature, "top_p": part.top_p}
    manifest = save(out / CHECKPOINT, run.spec, outcome.weights, extras, dtype=part.dtype, generation=generation)
    line = json.dumps({**row, "artifact": f"{run.line.label}@{manifest.digest[:12]}"})
    (out / "row.json").write_text(line + "\n", encoding="utf-8")
    plot_losses(trainer.state, out / "loss.png")
    if results is not None:
        results.parent.mkdir(parents=True, exist_ok=True)
        with results.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
    return line


def _row(trainer: Trainer, run: PreparedRun, outcome: Outcome) -> dict[str, Any]:
    state, held_out, full = trainer.state, outcome.held_out, outcome.full_context
    compared = {"last": outcome.last, "average": outcome.average}
    choice = ", ".join(f"{name} {loss.nats_per_token:.4f}" for name, loss in compared.items() if loss is not None)
    return {
        "kind": "training",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "recipe": run.recipe.name,
        "recipe_digest": run.recipe.digest,
        "identity": run.identity,
        "corpus_digest": run.corpus.digest,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cpu": cpu_name(),
        "device": trainer.device.type,
        "threads": torch.get_num_threads(),
        "dtype": str(trainer.dtype).removeprefix("torch."),
        "parameters": run.spec.parameters,
        "steps": state.step,
        "tokens": state.tokens,
        "longest": max(phase.tokens for phase in run.recipe.schedule.lengths),
        "epochs": state.tokens / len(run.train),
        "minutes": round(state.elapsed_s / 60, 2),
        "tokens_per_s": round(state.tokens / state.elapsed_s, 1) if state.elapsed_s else 0.0,
        "weights": outcome.chosen,
        "choice": f"held-out nats/token on the first {outcome.last.tokens:,} tokens: {choice}",
        "length": EVALUATION_LENGTH,
        "nats_per_token": round(held_out.nats_per_token, 5),
        "bits_per_byte": round(held_out.bits_per_byte, 5),
        "held_out_tokens": held_out.tokens,
        "full_context": {
            "length": run.spec.context_tokens,
            "nats_per_token": round(full.nats_per_token, 5),
            "bits_per_byte": round(full.bits_per_byte, 5),
        },
        **_extras(trainer, run, outcome),
        "probe": asdict(outcome.probe),
        "curve": _curve(state.losses),
        "evaluations": [[step, tokens, round(loss, 4)] for step, tokens, loss in state.evaluations],
    }


def _extras(trainer: Trainer, run: PreparedRun, outcome: Outcome) -> dict[str, Any]:
    """What only some runs have: the group's size, the teacher, what it began with, the same weights without quantisation."""
    found: dict[str, Any] = {}
    if trainer.group.size > 1:
        found["processes"] = trainer.group.size
    if run.teacher is not None:
        found["teacher"] = {"artifact": run.teacher.artifact, "parameters": run.teacher.manifest.spec.parameters}
    if run.init is not None:
        found["init"] = run.init.artifact
        if run.recipe.average.init:
            found["init_share"] = run.recipe.average.init
    if run.pictures is not None and isinstance(run.train, PictureStream):
        found["pictures"] = {
            "source": run.recipe.pictures.source if run.recipe.pictures else "",
            "learned": len(run.pictures.found.train),
            "held_out": len(run.pictures.found.held_out),
            "questions": PICTURE_QUESTIONS,
            "right": right_answers(trainer.model, run.train, run.pictures, PICTURE_QUESTIONS),
        }
    if outcome.unquantised is not None:
        plain = outcome.unquantised.nats_per_token
        found["int8"] = {"unquantised_nats_per_token": round(plain, 5), "loss_ratio": round(outcome.held_out.nats_per_token / plain, 5)}
    return found


def _curve(losses: list[tuple[int, int, float]], points: int = 40) -> list[list[float]]:
    """[tokens, mean training loss] of about `points` equal stretches of the run."""
    size = max(1, -(-len(losses) // points))
    stretches = (losses[first : first + size] for first in range(0, len(losses), size))
    return [[stretch[-1][1], round(sum(loss for _, _, loss in stretch) / len(stretch), 4)] for stretch in stretches]


def _samples(trainer: Trainer, run: PreparedRun) -> list[Sample]:
    part, codec, samples = run.recipe.samples, run.tokenizer, []
    for chat, prompts in ((False, part.prompts), (True, part.chats)):
        for prompt in prompts:
            ids = codec.encode_chat(prompt) if chat else codec.encode([prompt])[0]
            for temperature in part.temperatures:
                text = codec.decode(continue_ids(trainer.model, ids, part.tokens, temperature, run.recipe.seed))
                samples.append(Sample(prompt, text, temperature, chat))
    return samples
