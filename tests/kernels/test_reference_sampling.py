"""The reference of sampling against the host's sampler: filters alone and together, ties, greedy rows, rows without a finite peak."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from service.engine.distribution import Filters, draw
from service.kernels.reference_sampling import sample

ROWS, VOCABULARY = 40, 300


@pytest.mark.parametrize("top_k", [0, 1, 7, 500])
@pytest.mark.parametrize("top_p", [1.0, 0.9, 0.05])
@pytest.mark.parametrize("min_p", [0.0, 0.1])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_tokens_are_those_of_the_host(top_k: int, top_p: float, min_p: float, temperature: float) -> None:
    generator = torch.Generator().manual_seed(top_k)
    logits = (torch.randn(ROWS, VOCABULARY, generator=generator) * 4).round() / 2  # many ties
    numbers = torch.rand(ROWS, generator=generator, dtype=torch.float64)
    scores = (logits - logits.max(dim=1, keepdim=True).values) / temperature
    filters = Filters(np.full(ROWS, top_k), np.full(ROWS, top_p), np.full(ROWS, min_p))
    expected = draw(scores.numpy().copy(), filters, numbers.numpy())
    columns = (
        torch.full((ROWS,), temperature),
        torch.full((ROWS,), top_k),
        torch.full((ROWS,), top_p).double(),
        torch.full((ROWS,), min_p),
    )
    assert sample(logits, *columns, numbers, 1e-5).tolist() == expected.tolist()


def test_greedy_rows_and_rows_without_a_finite_peak() -> None:
    logits = torch.tensor([[1.0, 5.0, 5.0], [0.0, torch.nan, 1.0], [torch.inf, 0.0, 0.0], [-torch.inf] * 3, [-torch.inf, -torch.inf, 0.0]])
    zeros, whole = torch.zeros(5), torch.zeros(5, dtype=torch.int64)
    assert sample(logits, zeros, whole, torch.ones(5).double(), zeros, zeros.double(), 1e-5).tolist() == [1, -1, -1, -1, 2]
    assert sample(logits, zeros + 1, whole, torch.ones(5).double(), zeros, zeros.double(), 1e-5).tolist() == [0, -1, -1, -1, 2]
