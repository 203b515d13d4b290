"""An engine started by the benchmark itself: a checkpoint, a worker and a loop without HTTP, for comparing ways to serve on one machine.

It does not know what is compared. Invariant: whatever ends the block, the worker is stopped.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from random import Random
from statistics import median
from types import TracebackType
from typing import NamedTuple, Self

from service.checkpoints.long_context import adapt
from service.checkpoints.manifest import Manifest, read_manifest
from service.engine.backend_choice import choose_backend
from service.engine.supervisor import WorkerBackend
from service.inputs.tokens import TokenCodec
from service.schedulers.router import Model, Router
from service.schedulers.streams import Stream
from service.telemetry import Telemetry
from service.types.errors import StartupError
from service.types.plan import BackendInfo, LoadRequest
from service.types.request import FinishEvent, GenerationRequest, PromptEvent, Sampling, Stop, TokenEvent, TokenLogprob
from service.types.settings import AttentionSettings, EngineSettings, SchedulerSettings

NAME = "local"


class Round(NamedTuple):
    """One round of prompts at once: tokens a second of the prompts until the last first token, of what came after it, and of all output."""

    prefill: float
    decode: float
    output: float


class LocalEngine:
    """`directory` served with these settings; use as an async context manager. Raises StartupError."""

    def __init__(
        self,
        directory: Path,
        engine: EngineSettings,
        scheduler: SchedulerSettings,
        attention: AttentionSettings = AttentionSettings(),  # noqa: B008 - frozen
    ) -> None:
        manifest = read_manifest(directory)
        self.manifest: Manifest = replace(manifest, spec=adapt(manifest.spec, attention))
        self.codec = TokenCodec.load(directory)
        request = LoadRequest(
            directory=str(directory.absolute()),
            backend=choose_backend(self.manifest.spec, engine, scheduler.batch_size).backend,
            dtype=engine.dtype,
            device=engine.device,
            threads=engine.threads,
            kv_bytes=engine.kv_bytes,
            max_rows=scheduler.batch_size,
            max_step_tokens=scheduler.step_tokens,
            context_tokens=engine.context_tokens,
            quantize=engine.quantize,
            quantize_cache=engine.quantize_cache,
            quantize_cache_bytes=engine.quantize_cache_bytes,
            deterministic=engine.deterministic,
            kv_cache_dtype=engine.kv_cache_dtype,
            cuda_graphs=engine.cuda_graphs,
            attention=attention,
        )
        backend = WorkerBackend(request, engine)
        unhurried = replace(scheduler, prefix_cache=False, request_deadline_s=3600.0)
        self._router = Router([Model(NAME, self.manifest, self.codec, backend)], unhurried, Telemetry())

    async def __aenter__(self) -> Self:
        await self._router.start()
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        await self._router.close()

    @property
    def info(self) -> BackendInfo:
        """What the worker says of itself."""
        info = self._router.versions()[0].info
        if info is None:
            raise StartupError("the worker is not there: its log above says why.")
        return info

    async def generate(self, prompts: Sequence[tuple[int, ...]], tokens: int) -> Round:
        """Generate `tokens` greedy tokens for every prompt, all sent at once."""
        began = time.perf_counter()
        stop, sampling = Stop(tokens, ignore_eos=True), Sampling(temperature=0.0)
        streams = self._router.submit([GenerationRequest(NAME, NAME, prompt, stop, sampling) for prompt in prompts])
        return round_of(began, sum(len(prompt) for prompt in prompts), await asyncio.gather(*(arrivals(stream) for stream in streams)))

    async def score(self, prompt: tuple[int, ...]) -> tuple[TokenLogprob, ...]:
        """Log-probs of the prompt's tokens from the second on, each with the likeliest token in its place."""
        request = GenerationRequest(NAME, NAME, prompt, Stop(1, ignore_eos=True), Sampling(temperature=0.0), prompt_logprobs=1)
        (stream,) = self._router.submit([request])
        found: tuple[TokenLogprob, ...] = ()
        async for event in stream:
            if isinstance(event, PromptEvent):
                found = event.logprobs
            elif isinstance(event, FinishEvent) and event.error is not None:
                raise event.error
        return found


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, smallest and largest of some rounds, for a row."""
    return {"median": round(median(values), 3), "min": round(min(values), 3), "max": round(max(values), 3), "rounds": len(values)}


def random_prompts(count: int, length: int, vocabulary: int, seed: int) -> list[tuple[int, ...]]:
    """Prompts of random tokens, the same for the same seed."""
    draw = Random(seed)
    return [tuple(draw.randrange(vocabulary) for _ in range(length)) for _ in range(count)]


async def arrivals(stream: Stream) -> list[tuple[float, int]]:
    """When tokens came, and how many at a time. Raises what ended the stream."""
    found = []
    async for event in stream:
        if isinstance(event, TokenEvent):
            found.append((time.perf_counter(), len(event.tokens)))
        elif isinstance(event, FinishEvent) and event.error is not None:
            raise event.error
    return found


def round_of(began: float, read: int, streams: Sequence[Sequence[tuple[float, int]]]) -> Round:
    """The speeds of one round that began at this time and read so many prompt tokens.

    Sequences whose prompts were read first decode while others are read: of these tokens neither number nor time counts as decoding. What
    one step gives is told stream by stream, so what came before half of the time to the next step belongs to the last first token's.
    """
    last, end = max(streams, key=lambda stream: stream[0][0]), max(stream[-1][0] for stream in streams)
    first, following = last[0][0], last[min(1, len(last) - 1)][0]
    made = sum(count for stream in streams for _, count in stream)
    decoded = sum(count for stream in streams for time_s, count in stream if time_s > (first + following) / 2)
    return Round(read / (first - began), decoded / (end - first) if end > first and decoded else 0.0, made / (end - began))
