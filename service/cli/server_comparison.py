"""Several running servers under the same load, in alternating rounds: one row with every server's numbers and their ratios to the first.

It does not know what the servers are. Invariants: in a round every server gets the same requests; who comes first moves on from round to
round, so that a drift of the machine falls on all.
"""

from __future__ import annotations

import dataclasses
from argparse import Namespace
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from service.cli.server_load import is_server, measure_server, surroundings
from service.loadgen.compare import MEASURES, compare_rounds, scenario_of, side_of
from service.loadgen.scenario import Ready
from service.types.errors import SettingsError, StartupError


class Contender(NamedTuple):
    """One server: its name in the table, its address, and the model to ask it for (the first that it lists when empty)."""

    name: str
    url: str
    model: str


def names_servers(entries: Sequence[str]) -> bool:
    """Whether --compare was given addresses and not files. Raises SettingsError for a mixture."""
    addresses = ["://" in entry for entry in entries]
    if any(addresses) and not all(addresses):
        raise SettingsError("--compare takes two files of rows or the addresses of running servers, not both.")
    if len(entries) < 2 or (len(entries) > 2 and not all(addresses)):
        raise SettingsError("--compare needs two files of rows, or two or more addresses such as http://127.0.0.1:8000.")
    return all(addresses)


def contenders(entries: Sequence[str], model: str) -> list[Contender]:
    """The servers of `[NAME=]URL[#MODEL]` entries; `model` where an entry names none. Raises SettingsError."""
    found: list[Contender] = []
    for entry in entries:
        name, equals, address = entry.partition("=")
        if not equals or "://" in name:
            name, address = "", entry
        url, _, own = address.partition("#")
        if not is_server(url):
            raise SettingsError(f"--compare {entry[:80]!r} must look like http://127.0.0.1:8000, NAME=URL or URL#MODEL.")
        found.append(Contender(name or urlsplit(url).netloc + (f" {own}" if own else ""), url, own or model))
    names = Counter(one.name for one in found)
    if twice := [name for name, count in names.items() if count > 1]:
        raise SettingsError(f"--compare has {twice[0]!r} twice: give each a name of its own, NAME=URL.")
    return found


async def measure_rounds(given: Namespace, ready: Ready, servers: Sequence[Contender]) -> list[list[dict[str, Any]]]:
    """The row of each server (in the order of `servers`) in each of `--rounds` rounds. Raises StartupError where none is completed."""
    rounds = []
    for number in range(given.rounds):
        rows: dict[str, dict[str, Any]] = {}
        for server in (*servers[number % len(servers) :], *servers[: number % len(servers)]):
            try:
                row = await measure_server(given, ready.of_round(number), server.url, server.model)
            except StartupError as error:
                raise StartupError(str(error).replace("--url", "--compare")) from None  # the flag that names servers here
            if not row["completed"]:
                raise StartupError(f"{server.name} completed no request of round {number + 1}: {row['failures'] or row['errors']}.")
            rows[server.name] = {**row, "label": f"{server.name}, round {number + 1}"}
        rounds.append([rows[server.name] for server in servers])
    return rounds


def comparison_row(given: Namespace, servers: Sequence[Contender], rounds: Sequence[Sequence[dict[str, Any]]]) -> dict[str, Any]:
    """One row of all rounds: spreads of each server, and its ratios to the first server round by round."""
    columns = [list(rows) for rows in zip(*rounds, strict=True)]
    return {
        "kind": "servers",
        **surroundings(given.label),
        "scenario": scenario_of(columns[0][0]),
        "rounds": len(rounds),
        "seed": columns[0][0]["seed"],
        "servers": [_server(server, rows, columns[0]) for server, rows in zip(servers, columns, strict=True)],
    }


def _server(server: Contender, rows: list[dict[str, Any]], first: list[dict[str, Any]]) -> dict[str, Any]:
    errors: Counter[str] = Counter()
    for row in rows:
        errors.update(row["errors"])
    late = [row["sender"]["lateness_ms"]["p99"] for row in rows if row["sender"]["lateness_ms"]]
    entry: dict[str, Any] = {
        "name": server.name,
        "url": server.url,
        "model": rows[0]["model"],
        **{name: sum(row[name] for row in rows) for name in ("requests", "completed", "aborted", "prompt_tokens", "output_tokens")},
        "errors": dict(sorted(errors.items())),
        "token_counts": ", ".join(sorted({row["token_counts"] for row in rows})),
        "sender": {"lateness_p99_ms": max(late, default=None), "cpu_share": max(row["sender"]["cpu_share"] for row in rows)},
        "measures": {name: dataclasses.asdict(side) for name, _ in MEASURES if (side := side_of(rows, name))},
    }
    if rows is not first:
        entry["ratios"] = {one.measure: {**dataclasses.asdict(one.ratio), "verdict": one.verdict} for one in compare_rounds(first, rows)}
    return entry
