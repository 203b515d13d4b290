from __future__ import annotations

import asyncio
import subprocess
import sys

import pytest

from service.schedulers.router import Router
from service.telemetry import Telemetry
from service.types.errors import InvalidRequest, ModelNotFound, StartupError, Unavailable
from service.types.settings import SchedulerSettings
from tests.fakes import FakeBackend, FakeBehaviour, FakeManifest, fake_model, fake_router, fake_spec, loop_clock, run_virtual
from tests.schedulers.support import ask, read_all

A, B, C = (digit * 64 for digit in "abc")


def two_models(**settings) -> Router:
    models = [
        fake_model(name="nano", manifest=FakeManifest(fake_spec(), digest=A, line="2.3")),
        fake_model(name="other", manifest=FakeManifest(fake_spec(), digest=B, line="v1.0")),
        fake_model(name="plain", manifest=FakeManifest(fake_spec(), digest=C, line=None)),
    ]
    return Router(models, SchedulerSettings(**settings), Telemetry(), clock=loop_clock)


@pytest.mark.parametrize(
    ("name", "served"),
    [
        (None, "nano"),
        ("nano", "nano"),
        ("v2.3", "nano"),
        ("2.3", "nano"),
        ("stable", "nano"),
        ("v2.3@aaaaaaaaaaaa", "nano"),
        ("1.0", "other"),
        ("v1.0", "other"),
        ("v1.0@bbbbbbbbbbbb", "other"),
        ("plain", "plain"),
        ("plain@cccccccccccc", "plain"),
    ],
)
def test_names_mean_versions(name, served):
    assert two_models().resolve(name).name == served


@pytest.mark.parametrize("name", ["", "v5.2", "nano2", "NANO"])
def test_what_is_not_there_is_not_found(name):
    with pytest.raises(ModelNotFound):
        two_models().resolve(name)


def test_versions_list_their_aliases_once():
    versions = two_models().versions()
    assert [version.artifact for version in versions] == ["v2.3@aaaaaaaaaaaa", "v1.0@bbbbbbbbbbbb", "plain@cccccccccccc"]
    assert [set(version.aliases) for version in versions] == [{"v2.3", "2.3", "stable", "auto"}, {"v1.0", "1.0"}, set()]


def test_a_served_name_wins_over_an_alias_and_names_are_distinct():
    models = [
        fake_model(name="first", manifest=FakeManifest(fake_spec(), digest=A)),
        fake_model(name="v2.3", manifest=FakeManifest(fake_spec(), digest=B)),
    ]
    router = Router(models, SchedulerSettings(), Telemetry())
    assert router.resolve("v2.3").name == "v2.3"
    assert router.resolve("2.3").name == "first"
    with pytest.raises(InvalidRequest):
        Router([models[0], models[0]], SchedulerSettings(), Telemetry())
    with pytest.raises(InvalidRequest):
        Router([], SchedulerSettings(), Telemetry())


def test_nothing_is_accepted_before_the_worker_is_ready():
    async def main():
        router = fake_router()
        with pytest.raises(Unavailable) as refusal:
            router.submit([ask()])
        assert refusal.value.retry_after_s
        assert (router.ready(), router.health()[0].state, router.versions()[0].info) == (False, "loading", None)
        await router.start()
        assert (router.ready(), router.health()[0].state, router.versions()[0].info.device) == (True, "ready", "fake")
        outcomes = await read_all(router.submit([ask()]))
        await router.close()
        await router.close()
        return outcomes

    assert len(run_virtual(main())[0].tokens) == 8


def test_versions_do_not_share_prefixes_or_workers():
    async def main():
        router = two_models()
        await router.start()
        prompt = "p" * 200
        first = await read_all(router.resolve("nano").loop.submit([ask(prompt)]))
        other = await read_all(router.resolve("other").loop.submit([ask(prompt)]))
        again = await read_all(router.resolve("nano").loop.submit([ask(prompt)]))
        await router.close()
        return [outcomes[0].ending.usage.cached_tokens for outcomes in (first, other, again)]

    assert run_virtual(main()) == [0, 0, 192]


def test_a_group_of_two_versions_is_refused():
    async def main():
        router = fake_router()
        await router.start()
        with pytest.raises(InvalidRequest):
            router.submit([])
        await router.close()

    run_virtual(main())


def test_a_worker_that_cannot_start_says_so():
    async def main():
        router = fake_router(FakeBackend(behaviour=FakeBehaviour(refuses_to_start=True)))
        with pytest.raises(StartupError):
            await router.start()
        await router.close()

    run_virtual(main())


def test_a_first_start_that_fails_is_tried_again():
    async def main():
        router = fake_router(FakeBackend(behaviour=FakeBehaviour(failing_starts=2)))
        await router.start()
        assert router.ready()
        await router.close()

    run_virtual(main())


def test_a_stalled_worker_shows_in_health():
    async def main():
        backend = FakeBackend()
        router = fake_router(backend)
        await router.start()
        backend.behaviour.stalled = True
        assert router.health()[0].state == "stalled"
        backend.behaviour.stalled = False
        backend.kill()
        await asyncio.sleep(1.5)
        assert router.health()[0].state == "restarting"
        await asyncio.sleep(5)
        assert (router.health()[0].state, router.health()[0].restarts) == ("ready", 1)
        await router.close()

    run_virtual(main())


def test_a_default_that_is_loaded_again_for_a_request_stays_ready():
    async def main():
        router = fake_router(FakeBackend())
        assert not router.ready()  # the service starts
        await router.start()
        default = router.versions()[0]
        for state, expected in (("ready", True), ("unloaded", True), ("loading", True), ("restarting", False)):
            default.loop.state = state
            assert router.ready() is expected, state
        default.loop.state = "ready"
        await router.close()

    run_virtual(main())


def test_the_schedulers_never_load_torch():
    code = (
        "import sys, service.schedulers.router, tests.fakes;"
        "sys.exit(any(name in sys.modules for name in ('torch', 'triton', 'onnxruntime')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
