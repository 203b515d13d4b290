"""A Python child and framed messages to it: spawn, deadline, kill, reap. Engine workers and preparation children alike.

The parent side is asyncio and costs one callback per read, no task per message; the child side is plain blocking calls. A frame is a
four-byte little-endian length and a msgpack body of one message of the union that the receiver was given. It does not know what the
messages mean. Invariants: a frame over the bound or a body that does not decode ends the channel; a child never outlives its parent; a
child that was lost is killed, reaped and reported exactly once.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import msgspec

FRAME_BYTES = 64 << 20
_HEADER, _PR_SET_PDEATHSIG = 4, 1
_REAP_S = 2.0


class FrameTooLarge(ValueError):
    """A message to be sent is over the channel's bound; the channel itself is unharmed."""


class ChannelClosed(Exception):
    """The other side is gone or broke the framing; nothing more can be received or sent."""


class ChildLost(Exception):
    """The child is gone. `reason` is `exit`, `signal_N`, `oom` or what the parent gave when it killed it; it serves as a metric label."""

    def __init__(self, reason: str) -> None:
        super().__init__(f"child lost: {reason}")
        self.reason = reason


@dataclass(frozen=True, slots=True)
class ChildLimits:
    """Bounds the kernel enforces on a child: address space in bytes, CPU time of its whole life in seconds. 0 is no bound."""

    address_bytes: int = 0
    cpu_s: int = 0


def _frame(encoder: msgspec.msgpack.Encoder, message: Any, bound: int) -> bytearray:
    buffer = bytearray(_HEADER)
    encoder.encode_into(message, buffer, _HEADER)
    length = len(buffer) - _HEADER
    if length > bound:
        raise FrameTooLarge(f"a message of {length} bytes is over the bound of {bound}")
    buffer[:_HEADER] = length.to_bytes(_HEADER, "little")
    return buffer


class _FrameReader(asyncio.Protocol):
    """Cuts the byte stream of a child into messages, at most one copy a frame."""

    def __init__(self, child: ChildProcess, messages: Any, bound: int, connection: socket.socket) -> None:
        self._child = child
        self._rest = connection.dup()
        self._decoder: msgspec.msgpack.Decoder[Any] = msgspec.msgpack.Decoder(messages)
        self._bound = bound
        self._pending = bytearray()

    def data_received(self, data: bytes) -> None:
        """Deliver every message that is now complete."""
        pending = self._pending
        pending += data
        at, end = 0, len(pending)
        while end - at >= _HEADER:
            length = int.from_bytes(pending[at : at + _HEADER], "little")
            if length > self._bound:
                self._child.kill("protocol")
                return
            if end - at - _HEADER < length:
                break
            with memoryview(pending)[at + _HEADER : at + _HEADER + length] as body:
                try:
                    message = self._decoder.decode(body)
                except msgspec.MsgspecError:
                    self._child.kill("protocol")
                    return
            at += _HEADER + length
            self._child.deliver(message)
        if at:
            del pending[:at]

    def connection_lost(self, exc: Exception | None) -> None:
        """The child closed its end. When a write found that out first, what the child said last is still to be read."""
        del exc
        with self._rest, contextlib.suppress(OSError):
            while self._child.alive and (data := self._rest.recv(_HEADER << 16)):
                self.data_received(data)
        self._child.hung_up()


class ChildProcess:
    """One child as its parent sees it. All methods are called from the event loop's thread.

    Messages that arrive before `listen` is called are kept and delivered then.
    """

    def __init__(self, process: subprocess.Popen[bytes], bound: int) -> None:
        self._process = process
        self._bound = bound
        self._encoder = msgspec.msgpack.Encoder()
        self._transport: asyncio.Transport | None = None
        self._early: deque[Any] = deque()
        self._on_message: Callable[[Any], None] | None = None
        self._on_lost: Callable[[str], None] | None = None
        self._cause: str | None = None
        self._oom_kills = _oom_kills()
        self._reaper: asyncio.Task[None] | None = None
        self._lost: asyncio.Future[str] = asyncio.get_running_loop().create_future()

    @classmethod
    async def spawn(
        cls,
        module: str,
        messages: Any,
        *,
        limits: ChildLimits | None = None,
        environment: Mapping[str, str] | None = None,
        frame_bytes: int = FRAME_BYTES,
    ) -> ChildProcess:
        """Start `python -m module`, which must call `ChildChannel.open`. `messages` is the type (or union) that the child sends.

        The child is blank: what it is to do comes as messages. Its standard output goes to our standard error; it does not see the
        terminal's Ctrl-C. `environment` adds to ours, which wins.
        """
        process, ours = _start(module, limits or ChildLimits(), environment or {}, frame_bytes)
        child = cls(process, frame_bytes)
        reader = _FrameReader(child, messages, frame_bytes, ours)
        child._transport, _ = await asyncio.get_running_loop().create_unix_connection(lambda: reader, sock=ours)
        return child

    @property
    def pid(self) -> int:
        """The child's process id; stays readable after its end."""
        return self._process.pid

    @property
    def alive(self) -> bool:
        """Whether messages can still be sent."""
        return self._cause is None

    def listen(self, on_message: Callable[[Any], None], on_lost: Callable[[str], None] | None = None) -> None:
        """Deliver messages to `on_message`, and once, after the child was reaped, the reason to `on_lost`."""
        self._on_message, self._on_lost = on_message, on_lost
        while self._early:
            on_message(self._early.popleft())
        if self._lost.done() and on_lost is not None:
            on_lost(self._lost.result())

    def send(self, message: Any) -> None:
        """Queue one message; never blocks. Raises ChildLost, or FrameTooLarge and sends nothing."""
        if self._cause is not None or self._transport is None:
            raise ChildLost(self._cause or "exit")
        self._transport.write(_frame(self._encoder, message, self._bound))

    async def ask(self, message: Any, deadline_s: float) -> Any:
        """Send a message and wait for the next one from the child. Past the deadline the child is killed. Raises ChildLost.

        One question at a time; it replaces any `listen`.
        """
        if self._cause is not None:
            raise ChildLost(await self.wait_lost())
        answer: asyncio.Future[Any] = asyncio.get_running_loop().create_future()

        def take(reply: Any) -> None:
            if not answer.done():
                answer.set_result(reply)

        def lose(reason: str) -> None:
            if not answer.done():
                answer.set_exception(ChildLost(reason))

        self.listen(take, lose)
        self.send(message)
        try:
            async with asyncio.timeout(deadline_s):
                return await answer
        except TimeoutError:
            self.kill("deadline")
            raise ChildLost("deadline") from None
        except asyncio.CancelledError:
            self.kill("cancelled")
            raise

    def kill(self, reason: str) -> None:
        """End the child at once, whatever it is doing; `reason` is what is reported. The reaping goes on in the background."""
        self._lose(reason, at_once=True)

    async def stop(self, grace_s: float = 2.0) -> None:
        """Close the channel, which a sound child takes as its end; terminate and at last kill one that stays. Idempotent."""
        self._lose("stopped", at_once=False, grace_s=grace_s)
        await self.wait_lost()

    async def wait_lost(self) -> str:
        """Wait until the child was reaped; returns the reason."""
        return await asyncio.shield(self._lost)

    def deliver(self, message: Any) -> None:
        """Take one decoded message from the frame reader."""
        (self._on_message or self._early.append)(message)

    def hung_up(self) -> None:
        """The child closed its end of the channel."""
        self._lose("", at_once=False)

    def _lose(self, cause: str, *, at_once: bool, grace_s: float = _REAP_S) -> None:
        if self._cause is not None:
            if at_once and self._process.returncode is None:
                self._process.kill()
            return
        self._cause = cause
        if self._transport is not None:
            self._transport.abort()
        if at_once:
            self._process.kill()
        self._reaper = asyncio.get_running_loop().create_task(self._reap(grace_s))

    async def _reap(self, grace_s: float) -> None:
        ended = asyncio.ensure_future(asyncio.to_thread(self._process.wait))
        for end in (self._process.terminate, self._process.kill):
            done, _ = await asyncio.wait({ended}, timeout=grace_s / 2)
            if done:
                break
            end()
        code = await ended
        reason = self._cause or _exit_reason(code, self._oom_kills)
        self._cause = reason
        self._lost.set_result(reason)
        if self._on_lost is not None:
            self._on_lost(reason)


def _start(
    module: str, limits: ChildLimits, environment: Mapping[str, str], frame_bytes: int
) -> tuple[subprocess.Popen[bytes], socket.socket]:
    """The process and our end of its channel, non-blocking."""
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    flags = ["-P"] + ["-O"] * min(sys.flags.optimize, 1)  # -P: an `http.py` in the current directory is not what the child imports
    channel = f"{theirs.fileno()}:{os.getpid()}:{limits.address_bytes}:{limits.cpu_s}:{frame_bytes}"
    try:
        process = subprocess.Popen(
            [sys.executable, *flags, "-m", module, channel],
            stdin=subprocess.DEVNULL,
            stdout=2,
            pass_fds=(theirs.fileno(),),
            start_new_session=True,
            env={**environment, **os.environ},
        )
    except OSError:
        ours.close()
        raise
    finally:
        theirs.close()
    return process, ours


def _exit_reason(code: int, oom_kills_before: int) -> str:
    if code >= 0:
        return "exit"
    if -code == signal.SIGKILL and _oom_kills() > oom_kills_before:
        return "oom"
    return f"signal_{-code}"


def _oom_kills() -> int:
    """Processes that the kernel has killed for memory since boot; 0 where it does not say."""
    with contextlib.suppress(OSError, ValueError), open("/proc/vmstat", encoding="ascii") as file:
        for line in file:
            if line.startswith("oom_kill "):
                return int(line.split()[1])
    return 0


class ChildChannel:
    """The child's end. `receive` is for one thread; `send` may be called from several."""

    def __init__(self, connection: socket.socket, messages: Any, bound: int = FRAME_BYTES) -> None:
        self._socket = connection
        self._bound = bound
        self._decoder: msgspec.msgpack.Decoder[Any] = msgspec.msgpack.Decoder(messages)
        self._encoder = msgspec.msgpack.Encoder()
        self._sending = threading.Lock()

    @classmethod
    def open(cls, messages: Any) -> ChildChannel:
        """Take over the channel named on the command line, with its limits. `messages` is the type (or union) that the parent sends."""
        descriptor, parent, address_bytes, cpu_s, bound = (int(part) for part in sys.argv[1].split(":"))
        _die_with(parent)
        for kind, most in ((resource.RLIMIT_AS, address_bytes), (resource.RLIMIT_CPU, cpu_s)):
            if most:
                resource.setrlimit(kind, (most, most))
        return cls(socket.socket(fileno=descriptor), messages, bound)

    def receive(self) -> Any:
        """Wait for the next message. Raises ChannelClosed when the parent is gone or the frame is not one of the agreed messages."""
        length = int.from_bytes(self._read(_HEADER), "little")
        if length > self._bound:
            raise ChannelClosed(f"a frame of {length} bytes is over the bound of {self._bound}")
        try:
            return self._decoder.decode(self._read(length))
        except msgspec.MsgspecError as error:
            raise ChannelClosed(f"not one of the agreed messages: {error}") from error

    def send(self, message: Any) -> None:
        """Send one message, blocking while the parent does not read. Raises ChannelClosed, or FrameTooLarge and sends nothing."""
        frame = _frame(self._encoder, message, self._bound)
        with self._sending:
            try:
                self._socket.sendall(frame)
            except OSError as error:
                raise ChannelClosed(str(error)) from error

    def _read(self, length: int) -> bytearray:
        buffer = bytearray(length)
        view, at = memoryview(buffer), 0
        while at < length:
            try:
                count = self._socket.recv_into(view[at:])
            except OSError as error:
                raise ChannelClosed(str(error)) from error
            if count == 0:
                raise ChannelClosed("the parent is gone")
            at += count
        return buffer


def _die_with(parent: int) -> None:
    """Have the kernel end this process when the parent's spawning thread ends; elsewhere the closed channel does it at the next call."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            sys.exit(1)
