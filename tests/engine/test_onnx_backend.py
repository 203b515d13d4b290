"""What is the exported graph's own: one call for rows of one length, bounded rectangles, halves when memory is short."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

from service.checkpoints.onnx_graph import OnnxGraph
from service.engine import rectangles
from service.engine.batch import PlanError
from service.types.plan import BatchPlan, BlockDemote, Slice
from tests.engine.drivers import NOTHING, SCORES, TOKEN, opened, prompt


def test_rows_of_one_length_are_one_call_of_the_graph(mixed_dense, onnx_driver) -> None:
    driver = onnx_driver(mixed_dense)
    prompts = [prompt(5, 1), prompt(64, 2), prompt(71, 4)]
    driver.run([Slice(row, 0, len(prompts[row]), NOTHING) for row in (0, 1)], [opened(row, prompts[row]) for row in (0, 1)])
    mixed = driver.run([Slice(0, 4, 1, TOKEN), Slice(1, 63, 1, TOKEN), Slice(2, 0, 70, NOTHING)], [opened(2, prompts[2])])
    assert mixed.dispatch == (("decoder", "onnx", 2),)
    together = driver.run([Slice(row, len(prompts[row]) - 1, 1, TOKEN) for row in range(3)])
    assert together.dispatch == (("decoder", "onnx", 1),)


def test_a_rectangle_that_does_not_fit_is_computed_in_halves(full_dense, onnx_driver, monkeypatch) -> None:
    driver = onnx_driver(full_dense)
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


def test_bounded_rectangles_change_nothing(full_dense, onnx_driver, monkeypatch) -> None:
    monkeypatch.setattr(rectangles, "MOST_TOKENS", 40)
    driver = onnx_driver(full_dense)
    prompts = [prompt(90, 11), prompt(33, 12)]
    opening = [opened(row, prompts[row]) for row in (0, 1)]
    result = driver.run([Slice(row, 0, len(prompts[row]), TOKEN) for row in (0, 1)], opening)
    assert result.dispatch == (("decoder", "onnx", 4),)
    assert [token.token for token in result.tokens] == [full_dense.greedy(tokens, 1)[0] for tokens in prompts]


def test_warming_up_leaves_no_trace(full_dense, onnx_driver) -> None:
    driver = onnx_driver(full_dense)
    driver.backend.warm_up(16)
    before = driver.backend.layers_done
    tokens = prompt(9)
    assert driver.run([Slice(0, 0, 9, TOKEN)], [opened(0, tokens)]).tokens[0].token == full_dense.greedy(tokens, 1)[0]
    assert driver.backend.layers_done - before == len(full_dense.manifest.spec.layers)


def test_a_plan_that_demotes_is_refused(full_dense, onnx_driver) -> None:
    with pytest.raises(PlanError):
        onnx_driver(full_dense).backend.execute(BatchPlan(1, demote=(BlockDemote(0, 0, (1,), (2,)),)))
