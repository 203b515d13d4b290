"""Whatever happens: random requests, cancels, deaths, deadlines, preemptions and readers, against the reference of each request alone."""

from __future__ import annotations

import asyncio
from functools import cache

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from service.schedulers.router import Router
from service.telemetry import Telemetry
from service.types.errors import DeadlineExceeded, NumericalFailure, ServiceError, WorkerKilled
from service.types.kv_layout import FarStore
from service.types.request import FinishReason, GenerationRequest
from tests.fakes import FakeBackend, Far
from tests.schedulers.support import Outcome, ask, generate, metric, read, small_backend, with_router

PROMPTS = (
    "a",
    "shared prefix of several blocks",
    "shared prefix of several blocks, and more",
    "n" * 21,
    "poison pill",
    "bitter nan prompt",
)
WINDOWS = ((None,), (None, 6), (3,), (9, None), (Far(6),), (None, Far(9, refresh=4)), (Far(5, refresh=2), Far(11, store=FarStore.EVICT)))


def make_backend(windows: tuple[int | Far | None, ...], blocks: int, **behaviour: object) -> FakeBackend:
    return small_backend(
        blocks,
        windows,
        end_every=40,
        kills=lambda opening: bytes(opening.tokens[:6]) == b"poison",
        nan=lambda opening, position: bytes(opening.tokens[:6]) == b"bitter" and position >= 20,
        **behaviour,
    )


@cache
def reference(request: GenerationRequest, windows: tuple[int | Far | None, ...]) -> Outcome:
    """The request in a server of its own, prefilled in one piece."""
    backend = make_backend(windows, 64, max_step_tokens=200)
    return generate([request], backend, step_tokens=200, prefix_cache=False)[0]


requests = st.builds(
    lambda prompt, tokens, seed, tenant, priority, strings, salt, scores: ask(
        prompt,
        tokens,
        seed=seed,
        tenant=tenant,
        priority=priority,
        strings=strings,
        cache_salt=salt,
        logprobs=scores,
        prompt_logprobs=scores,
    ),
    st.sampled_from(PROMPTS[:4] * 3 + PROMPTS),
    st.integers(1, 30),
    st.integers(0, 3),
    st.sampled_from(("", "x", "y")),
    st.integers(0, 2),
    st.sampled_from(((), (), ("ab", "e"), ("zzz",))),
    st.sampled_from(("", "", "salt")),
    st.sampled_from((None, None, None, 1)),
)
# (delay before submission, group, delay before a cancel or None, deadline after submission or None)
arrivals = st.lists(
    st.tuples(
        st.sampled_from((0.0, 0.0, 0.01, 0.035, 0.2)),
        st.lists(requests, min_size=1, max_size=4),
        st.sampled_from((None, None, None, 0.0, 0.015, 0.1)),
        st.sampled_from((None, None, None, 0.012, 0.3)),
    ),
    min_size=1,
    max_size=6,
)


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    arrivals=arrivals,
    windows=st.sampled_from(WINDOWS),
    blocks=st.sampled_from((19, 24, 64)),
    step_tokens=st.sampled_from((8, 13, 16)),
    run_ahead=st.sampled_from(["never", "always", "auto"]),
    prefix_cache=st.booleans(),
    deaths=st.frozensets(st.integers(1, 40), max_size=4),
)
def test_one_ending_right_output_right_bill(arrivals, windows, blocks, step_tokens, run_ahead, prefix_cache, deaths):
    telemetry = Telemetry()
    backend = make_backend(windows, blocks, die_at_steps=deaths)

    async def one(router: Router, group, cancel_s, deadline_s):
        deadline = asyncio.get_running_loop().time() + deadline_s if deadline_s is not None else float("inf")
        limited = [GenerationRequest(**{**fields(request), "deadline_s": deadline}) for request in group]
        try:
            streams = router.submit(limited)
        except ServiceError:
            return []
        reading = [asyncio.create_task(read(stream)) for stream in streams]
        if cancel_s is not None:
            await asyncio.sleep(cancel_s)
            streams[0].cancel()
        return list(zip(group, await asyncio.gather(*reading), strict=True))

    async def body(router: Router):
        tasks = []
        for delay, group, cancel_s, deadline_s in arrivals:
            await asyncio.sleep(delay)
            router.versions()[0].loop.check()
            tasks.append(asyncio.create_task(one(router, group, cancel_s, deadline_s)))
        return [pair for pairs in await asyncio.gather(*tasks) for pair in pairs]

    pairs = with_router(body, backend, telemetry, step_tokens=step_tokens, run_ahead=run_ahead, prefix_cache=prefix_cache)
    for request, outcome in pairs:
        check_outcome(request, outcome, reference(request, windows), bool(deaths))
    assert metric(telemetry, "requests_total") == len(pairs)
    assert metric(telemetry, "generation_tokens_total") == sum(outcome.ending.usage.generated_tokens for _, outcome in pairs)


def fields(request: GenerationRequest) -> dict[str, object]:
    return {name: getattr(request, name) for name in GenerationRequest.__dataclass_fields__}


def check_outcome(request: GenerationRequest, outcome: Outcome, expected: Outcome, deaths: bool) -> None:
    ending, usage = outcome.ending, outcome.ending.usage
    assert usage.prompt_tokens == len(request.prompt)
    assert usage.generated_tokens == len(outcome.tokens)
    assert usage.cached_tokens < len(request.prompt)
    assert outcome.tokens == expected.tokens[: len(outcome.tokens)]
    assert expected.text.startswith(outcome.text) or ending.reason is not FinishReason.STOP
    if request.sampling.logprobs is not None:
        assert [entry.token for entry in outcome.logprobs] == list(outcome.tokens)
        assert usage.cached_tokens == 0
    if ending.reason in (FinishReason.STOP, FinishReason.LENGTH):
        assert outcome.content == expected.content
        assert len(outcome.prompt_events) == (request.prompt_logprobs is not None)
    elif ending.reason is FinishReason.ERROR:
        poisonous, bitter = bytes(request.prompt).startswith(b"poison"), bytes(request.prompt).startswith(b"bitter")
        allowed = (DeadlineExceeded,) + (WorkerKilled,) * (poisonous or deaths) + (NumericalFailure,) * bitter
        assert isinstance(ending.error, allowed)


def test_no_sequence_starves():
    """A stream of short requests of one tenant does not keep a long one of another waiting, nor does memory pressure."""

    async def body(router: Router):
        done = asyncio.Event()

        async def pour() -> int:
            number = 0
            while not done.is_set():
                for stream in router.submit([ask("short", 6, tenant="busy", seed=number + index) for index in range(8)]):
                    asyncio.get_running_loop().create_task(read(stream))
                number += 8
                await asyncio.sleep(0.03)
            return number

        pouring = asyncio.create_task(pour())
        await asyncio.sleep(0.5)
        started = asyncio.get_running_loop().time()
        long = await asyncio.gather(*(read(stream) for stream in router.submit([ask("l" * 90, 60, tenant="quiet")])))
        took = asyncio.get_running_loop().time() - started
        done.set()
        await pouring
        for sequence in router.versions()[0].loop._planner.sequences():
            sequence.stream.cancel()
        return long, took

    long, took = with_router(body, small_backend(blocks=50), queue_requests=100_000)
    assert long[0].reason is FinishReason.LENGTH
    assert took < 3.0
