"""`deepseek-benchmark` as a process against a null server: the table, the last line, the file, and its failures."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from service.cli import benchmark
from tests.cli.conftest import Command, Start
from tests.house.source import ROOT

BENCHMARK = "service.cli.benchmark"


@pytest.fixture(scope="module")
def null_url() -> Iterator[str]:
    server = subprocess.Popen(
        [sys.executable, str(ROOT / "loadtests" / "null_server.py"), "--port", "0", "--tokens", "5"], stdout=subprocess.PIPE, text=True
    )
    assert server.stdout is not None
    yield "http://127.0.0.1:" + server.stdout.readline().removeprefix("ready on ").strip()
    server.kill()
    server.communicate()


def row_of(command: Command) -> dict[str, object]:
    code, out, error = command.end()
    assert code == 0, error
    return json.loads(out.splitlines()[-1])  # type: ignore[no-any-return]


@pytest.mark.parametrize("client", ["raw", "httpx"])
def test_closed_loop(null_url: str, start: Start, tmp_path: Path, client: str) -> None:
    out = tmp_path / "rows.jsonl"
    command = start(
        BENCHMARK, "--url", null_url, "--requests", "30", "--concurrency", "4", "--client", client, "--out", str(out), "--label", "x"
    )
    row = row_of(command)
    assert (row["mode"], row["concurrency"], row["rate"], row["completed"], row["errors"]) == ("closed", 4, None, 30, {})
    assert (row["model"], row["output_tokens"], row["token_counts"], row["client"]) == ("null", 150, "usage", client)
    assert json.loads(out.read_text()) == row


def test_open_loop_with_goodput_and_a_table(null_url: str, start: Start) -> None:
    command = start(BENCHMARK, "--url", null_url, "--requests", "40", "--rate", "400", "--slo-ttft-ms", "60000", "--slo_tpot_ms", "60000")
    code, out, error = command.end()
    row = json.loads(out.splitlines()[-1])
    assert code == 0, error
    assert (row["mode"], row["rate"], row["goodput_share"], row["completed"]) == ("open", 400.0, 1.0, 40)
    assert row["sender"]["lateness_ms"]["p50"] >= 0 and row["sender"]["cpu_share"] > 0
    for words in ("time to first token", "time per output token", "between tokens", "p99", "goodput", "of a core"):
        assert words in out


def test_rows_are_appended(null_url: str, start: Start, tmp_path: Path) -> None:
    out = tmp_path / "rows.jsonl"
    for seed in ("1", "2"):
        row_of(start(BENCHMARK, "--url", null_url, "--requests", "2", "--seed", seed, "--out", str(out)))
    assert [json.loads(line)["seed"] for line in out.read_text().splitlines()] == [1, 2]


CHAT = str(ROOT / "loadtests" / "scenarios" / "chat.toml")


def test_a_scenario_with_flags_before_it(null_url: str, start: Start, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    flags = ["--requests", "12", "--concurrency", "4", "--slo-ttft-ms", "60000", "--report", str(page)]
    row = row_of(start(BENCHMARK, "--url", null_url, "--scenario", CHAT, *flags))
    assert (row["scenario"], row["changes"], row["mode"]) == ("chat", {"requests": 12, "concurrency": 4}, "closed")
    assert row["slo"] == {"ttft_ms": 60000.0, "tpot_ms": 200}
    assert row["completed"] + row["aborted"] == 12 and row["errors"] == {}  # type: ignore[operator]
    assert page.read_text().count("<svg") == 2


def test_rows_are_compared_and_reported(null_url: str, start: Start, tmp_path: Path) -> None:
    files = [tmp_path / "before.jsonl", tmp_path / "after.jsonl"]
    for file in files:
        row_of(start(BENCHMARK, "--url", null_url, "--requests", "4", "--out", str(file)))
    code, out, error = start(BENCHMARK, "--compare", *map(str, files)).end()
    found = json.loads(out.splitlines()[-1])
    assert code == 0 and "ratio" in out, error
    assert {one["measure"] for one in found["differences"]} >= {"requests_per_s", "ttft_ms.p50"}
    page = tmp_path / "page.html"
    code, _, error = start(BENCHMARK, "--rows", str(files[0]), "--report", str(page)).end()
    assert code == 0 and page.read_text().startswith("<!doctype html>"), error


def test_a_scenario_on_our_own_server(served: tuple[str, Command], start: Start, tmp_path: Path) -> None:
    """Short texts, since the tiny model has a context of 256 tokens."""
    file = tmp_path / "small.toml"
    text = (
        Path(CHAT)
        .read_text("utf-8")
        .replace("prompt_tokens = 120", "prompt_tokens = 12")
        .replace("output_tokens = 128", "output_tokens = 16")
    )
    file.write_text(text, "utf-8")
    row = row_of(start(BENCHMARK, "--url", served[0], "--scenario", str(file), "--requests", "10", "--rate", "20", "--abort_share", "0"))
    assert (row["completed"], row["errors"], row["model"], row["token_counts"]) == (10, {}, "tiny", "usage")


def failure(arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> str:
    monkeypatch.setattr(sys, "argv", ["deepseek-benchmark", *arguments])
    assert benchmark.main() == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.startswith("deepseek-benchmark: ") and said.err.count("\n") == 1
    return said.err


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--rate", "1", "--concurrency", "2"], "only one of them"),
        (["--rate", "fast"], "--rate: 'fast' is not a number above 0"),
        (["--requests", "0"], "--requests"),
        (["--abort_share", "1.5"], "share from 0 to 1"),
        (["--url", "ftp://x"], "--url must look like"),
        (["--url", "http://user@x"], "--url must look like"),
        (["--url", "http://127.0.0.1:99999"], "--url must look like"),
        (["--shared_prefix_tokens", "999"], "must not exceed"),
        (["--out", "/does/not/exist/rows.jsonl"], "does not exist"),
        (["--reqests", "3"], "did you mean --requests?"),
        (["--client", "curl"], "--client"),
        (["--scenario", "/does/not/exist.toml"], "cannot be read: No such file"),
        (["--scenario", CHAT, "--prompt-tokens", "5"], "--prompt_tokens is said by the scenario"),
        (["--compare", "/does/not/exist", "/nor/this"], "cannot be read"),
        (["--compare", "rows.jsonl"], "needs two files"),
        (["--compare", "http://127.0.0.1:1", "http://127.0.0.1:2", "--tier", "cpu"], "--compare and --tier ask for two things"),
        (["--compare", "a.jsonl", "b.jsonl", "--quality", "far"], "--compare and --quality ask for two things"),
        (["--compare", "rows.jsonl", "http://127.0.0.1:1"], "not both"),
        (["--compare", "http://127.0.0.1:1", "http://127.0.0.1:1"], "twice"),
        (["--compare", "http://127.0.0.1:1", "http://127.0.0.1:2", "--url", "http://127.0.0.1:3"], "--url does not go with --compare of"),
        (["--rows", "rows.jsonl"], "--rows needs --report"),
        (["--report", "/does/not/exist/page.html"], "--report /does/not/exist/page.html lies in a directory"),
    ],
)
def test_mistakes_get_one_sentence(
    arguments: list[str], expected: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert expected in failure(arguments, monkeypatch, capsys)


def test_a_report_that_cannot_be_drawn_is_refused_first(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(benchmark.importlib.util, "find_spec", lambda name: None)
    assert "--report needs matplotlib" in failure(["--url", "http://127.0.0.1:1", "--report", "page.html"], monkeypatch, capsys)


def test_nobody_listens(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    assert "no server answers" in failure(["--url", f"http://127.0.0.1:{port}"], monkeypatch, capsys)


def test_a_load_that_wholly_fails_says_so(start: Start) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    command = start(BENCHMARK, "--url", f"http://127.0.0.1:{port}", "--model", "m", "--requests", "3")
    code, out, _ = command.end()
    row = json.loads(out.splitlines()[-1])
    assert code == 1 and row["errors"] == {"connect": 3} and row["ttft_ms"] is None
