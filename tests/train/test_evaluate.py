"""Held-out loss against its definition."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from service.models.attention import DenseAttend
from service.models.build import build, init_weights
from service.train.evaluate import HeldOut, held_out_loss
from service.train.prepare import PreparedRun


def test_every_token_but_the_first_is_scored_once(prepared: PreparedRun) -> None:
    model = build(prepared.spec, "cpu", torch.float32)
    init_weights(model, 3)
    row = prepared.held_out.tokens[:101]
    total = 0.0
    for start in range(0, 100, 40):  # stretches of 40, 40 and 20
        seen = torch.from_numpy(row[start : min(start + 40, 100)].astype(np.int64))
        wanted = torch.from_numpy(row[start + 1 : min(start + 41, 101)].astype(np.int64))
        logits = model(seen, torch.arange(len(seen)), DenseAttend(1, len(seen), prepared.spec.layers)).double()
        total -= logits.log_softmax(-1)[torch.arange(len(seen)), wanted].sum().item()
    measured = held_out_loss(model, prepared.held_out.tokens, prepared.tokenizer.token_bytes, 40, 100)
    assert measured.tokens == 100
    assert measured.nats_per_token == pytest.approx(total / 100, rel=1e-5)
    assert measured.text_bytes == len(prepared.tokenizer.decode(row[1:].tolist()).encode())


def test_bits_per_byte() -> None:
    assert HeldOut(nats_per_token=2 * math.log(2), tokens=30, text_bytes=60).bits_per_byte == pytest.approx(1.0)
