"""The supervisor against real processes: scripted workers for every fault, real workers for what must be true end to end."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys

import pytest

from service.engine import supervisor
from service.engine.messages import ToSupervisor
from service.engine.supervisor import WorkerBackend
from service.processes import ChildProcess
from service.types.errors import CapacityError, CheckpointError
from service.types.plan import BatchPlan, BlockAppend, LoadRequest, OpenSequence, Slice, WorkerLost
from service.types.request import Sampling, Stop
from service.types.settings import EngineSettings

GREEDY = Sampling(temperature=0)
DRAWN = Sampling(temperature=1.0, seed=5, top_p=0.9)
PROMPT = tuple(range(3, 43))


async def scripted(kind: str, **settings) -> WorkerBackend:
    child = await ChildProcess.spawn("tests.engine.scripted_worker", ToSupervisor)
    return WorkerBackend(LoadRequest(kind), EngineSettings(**settings), child=child)


def gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


async def until(condition) -> None:
    """Let the loop run until the condition holds: it depends on another process, so there is no event to wait for."""
    while not condition():  # noqa: ASYNC110
        await asyncio.sleep(0)


def plan(step: int, start: int = 0, length: int = 1, row: int = 0, **changes) -> BatchPlan:
    return BatchPlan(step, (Slice(row, start, length, 1),), **changes)


async def test_steps_complete_in_order_and_two_may_be_outstanding() -> None:
    heard: list[tuple[str, float]] = []
    child = await ChildProcess.spawn("tests.engine.scripted_worker", ToSupervisor)
    backend = WorkerBackend(LoadRequest("works"), EngineSettings(), child=child, on_progress=lambda *what: heard.append(what))
    assert backend.health().state == "down"
    info = await backend.start()
    assert (info.pid, info.tier, backend.health().state, backend.health().restarts) == (child.pid, "cpu", "ready", 0)
    assert heard == [("weights", 0.5)]
    first, second = backend.execute(plan(1)), backend.execute(plan(2, 1))
    with pytest.raises(RuntimeError):
        backend.execute(plan(3, 2))
    assert (await second).tokens[0].token == 2
    assert first.done()
    await backend.close()
    assert gone(child.pid)
    with pytest.raises(WorkerLost):
        await backend.execute(plan(3))
    await backend.close()


async def test_a_start_after_a_close_is_no_restart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor, "spawn_worker", lambda _: ChildProcess.spawn("tests.engine.scripted_worker", ToSupervisor))
    backend = WorkerBackend(LoadRequest("works"), EngineSettings())
    for _ in range(2):
        await backend.start()
        assert backend.health().restarts == 0
        await backend.start()
        assert backend.health().restarts == 1
        await backend.close()


async def test_an_explicit_tier_is_reported() -> None:
    backend = await scripted("works", tier="edge")
    assert (await backend.start()).tier == "edge"
    await backend.close()


@pytest.mark.parametrize(
    ("kind", "reason"),
    [("dies loading", "exit"), ("answers early", "protocol")],
)
async def test_a_worker_lost_while_loading(kind, reason) -> None:
    backend = await scripted(kind)
    with pytest.raises(WorkerLost) as lost:
        await backend.start()
    assert lost.value.reason == reason
    assert backend.health().state == "down"
    await backend.close()


async def test_a_load_that_takes_too_long_is_not_tried_again_and_the_flag_is_named() -> None:
    backend = await scripted("never loads", load_deadline_s=0.3)
    with pytest.raises(CapacityError, match=r"did not load within --load_deadline_s 0\.3: set more seconds"):
        await backend.start()
    assert backend.health().state == "down"
    await backend.close()


async def test_what_can_never_start_is_a_startup_error() -> None:
    backend = await scripted("refuses")
    with pytest.raises(CapacityError, match="It does not fit"):
        await backend.start()
    assert backend.health().state == "down"
    await backend.close()


@pytest.mark.parametrize(
    ("kind", "settings", "reason"),
    [
        ("hangs", {"step_deadline_s": 0.3, "heartbeat_s": 0.1}, "step_deadline"),
        ("faults", {}, "oom"),
        ("wrong step", {}, "protocol"),
    ],
)
async def test_every_outstanding_step_is_lost_with_the_reason(kind, settings, reason) -> None:
    backend = await scripted(kind, **settings)
    pid = (await backend.start()).pid
    futures = [backend.execute(plan(1)), backend.execute(plan(2, 1))]
    for future in futures:
        with pytest.raises(WorkerLost) as lost:
            await asyncio.wait_for(future, 60)
        assert lost.value.reason == reason
    assert gone(pid)
    assert backend.health().state == "down"
    with pytest.raises(WorkerLost, match=reason):
        await backend.execute(plan(3))
    await backend.close()


async def test_a_stopped_worker_is_stalled_and_then_killed() -> None:
    backend = await scripted("works", heartbeat_s=0.2, step_deadline_s=1.5)
    pid = (await backend.start()).pid
    os.kill(pid, signal.SIGSTOP)
    future = backend.execute(plan(1))
    async with asyncio.timeout(60):
        await until(lambda: backend.health().state == "stalled")
        assert not future.done()
        with pytest.raises(WorkerLost) as lost:
            await future
    assert lost.value.reason == "step_deadline"
    assert gone(pid)
    await backend.close()


async def test_an_idle_worker_that_falls_silent_is_killed() -> None:
    backend = await scripted("works", heartbeat_s=0.1, step_deadline_s=0.3)
    pid = (await backend.start()).pid
    os.kill(pid, signal.SIGSTOP)
    async with asyncio.timeout(60):
        await until(lambda: backend.health().state == "down")
    with pytest.raises(WorkerLost, match="silent"):
        await backend.execute(plan(1))
    assert gone(pid)
    await backend.close()


async def test_closing_fails_what_is_outstanding() -> None:
    backend = await scripted("hangs")
    await backend.start()
    future = backend.execute(plan(1))
    await backend.close()
    with pytest.raises(WorkerLost, match="closed"):
        await future


async def test_closing_while_loading_ends_the_start() -> None:
    backend = await scripted("never loads")
    starting = asyncio.ensure_future(backend.start())
    await until(lambda: backend.health().state == "loading")
    await backend.close()
    with pytest.raises(WorkerLost, match="closed"):
        await asyncio.wait_for(starting, 60)


async def test_a_cancelled_start_leaves_nothing_behind() -> None:
    child = await ChildProcess.spawn("tests.engine.scripted_worker", ToSupervisor)
    backend = WorkerBackend(LoadRequest("never loads"), EngineSettings(), child=child)
    starting = asyncio.ensure_future(backend.start())
    await until(lambda: backend.health().state == "loading")
    starting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await starting
    assert gone(child.pid)
    await backend.close()


@pytest.mark.parametrize(("chosen", "serves"), [("auto", True), ("onnx", False)])
async def test_only_what_was_chosen_automatically_falls_back_to_torch(monkeypatch: pytest.MonkeyPatch, capsys, chosen, serves) -> None:
    asked = []

    def spawn(backend: str):
        asked.append(backend)
        return ChildProcess.spawn("tests.engine.scripted_worker", ToSupervisor)

    monkeypatch.setattr(supervisor, "spawn_worker", spawn)
    backend = WorkerBackend(LoadRequest("refuses onnx", backend="onnx"), EngineSettings(backend=chosen))
    if serves:
        await backend.start()
        assert asked == ["onnx", "torch"] and backend.health().restarts == 0
        assert "torch serves instead of a graph: It does not fit." in capsys.readouterr().err
        await backend.start()
        assert asked[2:] == ["torch"]
    else:
        with pytest.raises(CapacityError):
            await backend.start()
        assert asked == ["onnx"]
    await backend.close()


async def test_what_a_spare_worker_says_while_it_waits_is_not_kept(monkeypatch) -> None:
    async def spawn(backend: str) -> ChildProcess:
        return await ChildProcess.spawn("tests.engine.scripted_worker", ToSupervisor)

    monkeypatch.setattr(supervisor, "spawn_worker", spawn)
    heard, deliver = [], ChildProcess.deliver

    def count(child: ChildProcess, message) -> None:
        heard.append(child)
        deliver(child, message)

    monkeypatch.setattr(ChildProcess, "deliver", count)
    backend = await scripted("good", spare_worker=True)
    await backend.start()
    spare = backend._blank
    await until(lambda: spare in heard)
    assert not spare._early  # it beats every second for as long as it is not needed
    await backend.close()
    assert gone(spare.pid)


async def test_a_model_that_is_not_there(tmp_path) -> None:
    backend = WorkerBackend(LoadRequest(str(tmp_path / "nothing")), EngineSettings())
    with pytest.raises(CheckpointError):
        await backend.start()
    await backend.close()


async def test_a_killed_worker_is_replaced_and_the_continuation_is_the_same(full_model, full_dense) -> None:
    backend = WorkerBackend(LoadRequest(str(full_model), max_rows=4, threads=1), EngineSettings(spare_worker=True))
    info = await backend.start()

    def opening(known, sampling, row):
        sequence = OpenSequence(row, tuple(known), len(PROMPT), sampling, Stop(max_tokens=64))
        return {"open": (sequence,), "append": (BlockAppend(row, 0, 0, (row + 1, row + 5)),)}

    async def run(known, sampling, count, step, row=0):
        """Generate with one step always sent ahead."""
        futures = [backend.execute(plan(step, 0, len(known), row, **opening(known, sampling, row)))]
        tokens = []
        for at in range(1, count + 1):
            if at < count:
                futures.append(backend.execute(plan(step + at, len(known) + at - 1, 1, row)))
            tokens.append((await futures.pop(0)).tokens[0].token)
        return tokens

    greedy = await run(PROMPT, GREEDY, 8, 1)
    assert greedy == full_dense.greedy(PROMPT, 8)
    drawn = await run(PROMPT, DRAWN, 10, 100, row=1)
    # The worker dies while a step is under way.
    future = backend.execute(plan(200, len(PROMPT) + 10 - 1, 1, 1))
    os.kill(info.pid, signal.SIGKILL)
    with pytest.raises(WorkerLost, match="signal_9"):
        while True:
            await future
            future = backend.execute(plan(201, len(PROMPT) + 10 - 1, 1, 1))
    again = await backend.start()
    assert again.pid != info.pid
    assert gone(info.pid)
    assert backend.health().restarts == 1
    assert await run(PROMPT + tuple(drawn[:4]), DRAWN, 6, 300) == drawn[4:]
    # A plan that contradicts the tables ends the worker too, with a reason of its own.
    with pytest.raises(WorkerLost, match="plan"):
        await backend.execute(plan(400, 7, 1, 3))
    await backend.close()


async def test_the_printed_budget_is_what_the_worker_uses(full_model) -> None:
    request = LoadRequest(str(full_model), max_rows=4, kv_bytes=800 << 20, threads=1)
    backend = WorkerBackend(request, EngineSettings())
    info = await backend.start()
    total = sum(size for _, size in info.memory_bytes)
    kv = dict(info.memory_bytes)["kv:full"]
    assert total > 1 << 30
    assert (799 << 20) < kv <= 800 << 20
    async with asyncio.timeout(120):
        await until(lambda: resident_bytes(info.pid) > 0.95 * total)
    assert resident_bytes(info.pid) < 1.05 * total
    await backend.close()


def resident_bytes(pid: int) -> int:
    with open(f"/proc/{pid}/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_the_parents_side_does_not_load_torch() -> None:
    program = "import sys, service.engine.supervisor; print(sorted({'torch', 'numpy', 'triton'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "[]"
