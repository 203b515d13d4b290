"""The whole serving path over two stores against the positional rule computed in one pass: tiny v5.2 and tiny llama with a window added.

Whatever the schedule (slices, batches, prefix hits, preemption, a lost or killed worker), log-probs and tokens are those of the rule: what
a query sees, and in which precision, is a function of its position.
"""

from __future__ import annotations

import os
import signal
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from service.checkpoints.long_context import adapt
from service.checkpoints.manifest import Manifest, read_manifest
from service.engine.supervisor import WorkerBackend
from service.inputs.tokens import TokenCodec
from service.schedulers.router import Model, Router
from service.telemetry import Telemetry
from service.types.catalog import V5_2, Shape
from service.types.kv_layout import FarSpec
from service.types.plan import Backend, LoadRequest
from service.types.request import FinishEvent, FinishReason, GenerationRequest, TokenEvent
from service.types.settings import AttentionSettings, EngineSettings, SchedulerSettings
from tests.inline_backend import InlineBackend
from tests.schedulers.support import metric
from tests.sparse_reference import RuleModel, line_checkpoint
from tests.test_parity import TOLERANCE, collect, request_for
from tests.tiny_models import build_tiny

PROMPT_TOKENS, GENERATED = 330, 8
SHAPE = Shape(331, 32, 3, 4, 2, 48, 640, window=70, far=FarSpec(blocks=2, refresh=4), dense_layers=(1,))
CASES: dict[str, AttentionSettings | None] = {
    "flagship": None,
    "llama-int8": AttentionSettings(attention_window=64, far_blocks=1),
    "llama-int4-refresh": AttentionSettings(attention_window=100, far_blocks=2, kv_far="int4", far_refresh=16, dense_layers=(0,)),
    "llama-native": AttentionSettings(attention_window=64, far_blocks=2, kv_far="bf16", far_refresh=64),
    "llama-evict": AttentionSettings(attention_window=64, kv_far="evict"),
    "llama-dense-prompts": AttentionSettings(attention_window=64, far_blocks=1, prefill="dense", far_refresh=8),
}


@dataclass(frozen=True)
class Case:
    """A served checkpoint and the rule's own model of it."""

    name: str
    directory: Path
    attention: AttentionSettings
    prompt: tuple[int, ...]
    rule: RuleModel

    @property
    def manifest(self) -> Manifest:
        return adapted(self.directory, self.attention)

    def check(self, prompt: tuple[int, ...], tokens: tuple[int, ...], logprobs: np.ndarray | None = None) -> int:
        """Every token is the rule's own best, unless two are as good; gives the far blocks that the rule reads."""
        logits, read = self.rule.logits(prompt + tokens, len(prompt))
        rows = logits[len(prompt) - 1 : -1]
        assert len(tokens) == len(rows) > 0
        best = np.sort(rows, axis=1)[:, -2:]
        decided = best[:, 1] - best[:, 0] > 2 * TOLERANCE
        assert decided.sum() >= len(tokens) // 2, "the rule must decide some tokens clearly"
        assert (rows.argmax(axis=1) == np.array(tokens))[decided].all()
        if logprobs is not None:
            wide = logits[: len(prompt) - 1].astype(np.float64)
            expected = wide[np.arange(len(wide)), prompt[1:]] - np.log(np.exp(wide).sum(axis=1))
            assert np.abs(logprobs - expected).max() <= TOLERANCE
        return read


def adapted(directory: Path, attention: AttentionSettings) -> Manifest:
    manifest = read_manifest(directory)
    return replace(manifest, spec=adapt(manifest.spec, attention))


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    return make_case(request.param, tmp_path_factory.mktemp(request.param))


def make_case(name: str, place: Path) -> Case:
    attention = CASES[name]
    if attention is None:
        directory, attention = line_checkpoint(place / "model", V5_2.spec(SHAPE, end_ids=(257,))), AttentionSettings()
    else:
        directory = build_tiny(place / "model", "llama", seed=3, max_position_embeddings=640)
    prompt = tuple(int(token) for token in np.random.default_rng(11).integers(0, 256, PROMPT_TOKENS))
    return Case(name, directory, attention, prompt, RuleModel(adapted(directory, attention)))


async def start(case: Case, backend: Backend | None = None, telemetry: Telemetry | None = None, **settings: Any) -> Router:
    backend = backend or InlineBackend(case.directory, attention=case.attention)
    model = Model("tiny", case.manifest, TokenCodec.load(case.directory), backend)
    router = Router([model], SchedulerSettings(**{"batch_size": 32, **settings}), telemetry or Telemetry())
    await router.start()
    return router


def ask(prompt: tuple[int, ...], tokens: int = GENERATED, **changes: Any) -> GenerationRequest:
    return request_for(prompt, tokens=tokens, **changes)


async def test_alone(case: Case) -> None:
    telemetry = Telemetry()
    router = await start(case, telemetry=telemetry)
    [stream] = router.submit([ask(case.prompt, scored=True)])
    tokens, logprobs, _ = await collect(stream)
    read = case.check(case.prompt, tokens, logprobs)
    # The rule's model also reads for the last token, which the service never computes.
    served = metric(telemetry, "far_blocks_read_total")
    assert 0.9 * read <= served <= read and (read > 0) == (case.attention.kv_far != "evict")
    await router.close()


@pytest.mark.parametrize("chunk", [1, 23, 64, 97, 330])
async def test_slices(case: Case, chunk: int) -> None:
    """The step's budget is the slice of a sequence that is alone, unless its window is shorter."""
    backend = InlineBackend(case.directory, attention=case.attention)
    router = await start(case, backend, step_tokens=chunk, prefix_cache=False)
    [stream] = router.submit([ask(case.prompt, scored=True, tokens=2)])
    tokens, logprobs, _ = await collect(stream)
    case.check(case.prompt, tokens, logprobs)
    longest = min(chunk, case.manifest.spec.kv_layout().slice_tokens or chunk)
    assert backend.steps == -(-PROMPT_TOKENS // longest) + 1
    await router.close()


@pytest.mark.parametrize("run_ahead", ["never", "always"])
async def test_among_others(case: Case, run_ahead: str) -> None:
    router = await start(case, step_tokens=96, run_ahead=run_ahead)
    draw = np.random.default_rng(5)
    others = [tuple(int(token) for token in draw.integers(0, 256, length)) for length in (5, 200, 64, 300, 129)]
    streams = [router.submit([ask(prompt)])[0] for prompt in (*others[:3], case.prompt, *others[3:])]
    found = [await collect(stream) for stream in streams]
    for prompt, (tokens, _, finish) in zip((*others[:3], case.prompt, *others[3:]), found, strict=True):
        assert finish.reason is FinishReason.LENGTH
        case.check(prompt, tokens)
    await router.close()


async def test_prefix_hits_and_the_next_turn(case: Case) -> None:
    """The same prompt again, then a turn that goes on from the generated tokens; where prompts are read densely, these are read anew."""
    router = await start(case, step_tokens=128)
    [stream] = router.submit([ask(case.prompt, tokens=100)])
    tokens, _, _ = await collect(stream)
    for prompt, least in ((case.prompt, 320), (case.prompt + tokens + case.prompt[:40], 320 if case.attention.prefill == "dense" else 384)):
        [stream] = router.submit([ask(prompt)])
        more, _, finish = await collect(stream)
        assert finish.usage.cached_tokens == least
        case.check(prompt, more)
    await router.close()


@pytest.mark.parametrize("run_ahead", ["never", "always"])
async def test_after_preemption(case: Case, run_ahead: str) -> None:
    """Two sequences that fit at first and not when they have grown: the younger is preempted and computed again."""
    telemetry = Telemetry()
    layout = case.manifest.spec.kv_layout()
    blocks = tuple(
        layout.blocks_for(group, 350) + (1 if group.source is not None else 2 if group.window is None else 5) for group in layout.groups
    )
    backend = InlineBackend(case.directory, blocks=blocks, attention=case.attention)
    router = await start(case, backend, telemetry, prefix_cache=False, run_ahead=run_ahead, step_tokens=64)
    [older] = router.submit([ask(case.prompt[:200], tokens=150)])
    [mine] = router.submit([ask(case.prompt[:190], tokens=140)])
    found = [await collect(stream) for stream in (older, mine)]
    for length, (tokens, _, finish) in zip((200, 190), found, strict=True):
        assert finish.reason is FinishReason.LENGTH
        case.check(case.prompt[:length], tokens)
    assert (metric(telemetry, "preemptions_total") > 0) == (case.attention.kv_far != "evict")
    await router.close()


async def test_after_a_lost_worker(case: Case) -> None:
    backend = InlineBackend(case.directory, attention=case.attention, lose_at=frozenset({3, 11}))
    router = await start(case, backend, step_tokens=64)
    [stream] = router.submit([ask(case.prompt)])
    tokens, _, _ = await collect(stream)
    case.check(case.prompt, tokens)
    assert backend.starts == 3
    await router.close()


@pytest.mark.parametrize("name", ["flagship", "llama-int4-refresh"])
async def test_after_the_worker_was_killed(name: str, tmp_path: Path) -> None:
    """A real worker process, killed after the third generated token."""
    case = make_case(name, tmp_path)
    load = LoadRequest(str(case.directory), dtype="float32", threads=1, max_rows=8, max_step_tokens=128, attention=case.attention)
    telemetry = Telemetry()
    router = await start(case, WorkerBackend(load, EngineSettings(threads=1)), telemetry, run_ahead="always")
    [stream] = router.submit([ask(case.prompt)])
    tokens: list[int] = []
    killed = False
    async for event in stream:
        if isinstance(event, TokenEvent):
            tokens += event.tokens
            if len(tokens) >= 3 and not killed:
                killed = True
                os.kill(router.versions()[0].info.pid, signal.SIGKILL)  # type: ignore[union-attr]
        elif isinstance(event, FinishEvent):
            assert event.reason is FinishReason.LENGTH
    assert killed and router.health()[0].restarts == 1
    case.check(case.prompt, tuple(tokens))
    groups = [group.name for group in case.manifest.spec.kv_layout().groups]
    assert len(groups) == 3 and all(metric(telemetry, "kv_cache_bytes", group=group) > 0 for group in groups)
    await router.close()
