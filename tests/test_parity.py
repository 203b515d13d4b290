"""The whole serving path (router, loop, engine) against `transformers` on tiny random checkpoints of the four families.

Prompt log-probs agree within 1e-4 in float32, and greedy tokens are equal as long as the reference's top two logits are further apart than
twice that: alone, among others, for every chunk size, with prefix hits, after preemption, and after the worker was lost or killed.
"""

from __future__ import annotations

import os
import signal
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from service.checkpoints.manifest import read_manifest
from service.engine.supervisor import WorkerBackend
from service.inputs.tokens import TokenCodec
from service.schedulers.router import Model, Router
from service.telemetry import Telemetry
from service.types.plan import Backend, LoadRequest
from service.types.request import FinishEvent, FinishReason, GenerationRequest, PromptEvent, Sampling, Stop, TokenEvent
from service.types.settings import EngineSettings, SchedulerSettings
from tests.inline_backend import Inline, InlineBackend
from tests.tiny_models import build_tiny

TOLERANCE = 1e-4
GENERATED = 30
DYNAMIC = {"rope_type": "dynamic", "factor": 2.0}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-gqa3-llama3": ("llama", {"hidden_size": 96, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 20, "rope": LLAMA3}),
    "llama-bias-tied-linear": (
        "llama",
        {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True, "rope": {"rope_type": "linear", "factor": 3.0}},
    ),
    "llama-dynamic": ("llama", {"vocab_size": 313, "max_position_embeddings": 96, "rope": DYNAMIC}),
    "mistral-gqa7-window": ("mistral", {"num_attention_heads": 7, "num_key_value_heads": 1, "head_dim": 24, "sliding_window": 100}),
    "qwen2-gqa1-yarn-tied": ("qwen2", {"num_key_value_heads": 4, "tie_word_embeddings": True, "rope": YARN}),
    "qwen2-mixed-windows": (
        "qwen2",
        {"num_hidden_layers": 3, "use_sliding_window": True, "sliding_window": 29, "max_window_layers": 1},
    ),
    "qwen3-gqa4": ("qwen3", {"num_key_value_heads": 1, "head_dim": 32}),
}
PROMPT_TOKENS = 120


@dataclass(frozen=True)
class Reference:
    """What transformers gives: log-probs of the prompt's tokens from the second on, the greedy continuation with its margins, and the
    prompt's logits [prompt, vocab]."""

    directory: Path
    prompt: tuple[int, ...]
    logprobs: np.ndarray
    tokens: tuple[int, ...]
    margins: tuple[float, ...]
    logits: np.ndarray

    @property
    def comparable(self) -> int:
        """How many generated tokens are decided by more than twice the tolerance."""
        for index, margin in enumerate(self.margins):
            if margin <= 2 * TOLERANCE:
                return index
        return len(self.margins)


def reference(directory: Path, prompt: tuple[int, ...], one_by_one: bool) -> Reference:
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager").eval()
    tokens, margins = [], []
    with torch.no_grad():
        cache = None
        rows = []
        pieces = [[token] for token in prompt] if one_by_one else [list(prompt)]
        for piece in pieces:
            out = model(torch.tensor([piece]), past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            rows.append(out.logits[0])
        logits = torch.cat(rows)
        scores = logits.double().log_softmax(-1)[:-1].gather(1, torch.tensor(prompt[1:])[:, None])[:, 0]
        last = logits[-1]
        for _ in range(GENERATED):
            best = last.topk(2)
            tokens.append(int(best.indices[0]))
            margins.append(float(best.values[0] - best.values[1]))
            out = model(torch.tensor([[tokens[-1]]]), past_key_values=cache, use_cache=True)
            cache, last = out.past_key_values, out.logits[0, -1]
    return Reference(directory, prompt, scores.numpy(), tuple(tokens), tuple(margins), logits.numpy())


@pytest.fixture(scope="module", params=sorted(CASES))
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Reference:
    return make_case(request.param, tmp_path_factory.mktemp(request.param))


def make_case(name: str, directory: Path) -> Reference:
    family, overrides = CASES[name]
    build_tiny(directory, family, seed=3, **overrides)
    draw = np.random.default_rng(11)
    prompt = tuple(int(token) for token in draw.integers(0, 256, PROMPT_TOKENS))
    found = reference(directory, prompt, one_by_one="dynamic" in name)
    assert found.comparable >= 10, "the reference must decide some tokens clearly"
    return found


def request_for(prompt: tuple[int, ...], *, scored: bool = False, tokens: int = GENERATED, **changes: Any) -> GenerationRequest:
    stop = Stop(max_tokens=tokens, ignore_eos=True)
    base = GenerationRequest("test", "tiny", prompt, stop, Sampling(temperature=0.0), prompt_logprobs=0 if scored else None)
    return replace(base, **changes)


async def start(backend: Backend, directory: Path, telemetry: Telemetry | None = None, **settings: Any) -> Router:
    model = Model("tiny", read_manifest(directory), TokenCodec.load(directory), backend)
    router = Router([model], SchedulerSettings(**{"batch_size": 32, **settings}), telemetry or Telemetry())
    await router.start()
    return router


async def collect(stream: Any) -> tuple[tuple[int, ...], np.ndarray, FinishEvent]:
    tokens: list[int] = []
    logprobs: list[float] = []
    async for event in stream:
        match event:
            case PromptEvent():
                logprobs += [entry.logprob for entry in event.logprobs]
            case TokenEvent():
                tokens += event.tokens
            case FinishEvent():
                return tuple(tokens), np.array(logprobs), event
    raise AssertionError("a stream ended without its terminal event")


def agree(expected: Reference, tokens: tuple[int, ...], logprobs: np.ndarray | None, finish: FinishEvent) -> None:
    assert finish.reason is FinishReason.LENGTH, finish
    assert len(tokens) == GENERATED
    count = expected.comparable
    assert tokens[:count] == expected.tokens[:count]
    if logprobs is not None:
        assert logprobs.shape == expected.logprobs.shape
        assert np.abs(logprobs - expected.logprobs).max() <= TOLERANCE


def others(count: int) -> list[GenerationRequest]:
    draw = np.random.default_rng(5)
    lengths = draw.integers(1, 180, count)
    return [request_for(tuple(int(token) for token in draw.integers(0, 256, min(length, 48)))) for length in lengths]


async def test_alone(case: Reference) -> None:
    router = await start(InlineBackend(case.directory), case.directory)
    [stream] = router.submit([request_for(case.prompt, scored=True)])
    agree(case, *await collect(stream))
    await router.close()


async def test_among_sixteen_others(case: Reference) -> None:
    await among_sixteen_others(case, InlineBackend(case.directory))


async def among_sixteen_others(case: Reference, backend: Inline) -> None:
    router = await start(backend, case.directory, step_tokens=96)
    crowd = [router.submit([request])[0] for request in others(8)]
    [mine] = router.submit([request_for(case.prompt, scored=True)])
    crowd += [router.submit([request])[0] for request in others(16)[8:]]
    agree(case, *await collect(mine))
    for stream in crowd:
        assert (await collect(stream))[2].reason is FinishReason.LENGTH
    await router.close()


async def test_every_chunk_size(case: Reference) -> None:
    """Chunks of 1 … the whole prompt: the step's token budget is the chunk size of a sequence that is alone.

    The first tokens of the prompt: more than one block, more than every window.
    """
    backend = InlineBackend(case.directory)
    prompt = case.prompt[: 110 if case.directory.name.startswith("mistral") else 70]
    best = np.sort(case.logits[len(prompt) - 1])[-2:]
    decided = bool(best[1] - best[0] > 2 * TOLERANCE)
    for chunk in range(1, len(prompt) + 1):
        router = await start(backend, case.directory, step_tokens=chunk, prefix_cache=False)
        steps = backend.steps
        [stream] = router.submit([request_for(prompt, scored=True, tokens=1)])
        tokens, logprobs, _ = await collect(stream)
        assert backend.steps - steps == -(-len(prompt) // chunk)
        assert np.abs(logprobs - case.logprobs[: len(prompt) - 1]).max() <= TOLERANCE
        assert not decided or tokens[0] == case.logits[len(prompt) - 1].argmax()
        await router.close()


@pytest.mark.parametrize("run_ahead", ["never", "always"])
async def test_prefix_hits(case: Reference, run_ahead: str) -> None:
    await prefix_hits(case, InlineBackend(case.directory), run_ahead)


async def prefix_hits(case: Reference, backend: Inline, run_ahead: str) -> None:
    router = await start(backend, case.directory, run_ahead=run_ahead)
    hits = []
    for _ in range(3):
        [stream] = router.submit([request_for(case.prompt)])
        tokens, _, finish = await collect(stream)
        agree(case, tokens, None, finish)
        hits.append(finish.usage.cached_tokens)
    expected = (len(case.prompt) - 1) // 64 * 64
    assert hits == [0, expected, expected]
    await router.close()


@pytest.mark.parametrize("run_ahead", ["never", "always"])
async def test_after_a_forced_preemption(case: Reference, run_ahead: str) -> None:
    await forced_preemption(case, InlineBackend(case.directory, blocks=5), run_ahead)


async def forced_preemption(case: Reference, backend: Inline, run_ahead: str) -> None:
    """Five blocks: an older sequence needs its third while ours, the younger, holds three. Ours is preempted and computed again."""
    telemetry = Telemetry()
    router = await start(backend, case.directory, telemetry, prefix_cache=False, run_ahead=run_ahead, step_tokens=64)
    [older] = router.submit([request_for(case.prompt[:60], tokens=100)])
    async for event in older:
        if isinstance(event, TokenEvent) and backend.steps > 50:
            break
    [mine] = router.submit([request_for(case.prompt)])
    tokens, _, finish = await collect(mine)
    agree(case, tokens, None, finish)
    assert (await collect(older))[2].reason is FinishReason.LENGTH
    rows = telemetry.snapshot().render(False)[0].decode().splitlines()
    assert sum(float(row.split()[-1]) for row in rows if row.startswith("deepseek_preemptions_total")) > 0
    await router.close()


async def test_after_a_lost_worker(case: Reference) -> None:
    await lost_worker(case, InlineBackend(case.directory, lose_at=frozenset({2, 12})))


async def lost_worker(case: Reference, backend: Inline) -> None:
    """Lost in the middle of the prompt and again in the middle of the generated tokens."""
    router = await start(backend, case.directory, step_tokens=40)
    [stream] = router.submit([request_for(case.prompt)])
    tokens, _, finish = await collect(stream)
    agree(case, tokens, None, finish)
    assert backend.starts == 3
    await router.close()


@pytest.mark.parametrize("name", ["llama-gqa3-llama3", "mistral-gqa7-window", "qwen2-mixed-windows", "qwen3-gqa4"])
async def test_after_the_worker_was_killed(name: str, tmp_path: Path) -> None:
    """A real worker process, killed after the third generated token: the stream goes on with the same tokens."""
    case = make_case(name, tmp_path)
    load = LoadRequest(str(tmp_path), dtype="float32", threads=1, max_rows=8, max_step_tokens=128)
    router = await start(WorkerBackend(load, EngineSettings(threads=1)), tmp_path, run_ahead="always")
    [stream] = router.submit([request_for(case.prompt)])
    tokens: list[int] = []
    finish = None
    killed = False
    async for event in stream:
        if isinstance(event, TokenEvent):
            tokens += event.tokens
            if len(tokens) >= 3 and not killed:
                killed = True
                os.kill(router.versions()[0].info.pid, signal.SIGKILL)  # type: ignore[union-attr]
        elif isinstance(event, FinishEvent):
            finish = event
    assert finish is not None and killed
    agree(case, tuple(tokens), None, finish)
    assert router.health()[0].restarts == 1
    await router.close()
