"""The comparison of load generators: a stand-in for guidellm that reports what it is told to, beside our own on the null server."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from loadtests import agreement

# Reports, at the path that `--output` names, the counts of `--constraint` and times that are right for the null server times FACTOR.
STAND_IN = """#!{python}
import json, sys
if sys.argv[1] == "--version":
    print("guidellm version: 0.0.1")
    sys.exit()
if {broken}:
    sys.exit("no such backend")
settings = dict(zip(sys.argv[3::2], sys.argv[4::2]))
part = lambda flag, name: dict(pair.split("=", 1) for pair in settings[flag].split(","))[name]
count, tokens = int(part("--constraint", "count")), int(part("--data", "output_tokens"))
with open("{calls}", "a") as file:
    file.write(json.dumps(settings) + "\\n")
def of(value): return {{"successful": {{"median": value * {factor}, "mean": value * {factor}}}}}
metrics = {{"request_totals": {{"successful": count - {lost}}}, "time_to_first_token_ms": of(30.0), "inter_token_latency_ms": of(20.0),
           "request_latency": of((30.0 + 20.0 * tokens) / 1000)}}
with open(part("--output", "path"), "w") as file:
    json.dump({{"benchmarks": [{{"metrics": metrics}}]}}, file)
"""


def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *flags: str, **told: Any) -> int:
    program = tmp_path / "guidellm"
    values = {"factor": 1.0, "lost": 0, "broken": False, "calls": tmp_path / "calls", **told}
    program.write_text(STAND_IN.format(python=sys.executable, **values))
    program.chmod(0o755)
    short = ["--requests", "6", "--rate", "20", "--tokens", "4", "--first_ms", "30", "--gap_ms", "20", "--rounds", "2"]
    monkeypatch.setattr(sys, "argv", ["agreement", "--guidellm", str(program), "--tokenizer", "DIR", *short, *flags])
    return agreement.main()


def test_both_are_asked_for_the_same_and_agree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(agreement, "BOUND", 0.5)  # The machine may be busy; what is asserted is that numbers meet, not how well.
    assert run(tmp_path, monkeypatch, "--label", "words") == 0
    row = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (row["server"], row["label"], row["guidellm_version"], row["agrees"]) == ("null", "words", "0.0.1", True)
    assert (row["requests"], row["tokens"], row["first_ms"], row["ours"]["ttft_ms"]["rounds"]) == (6, 4, 30.0, 2)
    assert row["guidellm"]["latency_ms"]["median"] == pytest.approx(110.0)
    calls = [json.loads(line) for line in (tmp_path / "calls").read_text().splitlines()]
    assert [call["--seed"] for call in calls] == ["kind=static,value=0", "kind=static,value=1"]
    assert calls[0]["--profile"] == "kind=poisson,rate=20.0" and calls[0]["--constraint"].endswith("count=6")
    assert ",model=fake" in calls[0]["--backend"] and "prompt_tokens=8,output_tokens=4" in calls[0]["--data"]


def test_another_server_is_measured_where_one_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[tuple[str, str]] = []

    def measured(url: str, given: Any, number: int) -> dict[str, float]:
        asked.append((url, given.model))
        return {"ttft_ms": 30.0, "tpot_ms": 20.0, "itl_ms": 20.0, "latency_ms": 110.0 + number, "prompt_tokens": 70}

    monkeypatch.setattr(agreement, "ours", measured)
    assert run(tmp_path, monkeypatch, "--url", "http://127.0.0.1:1", "--model", "m", "--concurrency", "2") == 0
    row = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert asked == [("http://127.0.0.1:1", "m")] * 2
    assert row["server"] == "running" and "first_ms" not in row and "rate" not in row
    assert (row["concurrency"], row["prompt_tokens"]) == (2, 70)
    call = json.loads((tmp_path / "calls").read_text().splitlines()[0])
    assert "target=http://127.0.0.1:1,model=m" in call["--backend"] and call["--profile"] == "kind=concurrent,streams=2"
    assert "prompt_tokens=70," in call["--data"]


def test_numbers_that_do_not_meet_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tmp_path, monkeypatch, factor=3.0) == 1
    row = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert not row["agrees"] and row["ours_over_guidellm"]["tpot_ms"] < 0.6


@pytest.mark.parametrize(("told", "words"), [({"lost": 1}, "completed 5 of 6"), ({"broken": True}, "no such backend")])
def test_a_round_that_failed_is_no_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, told: dict[str, Any], words: str) -> None:
    with pytest.raises(RuntimeError, match=words):
        run(tmp_path, monkeypatch, **told)


def test_a_ratio_beyond_the_bound_is_said() -> None:
    one = {"ttft_ms": 100.0, "tpot_ms": 10.0, "itl_ms": 10.0, "latency_ms": 500.0}
    found = agreement.agreement({"ours": [one, {**one, "ttft_ms": 108.0}], "guidellm": [one, one]})
    assert found["ours_over_guidellm"] == {"ttft_ms": 1.04, "tpot_ms": 1.0, "itl_ms": 1.0, "latency_ms": 1.0} and found["agrees"]
    assert not agreement.agreement({"ours": [{**one, "itl_ms": 9.4}], "guidellm": [one]})["agrees"]
