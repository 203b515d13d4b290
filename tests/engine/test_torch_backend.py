"""What is the torch backend's own: steps in halves when memory is short, counts of kernels, layers in one call."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from service.types.plan import Slice
from tests.engine.drivers import NOTHING, SCORES, TOKEN, opened, prompt


def test_a_step_that_does_not_fit_is_computed_in_halves(full_dense, torch_driver, monkeypatch) -> None:
    driver = torch_driver(full_dense)
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


def test_the_log_probs_of_a_prompt_computed_in_halves_are_one_list(full_dense, torch_driver, monkeypatch) -> None:
    driver = torch_driver(full_dense)
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


def test_long_steps_take_the_threads_that_they_are_worth(full_dense, torch_driver, monkeypatch) -> None:
    driver, threads, hidden = torch_driver(full_dense), torch.get_num_threads(), full_dense.decoder.hidden
    monkeypatch.setattr("service.processor.usable_cores", lambda: 2)
    taken = []
    monkeypatch.setattr(full_dense.decoder, "hidden", lambda *given: taken.append(torch.get_num_threads()) or hidden(*given))
    try:
        driver.run([Slice(0, 0, 50, TOKEN)], [opened(0, prompt(50))])
        driver.backend.share_steps(128e6 / 25)
        driver.run([Slice(0, 50, 1, TOKEN)])
        driver.run([Slice(1, 0, 50, TOKEN)], [opened(1, prompt(50, 3))])
        driver.run([Slice(0, 51, 1, TOKEN), Slice(1, 50, 1, TOKEN)])
    finally:
        torch.set_num_threads(threads)
    assert taken == [threads, 1, 2, 1]


def test_kernel_calls_are_counted_since_the_last_step(full_dense, torch_driver) -> None:
    driver = torch_driver(full_dense)
    driver.backend.warm_up(16)
    result = driver.run([Slice(0, 0, 9, TOKEN)], [opened(0, prompt(9))])
    layers = len(full_dense.manifest.spec.layers)
    assert [(op, count) for op, _, count in result.dispatch if op == "paged_attention"] == [("paged_attention", layers)]
    assert driver.backend.layers_done == 2 * layers


@pytest.mark.parametrize("model", ["full", "mixed"])
def test_quantised_layers_in_one_call_give_the_bits_of_layers_one_by_one(request, model, torch_driver, whole_or_separate) -> None:
    """Prompts in slices, decode of several rows beside a prompt, in two KV groups where there are windows."""
    manifest = request.getfixturevalue(f"{model}_dense").manifest
    results = {}
    for name in ("native", "separate"):
        decoder = whole_or_separate(manifest, name)
        driver = torch_driver(decoder)
        first, second = prompt(100, 3), prompt(37, 4)
        entries = [(0, first), (1, second)]
        driver.run([Slice(0, 0, 64, NOTHING)], [opened(0, first, prompt_logprobs=1)])
        found = [driver.run([Slice(0, 64, 36, SCORES | TOKEN), Slice(1, 0, 37, TOKEN)], [opened(1, second)])]
        found += [driver.run([Slice(row, len(tokens) + i, 1, TOKEN) for row, tokens in entries]) for i in range(5)]
        results[name] = [(step.tokens, step.prompt_logprobs) for step in found]
        assert ("decoder_layers", name, 1) in found[-1].dispatch
        assert driver.backend.layers_done == 7 * len(manifest.spec.layers)
    assert results["native"] == results["separate"]
