"""The child: loads its libraries at once, then what it is told to, then executes plans one after the other and answers.

Run as `python -m service.engine.worker` by the supervisor for torch, and through `onnx_worker` for exported graphs, without torch. It
decides nothing and remembers nothing that the parent could not send again.
Invariant: it beats once a second from its own thread as long as the process lives; a fault is reported and then ends the process with
a code other than 0.
"""

from __future__ import annotations

import contextlib
import gc
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable

from service.engine.loaded import Loader
from service.engine.messages import Beat, CannotStart, Execute, Fault, Hello, Load, Progress, Ready, Result, ToWorker
from service.processes import ChannelClosed, ChildChannel
from service.types.errors import StartupError

BEAT_S = 1.0


class _Pulse:
    """Beats in a thread of its own. `progress` gives a number that grows while the worker gets on."""

    def __init__(self, channel: ChildChannel) -> None:
        self._channel = channel
        self.progress: Callable[[], int] = lambda: 0
        threading.Thread(target=self._beat, name="beat", daemon=True).start()

    def _beat(self) -> None:
        while True:
            try:
                self._channel.send(Beat(self.progress()))
            except ChannelClosed:
                os._exit(0)  # The parent is gone; the step that runs is nobody's.
            time.sleep(BEAT_S)


def main() -> int:
    """Serve one parent with torch until it closes the channel; the exit code."""
    return run(_import_torch)


def run(libraries: Callable[[], Loader]) -> int:
    """Serve one parent until it closes the channel; the exit code. `libraries` imports what loading needs."""
    began_s = time.perf_counter()
    channel = ChildChannel.open(ToWorker)
    pulse = _Pulse(channel)
    try:
        with contextlib.suppress(ChannelClosed):
            return _serve(channel, pulse, libraries, began_s)
    except Exception as fault:  # The one broad except of the worker: whatever it is, the parent is told and a new process takes over.
        traceback.print_exc()
        with contextlib.suppress(ChannelClosed):
            channel.send(Fault(_label(fault)))
        return 1
    return 0


def _import_torch() -> Loader:
    from service.engine.loading import load_backend

    return load_backend


def _serve(channel: ChildChannel, pulse: _Pulse, libraries: Callable[[], Loader], began_s: float) -> int:
    # Collecting garbage while a thousand modules are being created finds nothing and takes a tenth of the time.
    gc.disable()
    load_backend = libraries()
    gc.enable()
    import_s = time.perf_counter() - began_s
    channel.send(Hello(import_s))
    first = channel.receive()
    if not isinstance(first, Load):
        raise ChannelClosed("the first message was not what to load")
    try:
        loaded = load_backend(first.request, import_s, lambda phase, done: channel.send(Progress(phase, done)))
    except StartupError as error:
        channel.send(CannotStart(type(error).__name__, str(error)))
        return 2
    backend = loaded.backend
    pulse.progress = lambda: backend.layers_done
    # What is loaded stays; the collector need not look at it again.
    gc.collect()
    gc.freeze()
    channel.send(Ready(loaded.info, loaded.token_flops, loaded.context_flops))
    backend.rest()
    while True:
        message = channel.receive()
        if not isinstance(message, Execute):
            raise ChannelClosed("only plans may follow")
        channel.send(Result(backend.execute(message.plan)))


def _label(fault: Exception) -> str:
    return {"MemoryError": "oom", "PlanError": "plan"}.get(type(fault).__name__, "error")


if __name__ == "__main__":
    sys.exit(main())
