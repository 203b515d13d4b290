"""`deepseek-serve`: the first seconds. A blank worker is spawned before anything heavy is imported; then settings, then the rest.

It knows only the order of things: `wiring` joins the rooms. Invariants: a wrong flag costs no load and leaves no child; whatever can be
said in one sentence ends with exit code 2 and no traceback.
"""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Coroutine, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from service.cli.report import StartTimes

PROGRAM = "deepseek-serve"


def main() -> int:
    """Run the command; returns its exit code."""
    began_s = time.perf_counter()
    _hear_signals()
    try:
        from service.cli.ending import run_command
    except KeyboardInterrupt:
        return 130
    return run_command(PROGRAM, lambda arguments: _serve(arguments, began_s), sys.argv[1:])


def _hear_signals() -> None:
    """Until the server takes both over, Ctrl-C and SIGTERM end the command, also where its parent left them ignored.

    A shell's background job starts with SIGINT ignored; the kernel keeps SIGTERM from a container's first process that has no handler.
    """
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, lambda number, frame: signal.raise_signal(signal.SIGINT))


def _serve(arguments: Sequence[str], began_s: float) -> int:
    from service.config.flags import wants_text

    if wants_text(arguments):
        from service.config.load import load_settings

        load_settings(arguments)
        return 0
    from service.cli.report import StartTimes

    return _run(_start(arguments, StartTimes(began_s)))


async def _start(arguments: Sequence[str], times: StartTimes) -> int:
    """Spawn, read the settings and hand over. The worker imports its libraries meanwhile, on another core."""
    from service.config.flags import likely_backend
    from service.engine.supervisor import Blank, spawn_worker

    backend = likely_backend(arguments)
    child = await spawn_worker(backend)
    times.mark("spawn")
    try:
        from service.config.load import load_settings

        settings = load_settings(arguments)
        times.mark("parse")
        from service.cli.wiring import serve

        times.mark("import")
        return await serve(settings, Blank(backend, child), times)
    finally:
        child.kill("closed")
        await child.wait_lost()


def _run(program: Coroutine[Any, Any, int]) -> int:
    import asyncio

    import uvloop

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(program)


if __name__ == "__main__":
    sys.exit(main())
