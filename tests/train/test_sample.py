"""Continuations for the card."""

from __future__ import annotations

from dataclasses import replace

import torch

from service.models.build import build, init_weights
from service.models.decoder import Decoder
from service.train.prepare import PreparedRun
from service.train.sample import continue_ids


def model(prepared: PreparedRun) -> Decoder:
    made = build(prepared.spec, "cpu", torch.float32)
    init_weights(made, 1)
    return made


def test_greedy_takes_the_likeliest_and_seeds_decide_the_rest(prepared: PreparedRun) -> None:
    made = model(prepared)
    greedy = continue_ids(made, [20, 30], 6, 0.0, 1)
    assert len(greedy) == 6 and greedy == continue_ids(made, [20, 30], 6, 0.0, 2)
    drawn = [continue_ids(made, [20, 30], 6, 5.0, seed) for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_it_stops_at_an_end_token_and_at_the_context(prepared: PreparedRun) -> None:
    made = model(prepared)
    first = continue_ids(made, [20, 30], 1, 0.0, 1)[0]
    assert len(continue_ids(made, [20] * 60, 20, 0.0, 1)) == 4
    made.spec = replace(made.spec, end_ids=(first,))
    assert continue_ids(made, [20, 30], 6, 0.0, 1) == []
