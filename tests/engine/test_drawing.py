"""Tokens drawn where the logits lie are those of the host's sampler, whatever mixture of rows a step has."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from service.engine import drawing
from service.engine.distribution import Ints
from service.engine.drawing import Drawing
from service.engine.sampler import Sampler, Samples
from service.kernels.dispatch import take_counts
from service.types.request import Sampling, Stop

VOCABULARY = 60
PLAIN = (
    Sampling(temperature=0.0),
    Sampling(seed=3),
    Sampling(seed=4, temperature=0.7, top_k=9),
    Sampling(seed=5, top_p=0.8),
    Sampling(seed=6, min_p=0.2),
)
OTHERS = (Sampling(seed=7, logprobs=2), Sampling(seed=8, presence_penalty=1.5), Sampling(seed=9, logit_bias=((3, 5.0),)))


def filled(kinds: tuple[Sampling, ...], stop: Stop) -> Sampler:
    sampler = Sampler(len(kinds), VOCABULARY)
    for row, sampling in enumerate(kinds):
        sampler.open(row, sampling, stop, prompt_tokens=4)
    return sampler


def draw(sampler: Sampler, logits: Tensor, rows: Ints, positions: Ints, table: NDArray[np.int32]) -> Samples:
    return Drawing(sampler, rows, positions, np.arange(len(rows)), logits.device).tokens(logits, table)


@pytest.fixture
def on_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens are drawn as on a device."""
    monkeypatch.setattr(drawing, "draws_on", lambda device: True)


@pytest.mark.usefixtures("on_device")
@pytest.mark.parametrize("kinds", [PLAIN, OTHERS, PLAIN + OTHERS, OTHERS[:1] + PLAIN])
@pytest.mark.parametrize("min_tokens", [0, 3])
def test_every_mixture_gives_the_host_s_tokens(kinds: tuple[Sampling, ...], min_tokens: int) -> None:
    sampler = filled(kinds, Stop(8, end_ids=(5,), min_tokens=min_tokens))
    rows, positions = np.arange(len(kinds))[::-1].copy(), np.full(len(kinds), 6)
    table = np.tile(np.arange(8, dtype=np.int32), (len(kinds), 1))
    for seed in range(5):
        logits = torch.randn(len(kinds), VOCABULARY, generator=torch.Generator().manual_seed(seed)) * 2
        logits[0, 5] = 9.0 if seed == 0 else logits[0, 5]
        expected = sampler.sample(logits.numpy().copy(), rows, positions, table)
        found = draw(sampler, logits, rows, positions, table)
        assert found.tokens.tolist() == expected.tokens.tolist() and found.logprobs == expected.logprobs


@pytest.mark.usefixtures("on_device")
def test_rows_without_a_finite_peak_fail_alone() -> None:
    sampler = filled(PLAIN, Stop(8))
    logits = torch.randn(5, VOCABULARY)
    logits[1, 7], logits[3] = torch.nan, -torch.inf
    tokens = draw(sampler, logits, np.arange(5), np.full(5, 6), np.zeros((5, 8), np.int32)).tokens
    assert [token >= 0 for token in tokens] == [True, False, True, False, True]


@pytest.mark.usefixtures("on_device")
def test_only_what_needs_the_host_goes_there() -> None:
    sampler = filled(PLAIN + OTHERS, Stop(8, end_ids=(5,), min_tokens=3))
    assert sampler.is_plain(np.arange(8), np.full(8, 7)).tolist() == [True] * 5 + [False] * 3
    assert not sampler.is_plain(np.arange(8), np.full(8, 6)).any()
    take_counts()
    logits, table = torch.randn(3, VOCABULARY), np.zeros((8, 8), np.int32)
    draw(sampler, logits, np.array([5, 6, 7]), np.full(3, 7), table)
    assert not any(operation == "sample" for operation, _ in take_counts())
    draw(sampler, logits, np.array([5, 1, 7]), np.full(3, 7), table)
    assert take_counts()["sample", "reference"] == 1


def test_on_a_cpu_the_host_samples() -> None:
    sampler = filled((replace(PLAIN[1], seed=11),), Stop(8))
    logits, table = torch.randn(1, VOCABULARY), np.zeros((1, 8), np.int32)
    take_counts()
    token = draw(sampler, logits.clone(), np.array([0]), np.array([6]), table).tokens
    assert not take_counts() and token.tolist() == sampler.sample(logits.numpy(), np.array([0]), np.array([6]), table).tokens.tolist()


def test_states_are_those_that_are_drawn_from() -> None:
    drawn = Drawing(filled(PLAIN[:2], Stop(8)), np.array([1, 0]), np.array([6, 7]), np.array([4, 2]), torch.device("cpu"))
    hidden = torch.arange(15.0).view(5, 3)
    assert drawn.states(hidden).tolist() == [hidden[4].tolist(), hidden[2].tolist()]
