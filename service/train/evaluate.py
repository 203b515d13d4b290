"""Held-out loss: mean negative log-likelihood of a row of tokens, in nats a token and bits a byte.

It does not know optimisers or files. Invariant: weights are not changed, and every token but the first is scored exactly once.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from service.models.decoder import Decoder
from service.train.objective import sequence_loss

PASS_TOKENS = 2048


@dataclass(frozen=True, slots=True)
class HeldOut:
    """Loss over `tokens` scored tokens that stand for `text_bytes` bytes."""

    nats_per_token: float
    tokens: int
    text_bytes: int

    @property
    def bits_per_byte(self) -> float:
        """Nats of all tokens over ln 2, for each byte of text."""
        return self.nats_per_token * self.tokens / math.log(2) / self.text_bytes


@torch.no_grad()
def held_out_loss(model: Decoder, tokens: npt.NDArray[np.uint16], token_bytes: list[int], length: int, most: int = 0) -> HeldOut:
    """Score `tokens` in stretches of `length`, each seeing only itself; `most` > 0 scores the first `most` only.

    `token_bytes` gives each id's length in bytes (0 for special tokens).
    """
    device = next(model.parameters()).device
    row = torch.from_numpy(tokens[: most + 1 if most else None].astype("int64")).to(device)
    inputs, targets = row[:-1], row[1:]
    taken = length * max(1, PASS_TOKENS // length)
    whole = len(inputs) - len(inputs) % length
    total = 0.0
    for start in range(0, whole, taken):
        end = min(start + taken, whole)
        total += float(sequence_loss(model, inputs[start:end], targets[start:end], length))
    if whole < len(inputs):
        total += float(sequence_loss(model, inputs[whole:], targets[whole:], len(inputs) - whole))
    return HeldOut(total / len(inputs), len(inputs), sum(token_bytes[index] for index in targets.tolist()))
