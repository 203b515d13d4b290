"""Servers side by side: what the flag means, what a row says, and two real servers of ours under one load."""

from __future__ import annotations

import json
import socket
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from service.cli import server_comparison
from service.cli.benchmark_tables import print_servers
from service.cli.server_comparison import Contender, comparison_row, contenders, measure_rounds, names_servers
from service.loadgen.arrivals import Load
from service.loadgen.prompts import PromptPlan
from service.loadgen.scenario import Levels, Ready, Scenario
from service.types.errors import SettingsError, StartupError
from tests.cli.conftest import Command, Start

BENCHMARK = "service.cli.benchmark"
A, B = Contender("a", "http://a:1", "m"), Contender("b", "http://b:1", "m")


def made(url: str, seed: int, speed: float, completed: int = 4) -> dict[str, Any]:
    late = {"p50": 0.1, "p90": 0.1, "p99": 0.2, "mean": 0.1, "max": 0.2}
    return {
        **{"kind": "benchmark", "scenario": "", "endpoint": "completions", "rate": None, "concurrency": 2, "seed": seed, "url": url},
        **{"asked": {"prompt_tokens": 8, "output_tokens": 4}, "model": "m", "token_counts": "usage", "failures": {}, "errors": {}},
        **{"requests": 4, "completed": completed, "aborted": 0, "prompt_tokens": 32, "output_tokens": 16},
        **{"output_tokens_per_s": speed, "ttft_ms": {"p50": 1000 / speed, "p99": 2000 / speed}, "tpot_ms": None},
        "sender": {"lateness_ms": late, "cpu_share": 0.1},
    }


def ready(seed: int = 5) -> Ready:
    load = Load(4, concurrency=2, seed=seed)
    return Ready(Scenario("", "", load, [PromptPlan()], Levels()), load, [])


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[str, str, int]]]:
    """Servers that are measured by a table: b is twice as fast as a. Gives what was asked."""
    calls: list[tuple[str, str, int]] = []

    async def measured(given: Namespace, plan: Ready, url: str, model: str) -> dict[str, Any]:
        calls.append((url, model, plan.load.seed))
        return made(url, plan.load.seed, (20.0 if "b" in url else 10.0) + len(calls) / 100)

    monkeypatch.setattr(server_comparison, "measure_server", measured)
    yield calls


def test_files_and_servers_are_told_apart() -> None:
    assert names_servers(["http://a", "x=https://b"]) and names_servers(["http://a", "http://b", "http://c"])
    assert not names_servers(["before.jsonl", "after.jsonl"])
    for entries, words in ((["before.jsonl", "http://a"], "not both"), (["http://a"], "two or more"), (["a", "b", "c"], "two files")):
        with pytest.raises(SettingsError, match=words):
            names_servers(entries)


def test_an_entry_has_a_name_and_a_model() -> None:
    entries = ["http://h:1", "ours=http://h:1/v1#v2.3", "http://h:1#v4.8", "http://h:1/a=b"]
    found = contenders(entries[:3], "given")
    assert found[0] == ("h:1", "http://h:1", "given")
    assert found[1] == ("ours", "http://h:1/v1", "v2.3")
    assert found[2] == ("h:1 v4.8", "http://h:1", "v4.8")
    assert contenders(entries[3:], "") == [("h:1", "http://h:1/a=b", "")]


@pytest.mark.parametrize(
    ("entries", "words"),
    [
        (["http://h:1", "http://h:1"], "'h:1' twice"),
        (["a=http://h:1", "a=http://h:2"], "'a' twice"),
        (["http://user@h:1", "http://h:2"], "must look like"),
        (["ftp://h:1", "http://h:2"], "must look like"),
    ],
)
def test_entries_that_cannot_be_told_apart_or_reached_are_refused(entries: list[str], words: str) -> None:
    with pytest.raises(SettingsError, match=words):
        contenders(entries, "")


async def test_rounds_alternate_and_ask_all_for_the_same(asked: list[tuple[str, str, int]]) -> None:
    rounds = await measure_rounds(Namespace(rounds=3), ready(), [A, B])
    assert asked == [(url, "m", seed) for seed, urls in ((5, "ab"), (6, "ba"), (7, "ab")) for url in (f"http://{name}:1" for name in urls)]
    assert [[row["url"] for row in rows] for rows in rounds] == [["http://a:1", "http://b:1"]] * 3
    assert rounds[1][0]["label"] == "a, round 2"


async def test_the_row_has_spreads_and_ratios_to_the_first(asked: list[tuple[str, str, int]], capsys: pytest.CaptureFixture[str]) -> None:
    rounds = await measure_rounds(Namespace(rounds=3), ready(), [A, B])
    row = comparison_row(Namespace(label="words"), [A, B], rounds)
    first, second = row["servers"]
    assert (row["kind"], row["label"], row["rounds"], row["seed"]) == ("servers", "words", 3, 5)
    assert "ratios" not in first and first["completed"] == 12 and first["output_tokens"] == 48
    assert first["measures"]["output_tokens_per_s"] == {"median": 10.04, "least": 10.01, "most": 10.05, "rows": 3}
    assert second["ratios"]["output_tokens_per_s"]["median"] == pytest.approx(2.0, abs=0.01)
    assert second["ratios"]["output_tokens_per_s"]["verdict"] == second["ratios"]["ttft_ms.p50"]["verdict"] == "better"
    assert "tpot_ms.p50" not in first["measures"] and first["sender"]["lateness_p99_ms"] == 0.2
    print_servers(row)
    said = capsys.readouterr().out
    assert "ratios to a" in said and "better" in said and "different numbers" not in said
    second["output_tokens"] += 1
    print_servers(row)
    assert "different numbers of tokens" in capsys.readouterr().out


async def test_a_server_that_does_not_answer_is_a_matter_of_the_flag_that_names_it() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    given = Namespace(rounds=1, client="raw", api_key="", label="")
    with pytest.raises(StartupError, match=rf"no server answers at {url} .*: start it or correct --compare\.$"):
        await measure_rounds(given, ready(), [Contender("a", url, ""), B])


async def test_a_server_that_completes_nothing_ends_it(monkeypatch: pytest.MonkeyPatch) -> None:
    async def nothing(given: Namespace, plan: Ready, url: str, model: str) -> dict[str, Any]:
        return {**made(url, 0, 1.0, completed=0), "failures": {"connect": "refused"}}

    monkeypatch.setattr(server_comparison, "measure_server", nothing)
    with pytest.raises(StartupError, match=r"a completed no request of round 1: .*refused"):
        await measure_rounds(Namespace(rounds=2), ready(), [A, B])


@pytest.fixture(scope="module")
def second(tiny: Path) -> Iterator[str]:
    """Another server of the tiny model, one sequence at a time."""
    command = Command("service.cli.serve", ["--model", f"narrow={tiny}", "--port", "0", "--batch_size", "1"], {})
    try:
        yield command.read_until("serving narrow on ")
    finally:
        command.process.kill()
        command.process.communicate()


def test_two_real_servers(served: tuple[str, Command], second: str, start: Start, tmp_path: Path) -> None:
    out, page = tmp_path / "rows.jsonl", tmp_path / "page.html"
    shape = ["--requests", "6", "--concurrency", "3", "--warmup", "2", "--prompt_tokens", "8", "--output_tokens", "6", "--ignore_eos"]
    flags = ["--rounds", "2", "--out", str(out), "--report", str(page), *shape]
    code, said, error = start(BENCHMARK, "--compare", f"wide={served[0]}#tiny", f"narrow={second}", *flags).end()
    assert code == 0, error
    row = json.loads(said.splitlines()[-1])
    assert json.loads(out.read_text()) == row
    wide, narrow = row["servers"]
    assert (wide["model"], narrow["model"], wide["completed"], narrow["completed"]) == ("tiny", "narrow", 12, 12)
    assert wide["output_tokens"] == narrow["output_tokens"] == 72 and wide["prompt_tokens"] == narrow["prompt_tokens"] > 0
    assert narrow["ratios"]["output_tokens_per_s"]["rows"] == 2 and narrow["ratios"]["ttft_ms.p50"]["median"] > 0
    assert {ratio["verdict"] for ratio in narrow["ratios"].values()} == {"too few rounds"}
    assert "ratio (smallest to largest)" in said and page.read_text().count("<h2>") == 4
