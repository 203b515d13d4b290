"""A worker for the supervisor's tests that needs no torch: the directory it is told to load names what it does wrong."""

from __future__ import annotations

import os
import sys
import time

from service.engine.messages import Beat, CannotStart, Execute, Fault, Hello, Load, Progress, Ready, Result, ToWorker
from service.processes import ChildChannel
from service.types.kv_layout import KvLayout
from service.types.plan import BackendInfo, SampledToken, StepResult

INFO = BackendInfo(KvLayout(()), (), 4, 64, 256, 331, "float32", "cpu", "cpu")


def load(channel: ChildChannel, kind: str, backend: str) -> None:
    """Up to Ready, or whatever comes in its place."""
    channel.send(Progress("weights", 0.5))
    if kind == "refuses" or (kind == "refuses onnx" and backend == "onnx"):
        channel.send(CannotStart("CapacityError", "It does not fit."))
        time.sleep(3600)
    elif kind == "dies loading":
        os._exit(1)
    elif kind == "never loads":
        time.sleep(3600)
    elif kind == "answers early":
        channel.send(Result(StepResult(1)))
        time.sleep(3600)
    channel.send(Ready(INFO, 1.0, 0.0))


def step(channel: ChildChannel, kind: str, message: Execute) -> None:
    """One plan."""
    if kind == "hangs":
        channel.send(Beat(7))
        time.sleep(3600)
    elif kind == "faults":
        channel.send(Fault("oom"))
        os._exit(1)
    elif kind == "wrong step":
        channel.send(Result(StepResult(message.plan.step + 1)))
    else:
        tokens = tuple(SampledToken(row, start + length) for row, start, length, _ in message.plan.slices)
        channel.send(Result(StepResult(message.plan.step, tokens)))


def main() -> None:
    """Serve one parent."""
    channel = ChildChannel.open(ToWorker)
    channel.send(Hello(0.0))
    first = channel.receive()
    if not isinstance(first, Load):
        sys.exit(1)
    load(channel, first.request.directory, first.request.backend)
    while True:
        step(channel, first.request.directory, channel.receive())


if __name__ == "__main__":
    main()
