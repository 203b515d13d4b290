"""Quantised decoders with far blocks: all layers in one call against layer by layer, through planner, tables and both stores.

Same tokens, same log-probs to the bit, same number of far blocks, for every kind of store and rule, among other sequences and alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from service.kernels.dispatch import force
from service.kernels.native.quantised import unsupported
from service.schedulers.router import Router
from service.telemetry import Telemetry
from tests.inline_backend import InlineBackend
from tests.schedulers.support import metric
from tests.test_parity import collect
from tests.test_sparse_parity import CASES, Case, ask, make_case, start

pytestmark = pytest.mark.skipif(unsupported() is not None, reason="no compiled integer products here")


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    return make_case(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(autouse=True)
def unforced() -> Iterator[None]:
    yield
    force("decoder_layers", None)


async def served(case: Case, how: str, quantize: str, threads: int, kept: str = "auto") -> tuple[list[Any], float]:
    """Tokens and log-probs of a prompt in slices and another beside it, and what they read; `how` is the choice of decoder_layers."""
    force("decoder_layers", how)
    telemetry = Telemetry()
    backend = InlineBackend(case.directory, attention=case.attention, quantize=quantize, kept=kept)
    router: Router = await start(case, backend, telemetry, step_tokens=96, prefix_cache=False)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        streams = [router.submit([ask(case.prompt, scored=True)])[0], router.submit([ask(case.prompt[:210], tokens=30)])[0]]
        found = [await collect(stream) for stream in streams]
    finally:
        torch.set_num_threads(before)
    assert metric(telemetry, "kernel_dispatch_total", op="decoder_layers", implementation=how) > 4
    read = metric(telemetry, "far_blocks_read_total")
    await router.close()
    return [(tokens, logprobs) for tokens, logprobs, _ in found], read


@pytest.mark.parametrize(("quantize", "threads", "kept"), [("int8", 1, "auto"), ("int8", 3, "int8"), ("int4", 2, "auto")])
async def test_one_call_gives_the_bits_of_layers_one_by_one(case: Case, quantize: str, threads: int, kept: str) -> None:
    if kept == "int8" and case.attention.kv_far == "bf16":
        pytest.skip("far blocks in the model's own type are not made of near blocks in 8 bits")
    whole, read = await served(case, "native", quantize, threads, kept)
    separate, expected = await served(case, "separate", quantize, threads, kept)
    assert read == expected and (read > 0) == (case.attention.kv_far != "evict")
    for (tokens, logprobs), (others, other_logprobs) in zip(whole, separate, strict=True):
        assert tokens == others and np.array_equal(logprobs, other_logprobs)
    assert len(whole[0][1]) == len(case.prompt) - 1
