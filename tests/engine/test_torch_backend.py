"""Plans executed over paged blocks give what one dense forward gives, however the work is cut; NaN fills every block from the start."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from service.engine.batch import PlanError
from service.types.plan import BatchPlan, BlockAppend, BlockRelease, OpenSequence, Slice, Want
from service.types.request import Sampling, Stop

TOKEN, SCORES, NOTHING = int(Want.TOKEN), int(Want.PROMPT_LOGPROBS), int(Want.NOTHING)
GREEDY = Sampling(temperature=0)
BLOCK = 64


def prompt(length: int, seed: int = 0) -> tuple[int, ...]:
    return tuple(np.random.default_rng(seed).integers(0, 331, length).tolist())


def opened(row: int, tokens, sampling=GREEDY, prompt_tokens=None, prompt_logprobs=None) -> OpenSequence:
    return OpenSequence(row, tuple(tokens), prompt_tokens or len(tokens), sampling, Stop(max_tokens=64), prompt_logprobs)


class Driver:
    """Plans for a few sequences, with blocks handed out in a scattered order and, when asked, released behind the window."""

    def __init__(self, backend, pool, groups: int, blocks: int = 40) -> None:
        self.backend, self.pool, self.groups = backend, pool, groups
        self.free = [list(np.random.default_rng(group).permutation(np.arange(1, blocks + 1))) for group in range(groups)]
        self.held: dict[tuple[int, int], list[int]] = {}
        self.step = 0

    def run(self, slices, opening=(), closing=(), release=()):
        appends = []
        for row, start, length, _ in slices:
            for group in range(self.groups):
                held = self.held.setdefault((row, group), [])
                needed = -(-(start + length) // BLOCK) - len(held)
                if needed > 0:
                    blocks = [int(self.free[group].pop()) for _ in range(needed)]
                    appends.append(BlockAppend(row, group, len(held), tuple(blocks)))
                    held += blocks
        self.step += 1
        plan = BatchPlan(self.step, tuple(slices), tuple(closing), tuple(opening), tuple(appends), tuple(release))
        return self.backend.execute(plan)

    def poison(self, row: int, group: int, before: int) -> None:
        """NaN into blocks that the row released."""
        for layer in self.pool.layout.groups[group].layers:
            for tensor in self.pool.blocks_of(layer):
                tensor[self.held[row, group][:before]] = float("nan")


@pytest.mark.parametrize("chunk", [1, 3, 64, 65, 200])
@pytest.mark.parametrize("model", ["full", "mixed"])
def test_prefill_in_chunks_is_one_dense_pass(request, backend_of, model, chunk) -> None:
    dense = request.getfixturevalue(f"{model}_dense")
    backend, pool, _ = backend_of(dense)
    driver = Driver(backend, pool, len(pool.layout.groups))
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


def test_a_mixed_batch_gives_each_sequence_its_own_dense_continuation(mixed_dense, backend_of) -> None:
    backend, pool, _ = backend_of(mixed_dense)
    driver = Driver(backend, pool, 2)
    prompts = {0: prompt(5, 1), 1: prompt(64, 2), 2: prompt(130, 3), 3: prompt(71, 4)}
    found = {row: [] for row in prompts}

    def take(result):
        for token in result.tokens:
            found[token.row].append(token.token)

    take(driver.run([Slice(row, 0, len(prompts[row]), TOKEN) for row in (0, 1)], [opened(row, prompts[row]) for row in (0, 1)]))
    # Two decode while two prefill, one of them in pieces.
    steps = [Slice(0, 5, 1, TOKEN), Slice(1, 64, 1, TOKEN), Slice(2, 0, 100, NOTHING), Slice(3, 0, 71, TOKEN)]
    take(driver.run(steps, [opened(row, prompts[row]) for row in (2, 3)]))
    take(driver.run([Slice(2, 100, 30, TOKEN), Slice(0, 6, 1, TOKEN), Slice(3, 71, 1, TOKEN), Slice(1, 65, 1, TOKEN)]))
    for row, tokens in found.items():
        assert tokens == mixed_dense.greedy(prompts[row], len(tokens))
    assert [len(tokens) for tokens in found.values()] == [3, 3, 1, 2]


def test_blocks_behind_the_window_are_never_read_again(mixed_dense, backend_of) -> None:
    backend, pool, tables = backend_of(mixed_dense)
    driver = Driver(backend, pool, 2)
    tokens = prompt(200, 5)
    windowed = next(group for group, spec in enumerate(pool.layout.groups) if spec.window == 70)
    found = [driver.run([Slice(0, 0, 200, TOKEN)], [opened(0, tokens)]).tokens[0].token]
    # The query at position 200 sees positions 131 … 200: blocks 0 and 1 lie behind.
    release = [BlockRelease(0, windowed, 2)]
    for at in range(6):
        found.append(driver.run([Slice(0, 200 + at, 1, TOKEN)], release=release).tokens[0].token)
        assert tables.blocks[windowed][0, :2].tolist() == [0, 0]
        assert tables.blocks[1 - windowed][0, :2].all()
        driver.poison(0, windowed, 2)
        release = []
    assert found == mixed_dense.greedy(tokens, 7)
    # Teeth: the same poison in a block that is still seen does show.
    driver.poison(0, windowed, 3)
    assert driver.run([Slice(0, 206, 1, TOKEN)]).tokens[0].failure == "numerical_failure"


def test_rows_without_finite_logits_fail_alone(full_dense, backend_of) -> None:
    backend, pool, _ = backend_of(full_dense)
    driver = Driver(backend, pool, 1)
    prompts = [prompt(20, 6), prompt(20, 7)]
    driver.run([Slice(row, 0, 20, TOKEN) for row in (0, 1)], [opened(row, prompts[row]) for row in (0, 1)])
    driver.poison(0, 0, 1)
    first, second = driver.run([Slice(0, 20, 1, TOKEN), Slice(1, 20, 1, TOKEN)]).tokens
    assert (first.token, first.failure, second.failure) == (-1, "numerical_failure", None)
    # A plan that was sent ahead of that result still runs.
    _, third = driver.run([Slice(0, 21, 1, TOKEN), Slice(1, 21, 1, TOKEN)]).tokens
    assert [second.token, third.token] == full_dense.greedy(prompts[1], 3)[1:]


def test_a_prompt_without_finite_log_probs_fails(full_dense, backend_of) -> None:
    backend, pool, _ = backend_of(full_dense)
    driver = Driver(backend, pool, 1)
    driver.run([Slice(0, 0, 70, SCORES)], [opened(0, prompt(90, 6), prompt_logprobs=1)])
    driver.poison(0, 0, 1)
    (scores,) = driver.run([Slice(0, 70, 20, SCORES)]).prompt_logprobs
    assert (scores.logprobs, scores.failure) == ((), "numerical_failure")


def test_a_reopened_sequence_continues_as_if_nothing_had_happened(full_dense, backend_of) -> None:
    backend, pool, _ = backend_of(full_dense)
    driver = Driver(backend, pool, 1)
    tokens, drawn = prompt(30, 8), Sampling(temperature=1.0, seed=11, repetition_penalty=1.2, presence_penalty=0.3)
    known = list(tokens)
    known.append(driver.run([Slice(0, 0, 30, TOKEN)], [opened(0, tokens, drawn)]).tokens[0].token)
    for _ in range(4):
        known.append(driver.run([Slice(0, len(known) - 1, 1, TOKEN)]).tokens[0].token)
    again = driver.run([Slice(5, 0, 33, TOKEN)], [opened(5, known[:33], drawn, prompt_tokens=30)], closing=[0])
    assert again.tokens[0].token == known[33]
    assert driver.run([Slice(5, 33, 1, TOKEN)]).tokens[0].token == known[34]


def test_a_step_that_does_not_fit_is_computed_in_halves(full_dense, backend_of, monkeypatch) -> None:
    backend, pool, _ = backend_of(full_dense)
    driver = Driver(backend, pool, 1)
    sizes, hidden = [], full_dense.decoder.hidden

    def scarce(tokens, *rest):
        if len(tokens) > 20:
            raise RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: you tried to allocate")
        sizes.append(len(tokens))
        return hidden(tokens, *rest)

    monkeypatch.setattr(full_dense.decoder, "hidden", scarce)
    prompts = [prompt(50, 9), prompt(10, 10)]
    result = driver.run([Slice(row, 0, len(prompts[row]), TOKEN) for row in (0, 1)], [opened(row, prompts[row]) for row in (0, 1)])
    monkeypatch.undo()
    assert max(sizes) <= 20
    assert [token.token for token in result.tokens] == [full_dense.greedy(tokens, 1)[0] for tokens in prompts]
    with pytest.raises(RuntimeError, match="something else"), monkeypatch.context() as patch:
        patch.setattr(full_dense.decoder, "hidden", lambda *_: (_ for _ in ()).throw(RuntimeError("something else")))
        driver.run([Slice(1, 10, 1, TOKEN)])
    with pytest.raises(MemoryError), monkeypatch.context() as patch:
        patch.setattr(full_dense.decoder, "hidden", lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError()))
        driver.run([Slice(1, 10, 1, TOKEN)])


def test_the_log_probs_of_a_prompt_computed_in_halves_are_one_list(full_dense, backend_of, monkeypatch) -> None:
    backend, pool, _ = backend_of(full_dense)
    driver = Driver(backend, pool, 1)
    hidden, tokens = full_dense.decoder.hidden, prompt(50, 9)

    def scarce(flat, *rest):
        if len(flat) > 20:
            raise torch.OutOfMemoryError
        return hidden(flat, *rest)

    monkeypatch.setattr(full_dense.decoder, "hidden", scarce)
    (scores,) = driver.run([Slice(0, 0, 50, SCORES | TOKEN)], [opened(0, tokens, prompt_logprobs=0)]).prompt_logprobs
    monkeypatch.undo()
    assert (scores.first, scores.failure) == (1, None)
    expected = full_dense.log_probs(tokens)[np.arange(49), tokens[1:]]
    assert np.allclose([entry.logprob for entry in scores.logprobs], expected, atol=1e-4)


def test_kernel_calls_are_counted_since_the_last_step(full_dense, backend_of) -> None:
    backend, pool, _ = backend_of(full_dense)
    driver = Driver(backend, pool, 1)
    backend.warm_up(16)
    result = driver.run([Slice(0, 0, 9, TOKEN)], [opened(0, prompt(9))])
    layers = len(full_dense.manifest.spec.layers)
    assert [(op, count) for op, _, count in result.dispatch if op == "paged_attention"] == [("paged_attention", layers)]
    assert backend.layers_done == 2 * layers


@pytest.mark.parametrize("model", ["full", "mixed"])
def test_quantised_layers_in_one_call_give_the_bits_of_layers_one_by_one(request, model, backend_of, whole_or_separate) -> None:
    """Prompts in slices, decode of several rows beside a prompt, in two KV groups where there are windows."""
    manifest = request.getfixturevalue(f"{model}_dense").manifest
    results = {}
    for name in ("native", "separate"):
        decoder = whole_or_separate(manifest, name)
        backend, pool, _ = backend_of(decoder)
        driver = Driver(backend, pool, len(pool.layout.groups))
        first, second = prompt(100, 3), prompt(37, 4)
        entries = [(0, first), (1, second)]
        driver.run([Slice(0, 0, 64, NOTHING)], [opened(0, first, prompt_logprobs=1)])
        found = [driver.run([Slice(0, 64, 36, SCORES | TOKEN), Slice(1, 0, 37, TOKEN)], [opened(1, second)])]
        found += [driver.run([Slice(row, len(tokens) + i, 1, TOKEN) for row, tokens in entries]) for i in range(5)]
        results[name] = [(step.tokens, step.prompt_logprobs) for step in found]
        assert ("decoder_layers", name, 1) in found[-1].dispatch
        assert backend.layers_done == 7 * len(manifest.spec.layers)
    assert results["native"] == results["separate"]


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
def test_contradictory_plans_are_refused(full_dense, backend_of, plan) -> None:
    backend, _, _ = backend_of(full_dense)
    with pytest.raises(PlanError):
        backend.execute(plan)
