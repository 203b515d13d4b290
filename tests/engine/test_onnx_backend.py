"""The exported graph behind plans gives what one dense forward gives, however the work is cut; NaN fills every block from the start."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

from service.checkpoints.onnx_export import export
from service.checkpoints.onnx_graph import OnnxGraph
from service.engine import rectangles
from service.engine.batch import PlanError, Tables
from service.engine.onnx_backend import OnnxBackend
from service.engine.rectangles import Costs
from service.engine.sampler import Sampler
from service.types.plan import BatchPlan, BlockAppend, BlockDemote, BlockRelease, Slice
from service.types.request import Sampling
from tests.engine.test_torch_backend import NOTHING, SCORES, TOKEN, Driver, opened, prompt

BLOCKS = 40


class Pool:
    """The graph's caches as the driver looks at blocks."""

    def __init__(self, graph, layout) -> None:
        self.graph, self.layout = graph, layout

    def poison(self, layer: int, blocks) -> None:
        for block in blocks:
            for cache in (self.graph.caches[f"keys.{layer}"], self.graph.caches[f"values.{layer}"]):
                cache[:, block * 64 : (block + 1) * 64] = np.nan


class OnnxDriver(Driver):
    """The driver over a graph's blocks."""

    def poison(self, row: int, group: int, before: int) -> None:
        for layer in self.pool.layout.groups[group].layers:
            self.pool.poison(layer, self.held[row, group][:before])


@pytest.fixture(scope="session")
def graph_of(tmp_path_factory):
    """A function that gives the exported directory of a dense model."""
    found = {}

    def directory(dense):
        if dense.manifest.digest not in found:
            found[dense.manifest.digest] = tmp_path_factory.mktemp("graphs") / "graph.onnx"
            export(dense.manifest, found[dense.manifest.digest], "none")
        return found[dense.manifest.digest]

    return directory


@pytest.fixture
def driver_of(graph_of):
    """A function that makes a driver over a fresh backend of a dense model."""

    def make(dense):
        spec = dense.manifest.spec
        layout = spec.kv_layout()
        counts = (BLOCKS,) * len(layout.groups)
        graph = OnnxGraph(graph_of(dense), layout, counts, threads=1)
        for cache in graph.caches.values():
            cache[:, 64:] = np.nan
        tables = Tables(layout, counts, 8, spec.context_tokens, spec.vocab_size)
        backend = OnnxBackend(graph, layout, tables, Sampler(8, spec.vocab_size), Costs.of(spec, 1 << 20))
        return OnnxDriver(backend, Pool(graph, layout), len(layout.groups), BLOCKS)

    return make


@pytest.mark.parametrize("piece", [1, 64, 65, 200])
@pytest.mark.parametrize("model", ["full", "mixed"])
def test_prefill_in_pieces_is_one_dense_pass(request, driver_of, model, piece) -> None:
    dense = request.getfixturevalue(f"{model}_dense")
    driver = driver_of(dense)
    tokens = prompt(150 if piece > 1 else 90)
    opening, scores = [opened(0, tokens, prompt_logprobs=3)], []
    for start in range(0, len(tokens), piece):
        length = min(piece, len(tokens) - start)
        want = SCORES | (TOKEN if start + length == len(tokens) else NOTHING)
        result = driver.run([Slice(0, start, length, want)], opening)
        opening = []
        (part,) = result.prompt_logprobs
        scores += part.logprobs
        assert part.first == start + 1
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
    # Two decode while two prefill, one of them in pieces: three lengths in one step.
    steps = [Slice(0, 5, 1, TOKEN), Slice(1, 64, 1, TOKEN), Slice(2, 0, 100, NOTHING), Slice(3, 0, 71, TOKEN)]
    mixed = driver.run(steps, [opened(row, prompts[row]) for row in (2, 3)])
    assert mixed.dispatch == (("decoder", "onnx", 3),) and [token.row for token in mixed.tokens] == [0, 1, 3]
    take(mixed)
    take(driver.run([Slice(2, 100, 30, TOKEN), Slice(0, 6, 1, TOKEN), Slice(3, 71, 1, TOKEN), Slice(1, 65, 1, TOKEN)]))
    together = driver.run([Slice(row, len(prompts[row]) + len(found[row]) - 1, 1, TOKEN) for row in prompts])
    assert together.dispatch == (("decoder", "onnx", 1),)
    take(together)
    for row, tokens in found.items():
        assert tokens == mixed_dense.greedy(prompts[row], len(tokens))


def test_blocks_behind_the_window_are_never_read_again(mixed_dense, driver_of) -> None:
    driver = driver_of(mixed_dense)
    tokens = prompt(200, 5)
    windowed = next(group for group, spec in enumerate(driver.pool.layout.groups) if spec.window == 70)
    found = [driver.run([Slice(0, 0, 200, TOKEN)], [opened(0, tokens)]).tokens[0].token]
    release = [BlockRelease(0, windowed, 2)]
    for at in range(4):
        found.append(driver.run([Slice(0, 200 + at, 1, TOKEN)], release=release).tokens[0].token)
        driver.poison(0, windowed, 2)
        release = []
    assert found == mixed_dense.greedy(tokens, 5)
    # Teeth: the same poison in a block that is still seen does show.
    driver.poison(0, windowed, 3)
    assert driver.run([Slice(0, 204, 1, TOKEN)]).tokens[0].failure == "numerical_failure"


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


def test_a_rectangle_that_does_not_fit_is_computed_in_halves(full_dense, driver_of, monkeypatch) -> None:
    driver = driver_of(full_dense)
    sizes, logits = [], OnnxGraph.logits

    def scarce(graph, batch):
        if batch.tokens.size > 20:
            raise MemoryError
        sizes.append(batch.tokens.size)
        return logits(graph, batch)

    monkeypatch.setattr(OnnxGraph, "logits", scarce)
    prompts = [prompt(50, 9), prompt(50, 10)]
    opening = [opened(row, prompts[row], prompt_logprobs=0) for row in (0, 1)]
    result = driver.run([Slice(0, 0, 50, TOKEN | SCORES), Slice(1, 0, 50, TOKEN)], opening)
    assert max(sizes) <= 20 and sum(sizes) == 100
    assert [token.token for token in result.tokens] == [full_dense.greedy(tokens, 1)[0] for tokens in prompts]
    expected = full_dense.log_probs(prompts[0])[np.arange(49), prompts[0][1:]]
    assert np.allclose([entry.logprob for entry in result.prompt_logprobs[0].logprobs], expected, atol=1e-4)
    monkeypatch.setattr(OnnxGraph, "logits", lambda *_: (_ for _ in ()).throw(MemoryError()))
    with pytest.raises(MemoryError, match="one token"):
        driver.run([Slice(1, 50, 1, TOKEN)])


def test_bounded_rectangles_change_nothing(full_dense, driver_of, monkeypatch) -> None:
    monkeypatch.setattr(rectangles, "MOST_TOKENS", 40)
    driver = driver_of(full_dense)
    prompts = [prompt(90, 11), prompt(33, 12)]
    opening = [opened(row, prompts[row]) for row in (0, 1)]
    result = driver.run([Slice(row, 0, len(prompts[row]), TOKEN) for row in (0, 1)], opening)
    assert result.dispatch == (("decoder", "onnx", 4),)
    assert [token.token for token in result.tokens] == [full_dense.greedy(tokens, 1)[0] for tokens in prompts]


def test_warming_up_leaves_no_trace(full_dense, driver_of) -> None:
    driver = driver_of(full_dense)
    driver.backend.warm_up(16)
    before = driver.backend.layers_done
    tokens = prompt(9)
    assert driver.run([Slice(0, 0, 9, TOKEN)], [opened(0, tokens)]).tokens[0].token == full_dense.greedy(tokens, 1)[0]
    assert driver.backend.layers_done - before == len(full_dense.manifest.spec.layers)


@pytest.mark.parametrize(
    "plan",
    [
        BatchPlan(1, (Slice(0, 0, 4, TOKEN),)),  # never opened
        BatchPlan(1, (Slice(0, 0, 4, TOKEN),), open=(opened(0, (1, 2, 3, 4)),)),  # no block
        BatchPlan(1, append=(BlockAppend(0, 0, 0, (41,)),)),
        BatchPlan(1, demote=(BlockDemote(0, 0, (1,), (2,)),)),
        BatchPlan(1, close=(99,)),
    ],
)
def test_contradictory_plans_are_refused(full_dense, driver_of, plan) -> None:
    with pytest.raises(PlanError):
        driver_of(full_dense).backend.execute(plan)
