"""`--deterministic` through the whole serving path: the logits of a sequence have the same bits under every schedule.

Alone, in batches, in slices of every size, after preemption and after a lost worker, for models with plain attention, gates, far blocks and
images, in float32 and bfloat16, and with quantised weights. The logits themselves are compared, as the sampler gets them, and the log-probs
of every prompt token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from service.engine import torch_backend
from service.engine.deterministic import require_deterministic
from service.engine.drawing import Drawing
from service.inputs.tokens import TokenCodec
from service.kernels.dispatch import require_steady
from service.schedulers.router import Model, Router
from service.telemetry import Telemetry
from service.types.catalog import V2_3, V5_2, Shape
from service.types.kv_layout import FarSpec
from service.types.request import FinishReason, ImageInput
from service.types.settings import SchedulerSettings
from tests.inline_backend import InlineBackend
from tests.kernels.conftest import needs_native
from tests.schedulers.support import metric
from tests.sparse_reference import line_checkpoint
from tests.test_image_parity import image_at, prompt_of
from tests.test_parity import collect, request_for
from tests.tiny_models import build_tiny, build_tiny_line

pytestmark = needs_native
GENERATED = 10


@dataclass
class Served:
    """A checkpoint, how it is served, and the logits that were sampled from: (prompt, position) -> bytes, each seen once or equal."""

    directory: Path
    dtype: str
    prompt: tuple[int, ...]
    images: tuple[ImageInput, ...] = ()
    backend: InlineBackend | None = None
    logits: dict[tuple[tuple[int, ...], int], bytes] = field(default_factory=dict)
    scores: dict[int, float] = field(default_factory=dict)
    differing: int = 0
    quantize: str = "none"
    spoil: Callable[[Tensor], None] | None = None

    async def start(
        self, telemetry: Telemetry | None = None, blocks: Any = 64, lose_at: frozenset[int] = frozenset(), **settings: Any
    ) -> Router:
        self.backend = InlineBackend(self.directory, blocks=blocks, lose_at=lose_at, dtype=self.dtype, quantize=self.quantize)
        model = Model("tiny", self.backend.manifest, TokenCodec.load(self.directory), self.backend)
        router = Router([model], SchedulerSettings(**{"batch_size": 32, "prefix_cache": False, **settings}), telemetry or Telemetry())
        await router.start()
        return router

    async def ask(self, router: Router, others: list[tuple[int, ...]], tokens: int = GENERATED) -> tuple[int, ...]:
        """Our prompt after `others`, all at once; our tokens. Prompt log-probs are compared with those of earlier calls."""
        rest = [router.submit([request_for(prompt, tokens=tokens + 7)])[0] for prompt in others]
        [mine] = router.submit([request_for(self.prompt, tokens=tokens, images=self.images, scored=True)])
        found, logprobs, finish = await collect(mine)
        for stream in rest:
            assert (await collect(stream))[2].reason is FinishReason.LENGTH
        assert finish.reason is FinishReason.LENGTH and len(logprobs) == len(self.prompt) - 1
        for position, value in enumerate(logprobs.tolist()):
            self.differing += self.scores.setdefault(position, value) != value
        return found

    def record(self, logits: Tensor, rows: np.ndarray, positions: np.ndarray) -> None:
        assert self.backend is not None
        for index, (row, position) in enumerate(zip(rows.tolist(), positions.tolist(), strict=True)):
            opened = self.backend.tables.opened[row]
            assert opened is not None
            bits = logits[index].contiguous().view(torch.uint8).numpy().tobytes()
            self.differing += self.logits.setdefault((opened.tokens[: opened.prompt_tokens], position), bits) != bits


def drawn(seed: int, length: int) -> tuple[int, ...]:
    return tuple(int(token) for token in np.random.default_rng(seed).integers(0, 256, length))


SHAPE = Shape(331, 40, 3, 4, 2, 72, 640, window=70, far=FarSpec(blocks=2, refresh=4), dense_layers=(1,))
GATED = Shape(331, 40, 2, 4, 2, 72, 256)
OTHERS = [drawn(7 + length, length) for length in (5, 130, 64, 33, 97)]


def make(name: str, place: Path) -> Served:
    kind, dtype = name.split("-")
    if kind == "images":
        prompt, images = prompt_of(20, image_at(0, 3, 4, 1), 30, image_at(0, 2, 5, 2), 25)
        return Served(build_tiny_line(place / "model"), dtype, prompt, images)
    if kind == "far":
        return Served(line_checkpoint(place / "model", V5_2.spec(SHAPE, end_ids=(257,))), dtype, drawn(1, 330))
    if kind == "gated":
        return Served(line_checkpoint(place / "model", V2_3.spec(GATED, end_ids=(257,))), dtype, drawn(1, 150))
    directory = build_tiny(place / "model", "llama", seed=3, tie_word_embeddings=True)
    return Served(directory, dtype, drawn(1, 150), quantize="none" if kind == "llama" else kind)


CASES = (
    "llama-float32",
    "llama-bfloat16",
    "gated-float32",
    "gated-bfloat16",
    "int8-float32",
    "int4-float32",
    "far-float32",
    "far-bfloat16",
    "images-float32",
)


@pytest.fixture
def served(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Served]:
    """One of CASES with steady kernels, its logits recorded where tokens are drawn."""
    made = make(request.param, tmp_path)

    class Recorded(Drawing):
        def tokens(self, logits: Tensor, table: Any) -> Any:
            if made.spoil is not None:
                made.spoil(logits)
            made.record(logits, self._rows, self._positions)
            return super().tokens(logits, table)

    monkeypatch.setattr(torch_backend, "Drawing", Recorded)
    yield made
    require_steady(False)


async def every_schedule(served: Served, telemetry: Telemetry) -> set[tuple[int, ...]]:
    """The tokens that all the schedules gave; logits and log-probs that differ are counted in `served`."""
    found = set()
    settings: list[dict[str, Any]] = [
        {},
        {"step_tokens": 512},
        {"step_tokens": 1},
        {"step_tokens": 23},
        {"step_tokens": 64, "run_ahead": "always"},
    ]
    for number, options in enumerate(settings):
        for others in ([], OTHERS[: number + 1]) if number != 2 else ([],):
            router = await served.start(**options)
            found.add(await served.ask(router, others))
            await router.close()
    router = await served.start(step_tokens=64, lose_at=frozenset({2, 9}))
    found.add(await served.ask(router, OTHERS[:2]))
    assert served.backend is not None and served.backend.starts == 3
    await router.close()
    layout = served.backend.manifest.spec.kv_layout()
    # Both fit at first and not when they have grown: the younger, which is ours, is preempted and computed again.
    spare = [2 if group.window is None else 5 for group in layout.groups]
    size = len(served.prompt) + 64
    blocks = tuple(layout.blocks_for(group, size) + some for group, some in zip(layout.groups, spare, strict=True))
    router = await served.start(telemetry, blocks=blocks, step_tokens=48)
    found.add((await served.ask(router, [drawn(21, 60)], tokens=90))[:GENERATED])
    await router.close()
    return found


@pytest.mark.parametrize("served", CASES, indirect=True)
async def test_every_schedule_gives_the_same_bits(served: Served) -> None:
    require_deterministic(torch.device("cpu"), getattr(torch, served.dtype), served.quantize)
    telemetry = Telemetry()
    tokens = await every_schedule(served, telemetry)
    assert len(tokens) == 1 and served.differing == 0
    assert len(served.logits) > 3 * GENERATED and len(served.scores) == len(served.prompt) - 1
    assert metric(telemetry, "preemptions_total") > 0


@pytest.mark.parametrize("served", ["llama-float32"], indirect=True)
async def test_a_product_that_sees_its_batch_is_noticed(served: Served) -> None:
    """The same comparison fails where the last bit of one logit depends on the number of rows."""

    def spoil(logits: Tensor) -> None:
        if len(logits) % 2 == 0:
            logits[0, 5] = torch.nextafter(logits[0, 5], torch.tensor(float("inf")))

    require_steady(True)
    served.spoil = spoil
    await every_schedule(served, Telemetry())
    assert served.differing > 0
