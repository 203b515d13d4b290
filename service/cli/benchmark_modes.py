"""What `deepseek-benchmark` can be asked for, and which of its flags each of these obeys.

It measures nothing and looks at no values. Invariant: a flag that was given and that is not obeyed is refused by name, never passed over.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterable, Sequence

from service.cli.far_quality import FAR_FLAGS
from service.cli.server_comparison import names_servers
from service.cli.server_load import SHAPE
from service.types.errors import SettingsError

LOAD, FILES, SERVERS, ROWS, FAR = "a load", "--compare of files", "--compare of servers", "--rows", "--quality far"
# Those that start engines on this machine, as `machine_benchmark` does.
MACHINE = ("--tier", "--quality", "--versions", "--backends")
_KEPT = frozenset({"out", "label"})
_LENGTHS = frozenset({"prompt_tokens", "output_tokens"})
_SENT = frozenset({*SHAPE, "scenario", "rate", "concurrency", "requests", "warmup", "timeout_s", "abort_share", "seed"})
_SERVER = _KEPT | _SENT | {"model", "api_key", "client", "slo_ttft_ms", "slo_tpot_ms", "report"}
# The flags that each obeys, that which asks for it among them.
OBEYED: dict[str, frozenset[str]] = {
    LOAD: _SERVER | {"url"},
    FILES: frozenset({"compare"}),
    SERVERS: _SERVER | {"compare", "rounds"},
    ROWS: frozenset({"rows", "report"}),
    "--tier": _KEPT | _LENGTHS | {"tier", "directory", "threads", "rounds"},
    "--quality": _KEPT | {"quality", "directory", "threads", "text", "text_tokens"},
    FAR: _KEPT | {"quality", "directory", *FAR_FLAGS},
    "--versions": _KEPT | _LENGTHS | {"versions", "threads", "rounds", "text", "text_tokens"},
    "--backends": _KEPT | _LENGTHS | {"backends", "directory", "threads", "rounds", "keep_table"},
}
_ASKING = ("compare", "rows", "tier", "quality", "versions", "backends")


def check_mode(given: Namespace, named: Sequence[str]) -> str:
    """What is asked for, a key of OBEYED. `named` are the flags that were given. Raises SettingsError."""
    asked = [flag for flag in _ASKING if flag in named]
    if len(asked) > 1:
        raise SettingsError(f"--{asked[0]} and --{asked[1]} ask for two things: give only one of them.")
    if asked and not getattr(given, asked[0]):
        raise SettingsError(f"--{asked[0]} says nothing: give it a value, or leave it out.")
    mode = _mode(given, asked)
    for flag in named:
        if flag not in OBEYED[mode]:
            _refuse(flag, mode)
    return mode


def _mode(given: Namespace, asked: Sequence[str]) -> str:
    if not asked:
        return LOAD
    if asked[0] == "compare":
        return SERVERS if names_servers(given.compare) else FILES
    return FAR if given.quality == "far" else f"--{asked[0]}"


def _refuse(flag: str, mode: str) -> None:
    owners = [name for name, flags in OBEYED.items() if flag in flags]
    if FAR in owners and "--quality" in owners:
        owners.remove(FAR)
    belongs = f"belongs to {_listed(owners)}"
    if mode == LOAD:
        raise SettingsError(f"--{flag} {belongs}: give {'it' if len(owners) == 1 else 'one of these'} too.")
    raise SettingsError(f"--{flag} does not go with {mode}: it {belongs}.")


def _listed(names: Iterable[str]) -> str:
    *first, last = names
    return f"{', '.join(first)} and {last}" if first else last
