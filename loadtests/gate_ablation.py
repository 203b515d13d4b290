"""What v1.0's gates are worth: the nano model with them beside a plain llama of the same size, on the same tokens.

    python -m loadtests.gate_ablation [--steps 300] [--seeds 1] [--keep]

The plain one has neither gates nor norms of queries and keys, and a feed-forward as much wider as makes up for the
parameters. Both take the recipe of v1.0 with `--steps` of short sequences, the same batches in the same order, and are
measured on the same held-out tokens. The gated one is measured once more with every gate at its mean: what it loses then
is what the gates decide token by token.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from loadtests.rows import keep, surroundings
from service.models.decoder import Decoder
from service.train.evaluate import held_out_loss
from service.train.prepare import PreparedRun, prepare
from service.train.recipe import Recipe, load_recipe
from service.train.recipe_parts import LengthPhase
from service.train.start import start
from service.types.model_spec import DenseMlp, GroupedQueryAttention, ModelSpec

LENGTH = 512
MULTIPLE = 8


def plain_spec(spec: ModelSpec) -> ModelSpec:
    """A llama of as many parameters as `spec`, to within what one multiple of `MULTIPLE` in the feed-forward's width changes."""

    def with_width(width: int) -> ModelSpec:
        layers = []
        for layer in spec.layers:
            if not isinstance(layer.attention, GroupedQueryAttention):
                raise TypeError("the gates to leave out are those of grouped-query attention")
            layers.append(replace(layer, attention=replace(layer.attention, gate=False, qk_norm=False), mlp=DenseMlp(width)))
        return replace(spec, layers=tuple(layers))

    width = MULTIPLE
    while with_width(width + MULTIPLE).parameters <= spec.parameters:
        width += MULTIPLE
    return with_width(width)


def shortened(recipe: Recipe, steps: int, seed: int) -> Recipe:
    """The recipe with that budget in sequences of LENGTH tokens, not compiled, so that both models are computed alike."""
    schedule = replace(recipe.schedule, steps=steps, lengths=(LengthPhase(until=1.0, tokens=LENGTH),))
    return replace(recipe, seed=seed, compile=False, schedule=schedule)


def trained(run: PreparedRun, tokens: int) -> tuple[Decoder, float]:
    """The model after its steps, and its held-out loss in nats a token."""
    trainer = start(run, "cpu")
    while trainer.progress < 1.0:
        trainer.step()
    loss = held_out_loss(trainer.model, run.held_out.tokens, run.tokenizer.token_bytes, LENGTH, tokens)
    return trainer.model, loss.nats_per_token


def with_mean_gates(model: Decoder, run: PreparedRun, tokens: int) -> float:
    """The held-out loss with each head's gate at its mean over the same tokens."""
    gates = [module for name, module in model.named_modules() if name.endswith(".gate")]
    if not gates:
        raise ValueError("the model has no gates")
    sums: dict[int, tuple[Tensor, int]] = {}

    def note(module: nn.Module, _: Any, output: Tensor) -> None:
        opened = output.sigmoid().flatten(0, -2)
        total, rows = sums.get(id(module), (torch.zeros(opened.size(-1)), 0))
        sums[id(module)] = (total + opened.sum(0), rows + len(opened))

    def hold(module: nn.Module, _: Any, output: Tensor) -> Tensor:
        total, rows = sums[id(module)]
        return (total / rows).logit().expand_as(output)

    def measured(hook: Any) -> float:
        hooks = [gate.register_forward_hook(hook) for gate in gates]
        loss = held_out_loss(model, run.held_out.tokens, run.tokenizer.token_bytes, LENGTH, tokens)
        for handle in hooks:
            handle.remove()
        return loss.nats_per_token

    measured(note)
    return measured(hold)


def main() -> None:
    """Train both, measure, print, keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300, help="steps of the recipe's batch_tokens for each model")
    parser.add_argument("--seeds", type=int, default=1, help="pairs of runs, each with weights and batches of its own")
    parser.add_argument("--tokens", type=int, default=65_536, help="held-out tokens to measure on")
    parser.add_argument("--keep", action="store_true", help="append the row to results/gate_ablation.jsonl")
    given = parser.parse_args()
    losses: dict[str, list[float]] = {"gated": [], "plain": [], "gates at their means": []}
    sizes: dict[str, int] = {}
    recipe = load_recipe("nano-v1.0")
    for seed in range(given.seeds):
        run = prepare(shortened(recipe, given.steps, recipe.seed + seed))
        for name, spec in (("gated", run.spec), ("plain", plain_spec(run.spec))):
            model, loss = trained(replace(run, spec=spec), given.tokens)
            sizes[name] = spec.parameters
            losses[name].append(round(loss, 4))
            if name == "gated":
                losses["gates at their means"].append(round(with_mean_gates(model, run, given.tokens), 4))
    row = {
        "what": "gate_ablation",
        **surroundings(),
        "torch": torch.__version__,
        "learned_tokens": given.steps * recipe.schedule.batch_tokens,
        "held_out_tokens": given.tokens,
        "length": LENGTH,
        "parameters": sizes,
        "nats_per_token": losses,
        "gated_minus_plain": [round(gated - plain, 4) for gated, plain in zip(losses["gated"], losses["plain"], strict=True)],
    }
    if given.keep:
        keep("gate_ablation", row)
    print(row)


if __name__ == "__main__":
    main()
