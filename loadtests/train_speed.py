"""What training costs: tokens a second in float32 and under mixed precision, and what gradient checkpointing saves.

    python -m loadtests.train_speed [--line 2.3] [--shape nano] [--length 512] [--tokens 2048] [--steps 4] [--rounds 3] [--keep]

Rounds alternate between the kinds. Tokens are random: speed does not depend on what they say. Activation bytes are those that autograd
saves between forward and backward (parameters not counted), the same number on every device; the resident peak stands beside. A cost ratio
is the inverse of the speed ratio: the same machine for less time.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import time
from contextlib import nullcontext
from typing import Any

import torch

from loadtests.rows import keep, spread, surroundings
from service.models.build import build, init_weights
from service.models.decoder import Decoder
from service.train.memory import keep_freed_memory
from service.train.objective import sequence_loss
from service.types.catalog import find_line

KINDS = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def run_step(model: Decoder, optimizer: torch.optim.Optimizer, inputs: torch.Tensor, length: int, dtype: torch.dtype) -> float:
    """One forward, backward and update on random tokens; the loss in nats a token."""
    mixed = torch.autocast(inputs.device.type, dtype=dtype) if dtype != torch.float32 else nullcontext()
    with mixed:
        loss = sequence_loss(model, inputs, inputs.roll(-1), length) / len(inputs)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return float(loss.detach())


def saved_bytes(model: Decoder, inputs: torch.Tensor, length: int, recompute: bool) -> int:
    """Bytes of the distinct tensors that autograd keeps for the backward pass, parameters left out."""
    kept: dict[int, int] = {}
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    model.gradient_checkpointing_enable(recompute)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        sequence_loss(model, inputs, inputs.roll(-1), length)
    model.gradient_checkpointing_enable(False)
    return sum(kept.values())


def main() -> None:
    """Measure, print, keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--line", default="2.3")
    parser.add_argument("--shape", default="nano")
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=2048, help="tokens of a step")
    parser.add_argument("--steps", type=int, default=4, help="steps of a round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=list(KINDS))
    parser.add_argument("--checkpointing", action="store_true", help="recompute layers in the timed steps")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--keep", action="store_true", help="append the row to results/train_speed.jsonl")
    given = parser.parse_args()
    keep_freed_memory()
    line = find_line(given.line)
    if line is None or given.shape not in dict(line.shapes):
        parser.error(f"no line {given.line} with shape {given.shape}")
    model = build(line.spec(dict(line.shapes)[given.shape]), given.device, torch.float32)
    init_weights(model, 0)
    inputs = torch.randint(0, model.spec.vocab_size, (given.tokens,), device=given.device)
    memory = {name: saved_bytes(model, inputs, given.length, name == "checkpointed") for name in ("plain", "checkpointed")}
    model.gradient_checkpointing_enable(given.checkpointing)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    speeds: dict[str, list[float]] = {kind: [] for kind in given.kinds}
    losses: dict[str, float] = {}
    for turn in range(given.rounds + 1):
        for kind, taken in speeds.items():
            began = time.perf_counter()
            for _ in range(given.steps):
                losses[kind] = run_step(model, optimizer, inputs, given.length, KINDS[kind])
            if turn:  # the first round warms up
                taken.append(given.steps * given.tokens / (time.perf_counter() - began))
    row: dict[str, Any] = {
        "what": "train_speed",
        **surroundings(),
        "torch": torch.__version__,
        "device": given.device,
        "line": line.label,
        "shape": given.shape,
        "parameters": model.spec.parameters,
        "length": given.length,
        "step_tokens": given.tokens,
        "checkpointing": given.checkpointing,
        "tokens_per_s": {kind: spread(values) for kind, values in speeds.items()},
        "model_gflop_s": {
            kind: round(statistics.median(values) * 3 * model.spec.flops(1, given.length / 2) / 1e9, 2) for kind, values in speeds.items()
        },
        "activation_bytes": memory,
        "activation_saving": round(1 - memory["checkpointed"] / memory["plain"], 4),
        "loss": {kind: round(loss, 4) for kind, loss in losses.items()},
        "peak_resident_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
    }
    if set(given.kinds) == set(KINDS):
        ratios = [mixed / full for mixed, full in zip(speeds["bfloat16"], speeds["float32"], strict=True)]
        row["mixed_over_float32"] = spread(ratios)
        row["cost_ratio"] = round(1 / statistics.median(ratios), 3)
    if given.keep:
        keep("train_speed", row)
    print(row)


if __name__ == "__main__":
    main()
