"""Sampling on the GPU's kernel against the host's sampler: same tokens, ties, borders, bad rows; and a check that a fault would show."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

pytest.importorskip("triton")

from service.engine.distribution import Filters, draw
from service.engine.sampler import GREEDY_BELOW
from service.kernels.gpu import sampling
from tests.kernels.gpu.conftest import DEVICE


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces so small that a short vocabulary fills several."""
    monkeypatch.setattr(sampling, "PIECE", 64)


def sampled(logits: Tensor, numbers: Any, temperature: Any = 1.0, top_k: Any = 0, top_p: Any = 1.0, min_p: Any = 0.0) -> list[int]:
    def column(values: Any, dtype: torch.dtype) -> Tensor:
        return torch.broadcast_to(torch.as_tensor(values, dtype=dtype), (len(logits),)).contiguous().to(DEVICE)

    columns = (column(temperature, torch.float32), column(top_k, torch.int64), column(top_p, torch.float64), column(min_p, torch.float32))
    return sampling.sample(logits.to(DEVICE), *columns, column(numbers, torch.float64), GREEDY_BELOW).tolist()  # type: ignore[no-any-return]


def on_the_host(
    logits: Tensor, numbers: Any, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0
) -> list[int]:
    rows = len(logits)
    scores = logits.float().numpy().copy()
    scores -= scores.max(axis=1, keepdims=True)
    scores /= np.float32(temperature)
    filters = Filters(np.full(rows, top_k), np.full(rows, top_p), np.full(rows, min_p))
    return draw(scores, filters, np.broadcast_to(np.asarray(numbers, np.float64), (rows,))).tolist()  # type: ignore[no-any-return]


def drawn(rows: int, vocabulary: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(seed)) * 3


FILTERS: tuple[dict[str, Any], ...] = (
    {},
    {"temperature": 0.5},
    {"top_k": 1},
    {"top_k": 7, "temperature": 2.0},
    {"top_k": 500},
    {"top_p": 0.01},
    {"top_p": 0.9},
    {"top_k": 20, "top_p": 0.8},
    {"min_p": 0.1},
    {"top_k": 40, "top_p": 0.95, "min_p": 0.05, "temperature": 0.8},
)


@pytest.mark.parametrize("filters", FILTERS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_tokens_are_those_of_the_host(filters: dict[str, Any], dtype: torch.dtype) -> None:
    logits, numbers = drawn(4, 150).to(dtype), torch.rand(4, generator=torch.Generator().manual_seed(1), dtype=torch.float64).numpy()
    assert sampled(logits, numbers, **filters) == on_the_host(logits, numbers, **filters)


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.integers(-3, 3), min_size=2, max_size=70),
    st.floats(0, 1, exclude_max=True),
    st.integers(0, 12),
    st.sampled_from([1.0, 0.97, 0.55, 0.2]),
)
def test_ties_go_to_the_smaller_id(values: list[int], number: float, top_k: int, top_p: float) -> None:
    logits = torch.tensor([values], dtype=torch.float32)
    token, expected = sampled(logits, number, top_k=top_k, top_p=top_p)[0], on_the_host(logits, number, top_k=top_k, top_p=top_p)[0]
    if token != expected:  # a number within rounding of a border may fall on either side of it
        near = {on_the_host(logits, min(max(number + off, 0.0), 1 - 1e-12), top_k=top_k, top_p=top_p + shift)[0]
                for off in (-1e-6, 0.0, 1e-6) for shift in (-1e-6, 0.0, 1e-6)}  # fmt: skip
        assert token in near


def test_greedy_takes_the_first_of_the_best() -> None:
    logits = torch.tensor([[1.0, 5.0, 5.0, 2.0], [0.0, 0.0, 0.0, 0.0]])
    assert sampled(logits, 0.99, temperature=0.0) == [1, 0]


def test_rows_without_a_finite_peak_give_minus_one() -> None:
    logits = drawn(5, 100)
    logits[0, 70], logits[1, 3], logits[2] = torch.nan, torch.inf, -torch.inf
    logits[3, :99] = -torch.inf
    tokens = sampled(logits, 0.5)
    assert tokens[:3] == [-1, -1, -1] and tokens[3] == 99 and tokens[4] == on_the_host(logits[4:], 0.5)[0]


def test_a_row_does_not_depend_on_the_rows_beside_it() -> None:
    logits, numbers = drawn(6, 130), torch.rand(6, dtype=torch.float64).numpy()
    together = sampled(logits, numbers, top_p=0.9)
    assert [sampled(logits[row : row + 1], numbers[row], top_p=0.9)[0] for row in range(6)] == together


def test_draws_follow_the_distribution() -> None:
    logits, numbers = drawn(1, 40).expand(64, 40), (np.arange(64) + 0.5) / 64
    tokens = sampled(logits, numbers, top_k=5)
    kept = set(logits[0].topk(5).indices.tolist())
    assert set(tokens) <= kept and tokens == sorted(tokens) and len(set(tokens)) > 1
    weights = torch.softmax(logits[0].masked_fill(~torch.isin(torch.arange(40), torch.tensor(sorted(kept))), -torch.inf), 0)
    for token in kept:
        assert abs(tokens.count(token) / 64 - weights[token]) < 2 / 64
    assert sampled(logits, numbers, top_k=4) != tokens
