"""Plans executed over paged blocks give what one dense forward gives, whatever computes and however the work is cut.

NaN fills every block from the start.
"""

from __future__ import annotations

import numpy as np
import pytest

from service.engine.batch import PlanError
from service.types.plan import BatchPlan, BlockAppend, BlockRelease, Slice
from service.types.request import Sampling
from tests.engine.drivers import NOTHING, SCORES, TOKEN, opened, prompt


@pytest.mark.parametrize("chunk", [1, 3, 64, 65, 200])
@pytest.mark.parametrize("model", ["full", "mixed"])
def test_prefill_in_chunks_is_one_dense_pass(request, driver_of, model, chunk) -> None:
    dense = request.getfixturevalue(f"{model}_dense")
    driver = driver_of(dense)
    tokens = prompt(150 if chunk > 1 else 90)
    opening, scores = [opened(0, tokens, prompt_logprobs=3)], []
    for start in range(0, len(tokens), chunk):
        length = min(chunk, len(tokens) - start)
        want = SCORES | (TOKEN if start + length == len(tokens) else NOTHING)
        result = driver.run([Slice(0, start, length, want)], opening)
        opening = []
        scores += result.prompt_logprobs[0].logprobs
        assert result.prompt_logprobs[0].first == start + 1
    expected = dense.log_probs(tokens)
    assert [entry.token for entry in scores] == list(tokens[1:])
    assert np.allclose([entry.logprob for entry in scores], expected[np.arange(len(tokens) - 1), tokens[1:]], atol=1e-4)
    for at, entry in enumerate(scores):
        assert np.allclose([value for _, value in entry.top], np.sort(expected[at])[::-1][:3], atol=1e-4)
    assert result.tokens[0].token == int(expected[-1].argmax())


def test_a_mixed_batch_gives_each_sequence_its_own_dense_continuation(mixed_dense, driver_of) -> None:
    driver = driver_of(mixed_dense)
    prompts = {0: prompt(5, 1), 1: prompt(64, 2), 2: prompt(130, 3), 3: prompt(71, 4)}
    found = {row: [] for row in prompts}

    def take(result):
        for token in result.tokens:
            found[token.row].append(token.token)

    take(driver.run([Slice(row, 0, len(prompts[row]), TOKEN) for row in (0, 1)], [opened(row, prompts[row]) for row in (0, 1)]))
    # Two decode while two prefill, one of them in pieces.
    steps = [Slice(0, 5, 1, TOKEN), Slice(1, 64, 1, TOKEN), Slice(2, 0, 100, NOTHING), Slice(3, 0, 71, TOKEN)]
    mixed = driver.run(steps, [opened(row, prompts[row]) for row in (2, 3)])
    assert [token.row for token in mixed.tokens] == [0, 1, 3]
    take(mixed)
    take(driver.run([Slice(2, 100, 30, TOKEN), Slice(0, 6, 1, TOKEN), Slice(3, 71, 1, TOKEN), Slice(1, 65, 1, TOKEN)]))
    take(driver.run([Slice(row, len(prompts[row]) + len(found[row]) - 1, 1, TOKEN) for row in prompts]))
    for row, tokens in found.items():
        assert tokens == mixed_dense.greedy(prompts[row], len(tokens))
    assert [len(tokens) for tokens in found.values()] == [4, 4, 2, 3]


def test_blocks_behind_the_window_are_never_read_again(mixed_dense, driver_of) -> None:
    driver = driver_of(mixed_dense)
    tokens = prompt(200, 5)
    windowed = next(group for group, spec in enumerate(driver.layout.groups) if spec.window == 70)
    found = [driver.run([Slice(0, 0, 200, TOKEN)], [opened(0, tokens)]).tokens[0].token]
    # The query at position 200 sees positions 131 … 200: blocks 0 and 1 lie behind.
    release = [BlockRelease(0, windowed, 2)]
    for at in range(6):
        found.append(driver.run([Slice(0, 200 + at, 1, TOKEN)], release=release).tokens[0].token)
        assert driver.tables.blocks[windowed][0, :2].tolist() == [0, 0]
        assert driver.tables.blocks[1 - windowed][0, :2].all()
        driver.poison(0, windowed, 2)
        release = []
    assert found == mixed_dense.greedy(tokens, 7)
    # Teeth: the same poison in a block that is still seen does show.
    driver.poison(0, windowed, 3)
    assert driver.run([Slice(0, 206, 1, TOKEN)]).tokens[0].failure == "numerical_failure"


def test_rows_without_finite_logits_fail_alone(full_dense, driver_of) -> None:
    driver = driver_of(full_dense)
    prompts = [prompt(20, 6), prompt(20, 7)]
    driver.run([Slice(row, 0, 20, TOKEN) for row in (0, 1)], [opened(row, prompts[row]) for row in (0, 1)])
    driver.poison(0, 0, 1)
    first, second = driver.run([Slice(0, 20, 1, TOKEN), Slice(1, 20, 1, TOKEN)]).tokens
    assert (first.token, first.failure, second.failure) == (-1, "numerical_failure", None)
    # A plan that was sent ahead of that result still runs.
    _, third = driver.run([Slice(0, 21, 1, TOKEN), Slice(1, 21, 1, TOKEN)]).tokens
    assert [second.token, third.token] == full_dense.greedy(prompts[1], 3)[1:]


def test_a_prompt_without_finite_log_probs_fails(full_dense, driver_of) -> None:
    driver = driver_of(full_dense)
    driver.run([Slice(0, 0, 70, SCORES)], [opened(0, prompt(90, 6), prompt_logprobs=1)])
    driver.poison(0, 0, 1)
    (scores,) = driver.run([Slice(0, 70, 20, SCORES)]).prompt_logprobs
    assert (scores.logprobs, scores.failure) == ((), "numerical_failure")


def test_a_reopened_sequence_continues_as_if_nothing_had_happened(full_dense, driver_of) -> None:
    driver = driver_of(full_dense)
    tokens, drawn = prompt(30, 8), Sampling(temperature=1.0, seed=11, repetition_penalty=1.2, presence_penalty=0.3)
    known = list(tokens)
    known.append(driver.run([Slice(0, 0, 30, TOKEN)], [opened(0, tokens, drawn)]).tokens[0].token)
    for _ in range(4):
        known.append(driver.run([Slice(0, len(known) - 1, 1, TOKEN)]).tokens[0].token)
    again = driver.run([Slice(5, 0, 33, TOKEN)], [opened(5, known[:33], drawn, prompt_tokens=30)], closing=[0])
    assert again.tokens[0].token == known[33]
    assert driver.run([Slice(5, 33, 1, TOKEN)]).tokens[0].token == known[34]


@pytest.mark.parametrize(
    "plan",
    [
        BatchPlan(1, (Slice(0, 0, 4, TOKEN),)),  # never opened
        BatchPlan(1, (Slice(0, 0, 4, TOKEN),), open=(opened(0, (1, 2, 3, 4)),)),  # no block
        BatchPlan(1, (Slice(0, 0, 5, TOKEN),), open=(opened(0, (1, 2, 3, 4)),), append=(BlockAppend(0, 0, 0, (1,)),)),  # unknown token
        BatchPlan(1, (Slice(8, 0, 1, TOKEN),)),
        BatchPlan(1, (Slice(-1, 0, 1, TOKEN),)),
        BatchPlan(1, open=(opened(0, (1, 331)),)),
        BatchPlan(1, open=(opened(0, (1, -1)),)),
        BatchPlan(1, open=(opened(0, (1,) * 257),)),
        BatchPlan(1, open=(opened(0, (1,)), opened(0, (1,)))),
        BatchPlan(1, append=(BlockAppend(0, 0, 0, (41,)),)),
        BatchPlan(1, append=(BlockAppend(0, 0, 0, (0,)),)),
        BatchPlan(1, append=(BlockAppend(0, 0, 3, (1, 2)),)),
        BatchPlan(1, append=(BlockAppend(0, 1, 0, (1,)),)),
        BatchPlan(1, release=(BlockRelease(0, 3, 1),)),
        BatchPlan(1, close=(99,)),
    ],
)
def test_contradictory_plans_are_refused(full_dense, driver_of, plan) -> None:
    with pytest.raises(PlanError):
        driver_of(full_dense).backend.execute(plan)
