"""A child process for the tests of `service/processes.py`: it does what each message says, including everything a child should not do."""

from __future__ import annotations

import os
import sys
import time

import msgspec

from service.processes import ChildChannel


class Command(msgspec.Struct, array_like=True):
    """`do` is the name of an action, `size` and `text` its arguments."""

    do: str
    size: int = 0
    text: str = ""


class Reply(msgspec.Struct, array_like=True):
    """The answer of one command."""

    text: str
    size: int = 0


def allocate(channel: ChildChannel, command: Command) -> None:
    try:
        channel.send(Reply("allocated", len(bytearray(command.size))))
    except MemoryError:
        channel.send(Reply("refused"))


def send_many(channel: ChildChannel, command: Command) -> None:
    for index in range(command.size):
        channel.send(Reply("x" * index, index))


def spin(channel: ChildChannel, command: Command) -> None:
    while True:
        time.monotonic()


ACTIONS = {
    "echo": lambda channel, command: channel.send(Reply(command.text, command.size)),
    "many": send_many,
    "exit": lambda channel, command: sys.exit(command.size),
    "spin": spin,
    "hang": lambda channel, command: time.sleep(3600),
    "signal": lambda channel, command: os.kill(os.getpid(), command.size),
    "raw": lambda channel, command: channel._socket.sendall(command.text.encode("latin-1")),
    "allocate": allocate,
}


def main() -> None:
    channel = ChildChannel.open(Command)
    channel.send(Reply("hello", os.getpid()))
    while True:
        command = channel.receive()
        ACTIONS[command.do](channel, command)


if __name__ == "__main__":
    main()
