"""The probes' rules on states alone: what counts as a fault, and when traffic may come."""

from __future__ import annotations

import json
from typing import Any

import pytest

from service.api.probes import health, ready
from service.schedulers.router import VersionHealth
from service.types.settings import TierChoice


class Told:
    """Services whose router says what it is told."""

    def __init__(self, states: tuple[str, ...], is_ready: bool, draining: bool = False, tier: TierChoice | None = None) -> None:
        self.states, self.is_ready, self.draining, self.tier = states, is_ready, draining, tier
        self.router = self

    def health(self) -> tuple[VersionHealth, ...]:
        return tuple(VersionHealth(f"v@{index}", state, 0.1, 0) for index, state in enumerate(self.states))

    def ready(self) -> bool:
        return self.is_ready


@pytest.mark.parametrize(
    ("states", "is_ready", "status"),
    [
        (("ready",), True, 200),
        (("ready", "unloaded"), True, 200),
        (("ready", "loading"), True, 200),  # loaded because it was asked for
        (("loading",), False, 503),  # the service itself starts
        (("loading", "loading"), False, 503),
        (("ready", "stalled"), True, 503),
        (("ready", "restarting"), True, 503),
        (("ready", "down"), True, 503),
    ],
)
async def test_health_is_about_faults(states: tuple[str, ...], is_ready: bool, status: int) -> None:
    services: Any = Told(states, is_ready)
    answer = await health(services, services)
    body = json.loads(answer.body)
    assert (answer.status_code, body["status"]) == (status, "ok" if status == 200 else "unhealthy")
    assert [version["state"] for version in body["versions"]] == list(states)


async def test_health_names_the_tier_and_what_it_set() -> None:
    services: Any = Told(("ready",), True, tier=TierChoice("edge", "given", "", "--batch_size 4", ""))
    assert json.loads((await health(services, services)).body)["tier"] == {"name": "edge", "how": "given", "flags": "--batch_size 4"}
    services = Told(("ready",), True)
    assert "tier" not in json.loads((await health(services, services)).body)


@pytest.mark.parametrize(("is_ready", "draining", "status"), [(True, False, 200), (False, False, 503), (True, True, 503)])
async def test_ready_is_about_traffic(is_ready: bool, draining: bool, status: int) -> None:
    services: Any = Told((), is_ready, draining)
    assert (await ready(services, services)).status_code == status
