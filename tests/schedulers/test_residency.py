"""Versions are loaded when asked for, within the budget; idle ones make room, the one used longest ago first; no request is lost."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

import pytest

from service.schedulers.choice import Demand
from service.schedulers.router import Choice, Model, Router
from service.telemetry import Telemetry
from service.types.errors import StartupError, Unavailable
from service.types.request import FinishReason
from service.types.settings import FleetSettings, SchedulerSettings
from tests.fakes import ByteCodec, FakeBackend, FakeBehaviour, FakeManifest, fake_spec, loop_clock, run_virtual
from tests.schedulers.support import ask, read_all


class Fleet:
    """A router over versions a, b, c that take 10 bytes each, of which two fit."""

    def __init__(self, budget: int = 25, wait_s: float = 30.0, load: str = "demand", **behaviour: Any) -> None:
        self.backends = {name: FakeBackend(behaviour=FakeBehaviour(**behaviour)) for name in "abc"}
        self.telemetry = Telemetry()
        models = [
            Model(name, FakeManifest(fake_spec(), digest=name * 64, line=None), ByteCodec(), backend, 10)  # type: ignore[arg-type]
            for name, backend in self.backends.items()
        ]
        fleet = FleetSettings(memory_bytes=budget, load=load, load_wait_s=wait_s)
        self.router = Router(models, SchedulerSettings(), self.telemetry, clock=loop_clock, fleet=fleet)

    async def hold(self, name: str) -> None:
        await self.router.hold(Choice(self.router.resolve(name)))

    async def ask(self, name: str, **changes: Any) -> list[Any]:
        await self.hold(name)
        return self.router.submit([replace(ask(**changes), version=name)])

    def states(self) -> str:
        """a: ready is A, unloaded is a."""
        return "".join(
            version.name.upper() if version.ready else version.name if version.loop.state == "unloaded" else "?"
            for version in self.router.versions()
        )


def test_only_the_default_is_loaded_at_start() -> None:
    async def main() -> None:
        fleet = Fleet()
        await fleet.router.start()
        assert fleet.states() == "Abc" and fleet.router.ready()
        assert [health.state for health in fleet.router.health()] == ["ready", "unloaded", "unloaded"]
        with pytest.raises(Unavailable):
            fleet.router.submit([replace(ask(), version="b")])
        outcomes = await read_all(await fleet.ask("b"))
        assert outcomes[0].ending.reason is FinishReason.LENGTH and fleet.states() == "ABc"
        await fleet.router.close()

    run_virtual(main())


def test_all_are_loaded_where_that_is_wanted() -> None:
    async def main() -> None:
        fleet = Fleet(budget=0, load="start")
        await fleet.router.start()
        assert fleet.states() == "ABC"
        await fleet.router.close()

    run_virtual(main())


def test_the_one_used_longest_ago_makes_room() -> None:
    async def main() -> None:
        fleet = Fleet()
        await fleet.router.start()
        for name, states in (("a", "Abc"), ("b", "ABc"), ("a", "ABc"), ("c", "AbC"), ("b", "aBC"), ("a", "ABc")):
            await read_all(await fleet.ask(name))
            assert fleet.states() == states, name
        assert not fleet.backends["c"].up
        await fleet.router.close()
        assert all(backend.violation is None for backend in fleet.backends.values())

    run_virtual(main())


def test_a_version_at_work_stays_and_who_finds_no_room_in_time_is_told_to_come_back() -> None:
    async def main() -> None:
        fleet = Fleet(wait_s=2.0, step_s=1.0)
        await fleet.router.start()
        streams = [*(await fleet.ask("a")), *(await fleet.ask("b"))]
        with pytest.raises(Unavailable, match="at work") as refusal:
            await fleet.hold("c")
        assert refusal.value.retry_after_s and fleet.states() == "ABc"
        outcomes = await read_all(streams)
        assert all(outcome.ending.reason is FinishReason.LENGTH for outcome in outcomes)
        assert fleet.backends["c"].starts == 0
        await fleet.hold("c")
        assert fleet.states().count("C") == 1
        await fleet.router.close()

    run_virtual(main())


def test_a_version_waits_for_the_first_of_those_at_work_to_end() -> None:
    async def main() -> None:
        fleet = Fleet(step_s=1.0)
        await fleet.router.start()
        streams = [*(await fleet.ask("a", max_tokens=200)), *(await fleet.ask("b", max_tokens=4))]
        (own,) = await fleet.ask("c")
        assert fleet.states() == "AbC"
        outcomes = await read_all([*streams, own])
        assert [outcome.ending.reason for outcome in outcomes] == [FinishReason.LENGTH] * 3
        await fleet.router.close()
        assert all(backend.violation is None for backend in fleet.backends.values())

    run_virtual(main())


def test_who_waits_for_room_is_told_when_the_server_drains() -> None:
    async def main() -> None:
        fleet = Fleet(step_s=1.0)
        await fleet.router.start()
        streams = [*(await fleet.ask("a")), *(await fleet.ask("b"))]
        waiting = asyncio.ensure_future(fleet.ask("c"))
        await asyncio.sleep(0)
        await fleet.router.drain(20.0)
        with pytest.raises(Unavailable):
            await waiting
        assert all(outcome.ending.reason is FinishReason.LENGTH for outcome in await read_all(streams))
        assert fleet.backends["c"].starts == 0
        await fleet.router.close()

    run_virtual(main())


def test_what_was_loaded_once_is_known_after_it_made_room() -> None:
    async def main() -> None:
        fleet = Fleet(budget=15)
        await fleet.router.start()
        await fleet.router.loaded()
        assert [version.was_ready for version in fleet.router.versions()] == [True, False, False]
        told = asyncio.ensure_future(fleet.router.loaded())
        await fleet.hold("c")
        await told
        assert fleet.states() == "abC"
        assert [version.was_ready for version in fleet.router.versions()] == [True, False, True]
        await fleet.router.close()

    run_virtual(main())


def test_what_was_loaded_for_a_request_serves_it_before_it_makes_room() -> None:
    async def main() -> None:
        fleet = Fleet(budget=15, start_s=3.0)
        await fleet.router.start()

        async def served(name: str) -> None:
            await read_all(await fleet.ask(name))

        async with asyncio.timeout(60):
            await asyncio.gather(*(served(name) for name in "bcbac"))
        assert fleet.states().count("?") == 0
        await fleet.router.close()

    run_virtual(main())


def test_requests_that_arrive_while_it_loads_wait_for_one_load() -> None:
    async def main() -> None:
        fleet = Fleet(start_s=3.0)
        await fleet.router.start()
        answers = await asyncio.gather(*(fleet.ask("b") for _ in range(5)))
        outcomes = await read_all([stream for streams in answers for stream in streams])
        assert len(outcomes) == 5 and all(outcome.ending.reason is FinishReason.LENGTH for outcome in outcomes)
        assert fleet.backends["b"].starts == 1
        await fleet.router.close()

    run_virtual(main())


def test_what_has_room_loads_beside_the_others() -> None:
    async def main() -> None:
        fleet = Fleet(budget=0, start_s=3.0, wait_s=4.0)
        await fleet.router.start()
        begun = loop_clock()
        await asyncio.gather(fleet.hold("b"), fleet.hold("c"))
        assert fleet.states() == "ABC" and loop_clock() - begun == pytest.approx(3.0, abs=0.5)
        await fleet.router.close()

    run_virtual(main())


def test_who_has_no_room_waits_for_one_that_is_only_being_loaded() -> None:
    async def main() -> None:
        fleet = Fleet(budget=15, start_s=3.0)
        await fleet.router.start()
        (first, second) = await asyncio.gather(fleet.ask("b"), fleet.ask("c"))
        assert all(outcome.ending.reason is FinishReason.LENGTH for outcome in await read_all([*first, *second]))
        assert [fleet.backends[name].starts for name in "bc"] == [1, 1]
        await fleet.router.close()
        assert all(backend.violation is None for backend in fleet.backends.values())

    run_virtual(main())


def test_who_waits_too_long_is_told_and_the_load_goes_on() -> None:
    async def main() -> None:
        fleet = Fleet(start_s=3.0, wait_s=1.0)
        await fleet.router.start()
        with pytest.raises(Unavailable, match="being loaded") as refusal:
            await fleet.hold("b")
        assert refusal.value.retry_after_s
        await asyncio.sleep(2.5)
        await fleet.hold("b")
        assert fleet.backends["b"].starts == 1
        await fleet.router.close()

    run_virtual(main())


@pytest.mark.parametrize("fault", [{"refuses_to_start": True}, {"failing_starts": 9}], ids=str)
def test_a_load_that_fails_is_tried_again_by_the_next_request(fault: dict[str, Any]) -> None:
    async def main() -> None:
        fleet = Fleet()
        await fleet.router.start()
        behaviour = fleet.backends["b"].behaviour
        for name, value in fault.items():
            setattr(behaviour, name, value)
        with pytest.raises(Unavailable, match="cannot be loaded"):
            await fleet.hold("b")
        assert fleet.states() == "Abc"
        behaviour.refuses_to_start, behaviour.failing_starts = False, 0
        await read_all(await fleet.ask("b"))
        await fleet.router.close()

    run_virtual(main())


def test_the_default_that_cannot_start_still_ends_the_command() -> None:
    async def main() -> None:
        fleet = Fleet(refuses_to_start=True)
        with pytest.raises(StartupError):
            await fleet.router.start()
        await fleet.router.close()

    run_virtual(main())


def test_nothing_is_loaded_once_the_server_drains() -> None:
    async def main() -> None:
        fleet = Fleet(start_s=3.0)
        await fleet.router.start()
        await fleet.router.drain(1.0)
        await fleet.hold("b")
        with pytest.raises(Unavailable, match="shutting down"):
            fleet.router.submit([replace(ask(), version="b")])
        assert fleet.backends["b"].starts == 0
        await fleet.router.close()

    run_virtual(main())


def test_closing_ends_a_load_under_way() -> None:
    async def main() -> None:
        fleet = Fleet(start_s=50.0)
        fleet.backends["a"].behaviour.start_s = 0.0
        await fleet.router.start()
        waiting = asyncio.ensure_future(fleet.hold("b"))
        await asyncio.sleep(1)
        await fleet.router.close()
        with pytest.raises((Unavailable, asyncio.CancelledError)):
            await waiting

    run_virtual(main())


def test_auto_means_the_default_and_is_counted() -> None:
    async def main() -> bytes:
        fleet = Fleet()
        await fleet.router.start()
        (choice,) = fleet.router.choose("auto", Demand())
        assert (choice.version.name, choice.reason) == ("a", "default")
        await fleet.router.hold(choice)
        await fleet.router.hold(Choice(choice.version))
        await fleet.router.close()
        return fleet.telemetry.snapshot().render()[0]

    lines = run_virtual(main()).decode().splitlines()
    assert [line.rpartition(" ")[2] for line in lines if "version_choices_total{" in line and 'reason="default"' in line] == ["1.0"]
