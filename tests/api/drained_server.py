"""A server over the fake worker in a process of its own: prints its port, serves until a signal, drains."""

from __future__ import annotations

import sys

from service.api.app import build_app
from service.api.server import bind, run, serve
from service.telemetry import Telemetry
from service.types.settings import HttpSettings
from tests.api.conftest import BYTE_CODEC
from tests.fakes import FakeBackend, FakeBehaviour, FakeManifest, fake_router, fake_spec


async def main() -> None:
    settings = HttpSettings(port=0, drain_s=float(sys.argv[1]), access_log=False)
    router = fake_router(
        FakeBackend(behaviour=FakeBehaviour(step_s=0.01, start_s=0.0)), codec=BYTE_CODEC, manifest=FakeManifest(fake_spec())
    )
    await router.start()
    listener = bind(settings)
    port = listener.getsockname()[1]
    await serve(build_app(router, Telemetry(), settings), listener, lambda: print(port, flush=True))
    await router.close()


if __name__ == "__main__":
    run(main())
