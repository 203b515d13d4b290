"""How a command ends: a StartupError is one sentence on stderr and exit code 2, Ctrl-C is 130; never a traceback for either. And how it
says there what its user should know while it goes on.

It does not know the commands. Invariant: anything else is a fault of ours and keeps its traceback.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence

from service.types.errors import StartupError

WRONG_USE, INTERRUPTED = 2, 130


def warn(program: str, sentence: str) -> None:
    """One line on stderr."""
    print(f"{program}: {sentence}", file=sys.stderr, flush=True)


def run_command(program: str, command: Callable[[Sequence[str]], int], arguments: Sequence[str]) -> int:
    """Run `command` with its arguments and return the exit code."""
    try:
        return command(arguments)
    except StartupError as error:
        print(f"{program}: {error}", file=sys.stderr)
        return WRONG_USE
    except KeyboardInterrupt:
        print(f"{program}: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
