"""Sampling: each parameter's meaning, distributions, exact independence of the batch, ties, failures, frozen randomness."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.engine.distribution import Filters, draw, log_probs, uniform
from service.engine.sampler import Sampler
from service.types.request import Sampling, Stop

STOP = Stop(max_tokens=64)


def sample(logits, samplings, positions=None, tokens=None, stop=STOP, prompt_tokens=1):
    """The samples of a batch whose row i has samplings[i]."""
    logits = np.array(logits, np.float32)
    count = len(logits)
    sampler = Sampler(count, logits.shape[1])
    for row, sampling in enumerate(samplings):
        sampler.open(row, sampling, stop, prompt_tokens)
    positions = np.full(count, 1) if positions is None else np.array(positions)
    tokens = np.zeros((count, 64), np.int32) if tokens is None else np.array(tokens, np.int32)
    return sampler.sample(logits, np.arange(count), positions, tokens)


def frequencies(logits, sampling, draws=4000):
    """Observed shares of the tokens over many positions of one row's distribution."""
    logits = np.tile(np.array(logits, np.float32), (draws, 1))
    sampler = Sampler(1, logits.shape[1])
    sampler.open(0, sampling, STOP, 1)
    chosen = sampler.sample(logits, np.zeros(draws, np.int64), np.arange(1, draws + 1), np.zeros((1, draws + 2), np.int32)).tokens
    return np.bincount(chosen, minlength=logits.shape[1]) / draws


def softmax(values):
    weights = np.exp(np.array(values, np.float64) - np.max(values))
    return weights / weights.sum()


def assert_close(seen, expected, draws=4000):
    """Within five standard deviations (and five draws) of every share, and nothing where nothing may be."""
    expected = np.array(expected)
    assert (seen[expected == 0] == 0).all()
    assert (np.abs(seen - expected) <= 5 * np.sqrt(expected * (1 - expected) / draws) + 5 / draws).all()


def test_randomness_is_frozen() -> None:
    seeds = np.array([0, 0, 0, 1, 2**64 - 1], np.uint64)
    choices = np.array([0, 0, 1, 0, 3], np.uint64)
    positions = np.array([0, 1, 0, 0, 100_000])
    expected = [0.13870941014555427, 0.18436667429957676, 0.2691303195904541, 0.6935121390102292, 0.7270461486990315]
    assert uniform(seeds, choices, positions).tolist() == expected


def test_numbers_are_uniform_and_not_correlated() -> None:
    count = 20_000
    zeros = np.zeros(count, np.uint64)
    counter = np.arange(count)
    for numbers in (
        uniform(zeros, zeros, counter),
        uniform(counter.astype(np.uint64), zeros, np.zeros(count, np.int64)),
        uniform(zeros, counter.astype(np.uint64), np.zeros(count, np.int64)),
    ):
        assert (numbers >= 0).all() and (numbers < 1).all()
        bins = np.bincount((numbers * 50).astype(int), minlength=50)
        assert ((bins - count / 50) ** 2 / (count / 50)).sum() < 100  # 49 degrees of freedom: p < 2e-5
        assert abs(np.corrcoef(numbers[:-1], numbers[1:])[0, 1]) < 0.04


def test_greedy_takes_the_best_and_ties_go_to_the_smaller_id() -> None:
    logits = [[0, 3, 3, 1], [5, 1, 1, 5], [-9, -8, -9, -9]]
    assert sample(logits, [Sampling(temperature=0)] * 3).tokens.tolist() == [1, 0, 1]


def test_temperature_shapes_the_distribution() -> None:
    logits = [2.0, 1.0, 0.0, -1.0]
    for temperature in (0.5, 1.0, 2.0):
        assert_close(frequencies(logits, Sampling(temperature=temperature)), softmax(np.array(logits) / temperature))
    assert frequencies(logits, Sampling(temperature=1e-30), 50)[0] == 1.0


@pytest.mark.parametrize("vocab_size", [5, 256, 257, 1000])
def test_unfiltered_draws_follow_softmax_for_every_vocabulary_size(vocab_size: int) -> None:
    logits = np.random.default_rng(vocab_size).standard_normal(vocab_size) * 2
    assert_close(frequencies(logits, Sampling()), softmax(logits))


def test_top_k_keeps_k_and_breaks_ties_by_id() -> None:
    assert_close(frequencies([1.0, 2.0, 2.0, 2.0, 0.0], Sampling(top_k=2)), [0, 0.5, 0.5, 0, 0])
    flat = np.zeros(600)
    seen = frequencies(flat, Sampling(top_k=3))
    assert_close(seen, [1 / 3] * 3 + [0] * 597)
    assert_close(frequencies([1.0, 0.0], Sampling(top_k=50)), softmax([1.0, 0.0]))


def test_top_p_keeps_the_smallest_set_that_reaches_p() -> None:
    logits = np.log([0.5, 0.3, 0.15, 0.05])
    assert_close(frequencies(logits, Sampling(top_p=0.5)), [1, 0, 0, 0])
    assert_close(frequencies(logits, Sampling(top_p=0.51)), [0.625, 0.375, 0, 0])
    assert_close(frequencies(logits, Sampling(top_p=0.9)), np.array([0.5, 0.3, 0.15, 0]) / 0.95)
    assert_close(frequencies(logits, Sampling(top_p=1.0)), [0.5, 0.3, 0.15, 0.05])
    assert_close(frequencies(logits, Sampling(top_p=1e-9)), [1, 0, 0, 0])


def test_top_p_reaches_beyond_the_first_candidates() -> None:
    seen = frequencies(np.zeros(4000), Sampling(top_p=0.5), draws=3000)
    assert seen[2000:].sum() == 0
    assert (seen[:2000] > 0).sum() > 1400


@pytest.mark.parametrize("top_k", [2000, 4000, 9999])
def test_top_p_of_a_large_top_k_counts_all_that_top_k_keeps(top_k: int) -> None:
    flat = np.linspace(0.001, 0, 4000, dtype=np.float32)  # in order of their ids, and almost equally likely
    filters = Filters(np.array([top_k]), np.array([0.9]), np.zeros(1))
    reach = 0.9 * min(top_k, 4000)
    for number in (0.1, 0.5, 0.99):
        assert draw(flat[None] - flat.max(), filters, np.array([number]))[0] == pytest.approx(number * reach, rel=0.01)


def test_top_p_counts_after_top_k_and_min_p_comes_last() -> None:
    logits = np.log([0.4, 0.3, 0.2, 0.1])
    # Of the best two, 0.4 / 0.7 is already more than a half.
    assert_close(frequencies(logits, Sampling(top_k=2, top_p=0.55)), [1, 0, 0, 0])
    assert_close(frequencies(logits, Sampling(min_p=0.6)), np.array([4, 3, 0, 0]) / 7)
    assert_close(frequencies(logits, Sampling(top_k=3, min_p=0.6)), np.array([4, 3, 0, 0]) / 7)
    assert_close(frequencies(logits, Sampling(min_p=1.0)), [1, 0, 0, 0])


def test_penalties_and_bias() -> None:
    tokens = np.zeros((1, 64), np.int32)
    tokens[0, :5] = [1, 2, 3, 3, 3]  # the prompt is 1, 2; three tokens 3 were generated
    logits = np.array([[0.5, 4.0, -2.0, 3.0]], np.float32)

    def penalised(sampling):
        entry = sample(logits, [sampling], [5], tokens, prompt_tokens=2).logprobs[0]
        values = dict(entry.top)
        return np.array([values[token] for token in range(4)])

    def expected(values):
        return np.log(softmax(values))

    base = {"temperature": 0.0, "logprobs": 4}
    assert np.allclose(penalised(Sampling(**base)), expected(logits[0]), atol=1e-6)
    assert np.allclose(penalised(Sampling(**base, repetition_penalty=2.0)), expected([0.5, 2.0, -4.0, 1.5]), atol=1e-6)
    assert np.allclose(penalised(Sampling(**base, presence_penalty=1.0)), expected([0.5, 4.0, -2.0, 2.0]), atol=1e-6)
    assert np.allclose(penalised(Sampling(**base, frequency_penalty=1.0)), expected([0.5, 4.0, -2.0, 0.0]), atol=1e-6)
    assert np.allclose(penalised(Sampling(**base, logit_bias=((2, 5.0), (99, 5.0)))), expected([0.5, 4.0, 3.0, 3.0]), atol=1e-6)


def test_stop_ids_are_forbidden_before_min_tokens() -> None:
    logits = [[0.0, 5.0, 4.0, 3.0]]
    stop = Stop(max_tokens=9, min_tokens=2, token_ids=(1,), end_ids=(2, 1000))
    greedy = [Sampling(temperature=0)]
    assert sample(logits, greedy, [3], stop=stop, prompt_tokens=3).tokens.tolist() == [3]
    assert sample(logits, greedy, [4], stop=stop, prompt_tokens=3).tokens.tolist() == [3]
    assert sample(logits, greedy, [5], stop=stop, prompt_tokens=3).tokens.tolist() == [1]
    ignoring = Stop(max_tokens=9, min_tokens=2, token_ids=(1,), end_ids=(2,), ignore_eos=True)
    assert sample(logits, greedy, [4], stop=ignoring, prompt_tokens=3).tokens.tolist() == [2]


def test_a_row_that_is_reopened_forgets_its_parameters() -> None:
    sampler = Sampler(1, 3)
    sampler.open(0, Sampling(temperature=0, logit_bias=((2, 50.0),), logprobs=1), STOP, 1)
    sampler.open(0, Sampling(temperature=0), STOP, 1)
    out = sampler.sample(np.array([[1, 2, 0]], np.float32), np.zeros(1, np.int64), np.ones(1, np.int64), np.zeros((1, 4), np.int32))
    assert out.tokens.tolist() == [1]
    assert out.logprobs == {}


@pytest.mark.parametrize(
    "sampling", [Sampling(temperature=0, logprobs=2), Sampling(logprobs=2), Sampling(top_p=0.5, logprobs=0), Sampling(top_k=2)]
)
def test_rows_without_finite_logits_fail_alone(sampling: Sampling) -> None:
    nan, inf = np.nan, np.inf
    logits = [[1, nan, 0], [1, 2, 0], [-inf, -inf, -inf], [inf, 0, 0], [-inf, -inf, 3]]
    out = sample(logits, [sampling] * 5)
    assert out.tokens[[0, 2, 3]].tolist() == [-1, -1, -1]
    assert out.tokens[1] in (0, 1, 2)
    assert out.tokens[4] == 2
    assert set(out.logprobs) == (set() if sampling.logprobs is None else {1, 4})


def test_log_probs_are_before_temperature_and_filters() -> None:
    logits = [[2.0, 1.0, 0.0, -1.0]]
    entry = sample(logits, [Sampling(temperature=0.1, top_k=1, logprobs=2)]).logprobs[0]
    expected = np.log(softmax(logits[0]))
    assert entry.token == 0
    assert entry.logprob == pytest.approx(expected[0], abs=1e-6)
    assert [token for token, _ in entry.top] == [0, 1]
    assert [value for _, value in entry.top] == pytest.approx(expected[:2].tolist(), abs=1e-6)


def test_alternatives_are_best_first_ties_by_id_and_finite() -> None:
    logits = np.zeros((2, 500), np.float32)
    logits[0, 400] = 1
    logits[1] = -np.inf
    logits[1, [7, 3]] = [1.0, 0.0]
    first, second = log_probs(logits, np.array([400, 3]), np.array([4, 20]))
    assert [token for token, _ in first.top] == [400, 0, 1, 2]
    assert [token for token, _ in second.top] == [7, 3]


PARAMETERS = st.builds(
    Sampling,
    temperature=st.sampled_from([0.0, 0.3, 1.0, 3.0]),
    top_p=st.sampled_from([1.0, 0.95, 0.5, 0.01]),
    top_k=st.sampled_from([0, 0, 1, 7, 200]),
    min_p=st.sampled_from([0.0, 0.0, 0.2]),
    repetition_penalty=st.sampled_from([1.0, 1.3]),
    presence_penalty=st.sampled_from([0.0, 0.5]),
    seed=st.integers(-(2**63), 2**64 - 1),
    choice=st.integers(0, 3),
    logprobs=st.sampled_from([None, 0, 3]),
)


@settings(max_examples=60, deadline=None)
@given(st.lists(PARAMETERS, min_size=2, max_size=12), st.sampled_from([3, 130, 300, 2500]), st.integers(0, 2**32 - 1))
def test_a_row_gives_the_same_alone_and_in_a_batch(samplings, vocab_size, seed) -> None:
    generator = np.random.default_rng(seed)
    logits = (generator.standard_normal((len(samplings), vocab_size)) * 3).astype(np.float32)
    logits[0] = np.round(logits[0])  # many ties
    tokens = generator.integers(0, vocab_size, (len(samplings), 64))
    positions = generator.integers(1, 60, len(samplings))
    together = sample(logits, samplings, positions, tokens)
    for row, sampling in enumerate(samplings):
        alone = sample(logits[row : row + 1], [sampling], positions[row : row + 1], tokens[row : row + 1])
        assert alone.tokens[0] == together.tokens[row]
        assert alone.logprobs.get(0) == together.logprobs.get(row)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 2**32 - 1),
    st.sampled_from([2, 150, 400]),
    st.integers(0, 400),
    st.floats(0.01, 1.0),
    st.floats(0.0, 1.0),
    st.floats(0.0, 1.0, exclude_max=True),
    st.booleans(),
)
def test_filters_agree_with_a_plain_definition(seed, vocab_size, top_k, top_p, min_p, number, tied) -> None:
    scores = np.random.default_rng(seed).standard_normal(vocab_size).astype(np.float32) * 3
    scores = np.round(scores) if tied else scores
    scores -= scores.max()
    order = sorted(range(vocab_size), key=lambda token: (-scores[token], token))
    kept = order[: top_k or vocab_size]
    weights = np.exp(scores.astype(np.float64))
    mass, reached, nucleus = weights[kept].sum(), 0.0, []
    for token in kept:
        if nucleus and reached >= top_p * mass * (1 + 1e-5):
            break
        nucleus.append(token)
        reached += weights[token]
    allowed = {token for token in nucleus if weights[token] >= min_p * (1 - 1e-5)}
    filters = Filters(np.array([top_k]), np.array([top_p]), np.array([min_p]))
    assert int(draw(scores[None].copy(), filters, np.array([number]))[0]) in allowed
