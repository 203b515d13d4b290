"""What the scheduler tests share: requests in one line, a running router on the virtual clock, and reading streams to their end."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from typing import Any

import pytest

from service.schedulers.router import Router
from service.schedulers.streams import Stream
from service.telemetry import Telemetry
from service.types.request import Event, FinishEvent, FinishReason, GenerationRequest, PromptEvent, Sampling, Stop, TokenEvent
from service.types.settings import SchedulerSettings
from tests.fakes import END_ID, ByteCodec, FakeBackend, FakeBehaviour, Far, fake_router, layout, run_virtual


@dataclass(frozen=True)
class Outcome:
    """One stream read to its end."""

    events: tuple[Event, ...]

    @property
    def ending(self) -> FinishEvent:
        endings = [event for event in self.events if isinstance(event, FinishEvent)]
        assert len(endings) == 1, f"{len(endings)} terminal events"
        assert self.events[-1] is endings[0], "something follows the terminal event"
        return endings[0]

    @property
    def text(self) -> str:
        return "".join(event.text for event in self.events if isinstance(event, TokenEvent))

    @property
    def tokens(self) -> tuple[int, ...]:
        return tuple(token for event in self.events if isinstance(event, TokenEvent) for token in event.tokens)

    @property
    def logprobs(self) -> tuple[Any, ...]:
        return tuple(entry for event in self.events if isinstance(event, TokenEvent) for entry in event.logprobs)

    @property
    def prompt_events(self) -> list[PromptEvent]:
        return [event for event in self.events if isinstance(event, PromptEvent)]

    @property
    def reason(self) -> FinishReason:
        return self.ending.reason

    @property
    def content(self) -> tuple[Any, ...]:
        """What must not depend on scheduling."""
        return self.text, self.tokens, self.reason, self.ending.matched_stop, self.ending.usage.generated_tokens


async def read(stream: Stream) -> Outcome:
    return Outcome(tuple([event async for event in stream]))


async def read_all(streams: Iterable[Stream]) -> list[Outcome]:
    return list(await asyncio.gather(*(read(stream) for stream in streams)))


def ask(prompt: str | bytes | tuple[int, ...] = "hello", max_tokens: int = 8, **fields: Any) -> GenerationRequest:
    """A request; `stop` fields and `sampling` fields are given by name beside those of the request."""
    if not isinstance(prompt, tuple):
        prompt = tuple(prompt.encode() if isinstance(prompt, str) else prompt)
    stop = {name: fields.pop(name) for name in ("min_tokens", "strings", "token_ids", "ignore_eos") if name in fields}
    sampling = {name: fields.pop(name) for name in ("seed", "choice", "logprobs") if name in fields}
    fields.setdefault("request_id", "test")
    return GenerationRequest(
        version="fake",
        prompt=prompt,
        stop=Stop(max_tokens=max_tokens, end_ids=(END_ID,), **stop),
        sampling=Sampling(**sampling),
        **fields,
    )


def small_backend(blocks: int | tuple[int, ...] = 64, windows: tuple[int | Far | None, ...] = (None,), **options: Any) -> FakeBackend:
    """Blocks of 4 tokens, 8 rows, 16 tokens a step."""
    kinds = layout(4, windows)
    group_blocks = (blocks,) * len(kinds.groups) if isinstance(blocks, int) else blocks
    behaviour = FakeBehaviour(**{name: options.pop(name) for name in list(options) if hasattr(FakeBehaviour, name)})
    options = {"max_rows": 8, "max_step_tokens": 16, "context_tokens": 200, **options}
    return FakeBackend(kinds, group_blocks, behaviour=behaviour, **options)


def with_router(
    body: Callable[[Router], Awaitable[Any]],
    backend: FakeBackend | None = None,
    telemetry: Telemetry | None = None,
    **settings: Any,
) -> Any:
    """Run `body` with a started router on the virtual clock; afterwards no plan was wrong and no block is held."""
    backend = backend or small_backend()
    settings = {"batch_size": 8, "step_tokens": 16, **settings}

    async def main() -> Any:
        router = fake_router(backend, SchedulerSettings(**settings), telemetry)
        await router.start()
        try:
            result = await body(router)
            loop = router.versions()[0].loop
            if loop.state != "down":
                loop.check()
        finally:
            await router.close()
        assert backend.violation is None, backend.violation
        space = router.versions()[0].loop._planner.space
        space.check(())
        return result

    return run_virtual(main())


def generate(requests: Iterable[GenerationRequest], backend: FakeBackend | None = None, **settings: Any) -> list[Outcome]:
    """Submit all at once and read to the end."""

    async def body(router: Router) -> list[Outcome]:
        return await read_all(router.submit(list(requests)))

    return with_router(body, backend, **settings)


def metric(telemetry: Telemetry, name: str, **labels: str) -> float:
    """The sum over the series of a metric whose labels include these."""
    total = 0.0
    for family in telemetry.snapshot().collect():
        for sample in family.samples:
            if sample.name == f"deepseek_{name}" and all(sample.labels.get(key) == value for key, value in labels.items()):
                total += sample.value
    return total


def log_lines(captured: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in captured.splitlines() if line.startswith("{")]


@pytest.fixture
def codec() -> ByteCodec:
    return ByteCodec()
