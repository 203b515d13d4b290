"""Real children over real sockets: framing, bounds, deadlines, death in every way, and that nothing is left behind."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from service.processes import ChildLimits, ChildLost, ChildProcess, FrameTooLarge
from tests.scripted_child import Command, Reply

MODULE = "tests.scripted_child"


async def spawn(**options) -> ChildProcess:
    child = await ChildProcess.spawn(MODULE, Reply, **options)
    greeting: asyncio.Future = asyncio.get_running_loop().create_future()
    child.listen(greeting.set_result)
    assert (await greeting) == Reply("hello", child.pid)
    return child


def gone(pid: int) -> bool:
    """True when no such process is left, not even as a zombie."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


async def test_messages_go_both_ways_and_the_child_is_reaped() -> None:
    child = await spawn()
    assert await child.ask(Command("echo", 7, "grüße"), 30) == Reply("grüße", 7)
    await child.stop()
    assert await child.wait_lost() == "stopped"
    assert gone(child.pid)
    await child.stop()


async def test_many_messages_of_all_sizes_keep_their_order() -> None:
    child = await spawn()
    seen: list[Reply] = []
    done = asyncio.Event()

    def take(reply: Reply) -> None:
        seen.append(reply)
        if len(seen) == 2000:
            done.set()

    child.listen(take)
    child.send(Command("many", 2000))
    await asyncio.wait_for(done.wait(), 60)
    assert [(reply.size, len(reply.text)) for reply in seen] == [(index, index) for index in range(2000)]
    await child.stop()


async def test_a_frame_larger_than_the_socket_buffer_arrives_whole() -> None:
    child = await spawn()
    text = "abc" * 1_000_000
    reply = await child.ask(Command("echo", 0, text), 60)
    assert reply.text == text
    await child.stop()


async def test_messages_before_listen_are_kept() -> None:
    child = await ChildProcess.spawn(MODULE, Reply)
    child.send(Command("echo", 1, "one"))
    child.send(Command("exit", 0))
    assert await child.wait_lost() == "exit"
    seen: list[str] = []
    reasons: list[str] = []
    child.listen(lambda reply: seen.append(reply.text), reasons.append)
    assert seen == ["hello", "one"]
    assert reasons == ["exit"]


async def test_last_words_are_heard_when_a_write_finds_the_child_gone() -> None:
    child = await spawn()
    words: list[str] = []
    child.listen(lambda reply: words.append(reply.text))
    child.send(Command("echo", 0, "farewell"))
    child.send(Command("exit", 3))
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # noqa: ASYNC222 - nothing may be read meanwhile
    child.send(Command("echo", 0, "too late"))
    assert await asyncio.wait_for(child.wait_lost(), 30) == "exit"
    assert words == ["farewell"]


async def test_too_large_a_message_is_refused_before_anything_is_sent() -> None:
    child = await spawn(frame_bytes=1000)
    with pytest.raises(FrameTooLarge):
        child.send(Command("echo", 0, "x" * 1001))
    assert (await child.ask(Command("echo", 3), 30)).size == 3
    await child.stop()


@pytest.mark.parametrize(
    "raw",
    [
        b"\xff\xff\xff\xff",  # a length over the bound
        b"\x03\x00\x00\x00\xc1\xc1\xc1",  # not msgpack
        b"\x01\x00\x00\x00\x05",  # msgpack, but no Reply
        b"\x01\x00\x00\x00\xc0",  # nil
    ],
)
async def test_a_child_that_breaks_the_protocol_is_killed(raw: bytes) -> None:
    child = await spawn()
    child.send(Command("raw", 0, raw.decode("latin-1")))
    assert await asyncio.wait_for(child.wait_lost(), 30) == "protocol"
    assert gone(child.pid)


@pytest.mark.parametrize(
    ("command", "reason"),
    [
        (Command("exit", 0), "exit"),
        (Command("exit", 3), "exit"),
        (Command("signal", signal.SIGSEGV), f"signal_{int(signal.SIGSEGV)}"),
        (Command("signal", signal.SIGKILL), "signal_9"),
    ],
)
async def test_every_death_has_its_reason_once(command: Command, reason: str) -> None:
    child = await spawn()
    reasons: list[str] = []
    child.listen(lambda _: None, reasons.append)
    child.send(command)
    assert await asyncio.wait_for(child.wait_lost(), 30) == reason
    await asyncio.sleep(0)
    assert reasons == [reason]
    with pytest.raises(ChildLost, match=reason):
        child.send(Command("echo"))
    with pytest.raises(ChildLost, match=reason):
        await child.ask(Command("echo"), 30)


@pytest.mark.parametrize("how", ["spin", "hang"])
async def test_a_deadline_kills(how: str) -> None:
    child = await spawn()
    with pytest.raises(ChildLost) as lost:
        await child.ask(Command(how), 0.05)
    assert lost.value.reason == "deadline"
    assert await child.wait_lost() == "deadline"
    assert gone(child.pid)


async def test_a_stopped_child_can_be_killed() -> None:
    child = await spawn()
    os.kill(child.pid, signal.SIGSTOP)
    child.kill("stalled")
    assert await asyncio.wait_for(child.wait_lost(), 30) == "stalled"
    assert gone(child.pid)


async def test_a_busy_child_is_terminated_after_its_grace() -> None:
    child = await spawn()
    child.send(Command("spin"))
    await child.stop(grace_s=0.1)
    assert gone(child.pid)


async def test_a_cancelled_question_kills() -> None:
    child = await spawn()
    question = asyncio.ensure_future(child.ask(Command("hang"), 3600))
    await asyncio.sleep(0)
    question.cancel()
    with pytest.raises(asyncio.CancelledError):
        await question
    assert await child.wait_lost() == "cancelled"


async def test_limits_are_the_kernels() -> None:
    child = await spawn(limits=ChildLimits(address_bytes=256 << 20, cpu_s=1))
    assert (await child.ask(Command("allocate", 16 << 20), 30)).text == "allocated"
    assert (await child.ask(Command("allocate", 512 << 20), 30)).text == "refused"
    child.send(Command("spin"))
    assert await asyncio.wait_for(child.wait_lost(), 60) in {f"signal_{int(signal.SIGXCPU)}", "signal_9"}


def test_a_child_dies_with_its_parent() -> None:
    program = textwrap.dedent(
        """
        import asyncio, os, signal
        from service.processes import ChildProcess
        from tests.scripted_child import Command, Reply

        async def main():
            child = await ChildProcess.spawn("tests.scripted_child", Reply)
            assert (await child.ask(Command("echo"), 30)).text == "hello"
            child.send(Command("spin"))
            print(child.pid, flush=True)
            os.kill(os.getpid(), signal.SIGKILL)

        asyncio.run(main())
        """
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    pid = int(done.stdout)
    if sys.platform == "linux":
        descriptor = None if gone(pid) else os.pidfd_open(pid)
        if descriptor is not None:
            import select

            assert select.select([descriptor], [], [], 30)[0], "the child outlived its parent"
            os.close(descriptor)


def environment_of(pid: int) -> list[bytes]:
    return Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")


async def test_the_environment_adds() -> None:
    child = await spawn(environment={"PYTHONHASHSEED": "1"})
    variables = environment_of(child.pid)
    assert b"PYTHONHASHSEED=1" in variables
    assert f"PATH={os.environ['PATH']}".encode() in variables
    await child.stop()


async def test_a_child_does_not_import_from_the_current_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "msgspec.py").write_text("raise SystemExit('a stranger was imported')")
    monkeypatch.chdir(tmp_path)
    child = await spawn()
    assert await child.ask(Command("echo", 1, "hello"), 30) == Reply("hello", 1)
    await child.stop()
