"""Scenario files: each is read, obeyed and can be run; what is wrong in one is named; comparisons and reports of their rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from loadtests.null_server import NullProtocol
from service.checkpoints.bundled import bundled_directory
from service.cli.benchmark_report import report
from service.inputs.bpe import BpeTokenizer
from service.loadgen.arrivals import due_times
from service.loadgen.compare import RowsError, Side, compare, compare_rounds, read_rows, scenario_of, side_of
from service.loadgen.drive import Drive
from service.loadgen.scenario import Ready, ScenarioError, read_scenario, read_trace
from service.loadgen.senders import RawSender
from service.loadgen.summary import Targets, summarise
from service.types.catalog import V2_3, V5_2
from tests.house.source import ROOT
from tests.test_loadgen import listening

FILES = sorted((ROOT / "loadtests" / "scenarios").glob("*.toml"))
NAMES = {"burst", "chat", "long_document", "mixed_versions", "multimodal", "rag", "replay", "soak"}
GOOD = 'name = "x"\nabout = "y"\n[load]\nrequests = 3\n[[requests]]\nprompt_tokens = 4\n'


def test_every_kind_of_load_has_a_file() -> None:
    assert {path.stem for path in FILES} == NAMES
    assert all(read_scenario(path).scenario.name == path.stem for path in FILES)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
async def test_each_scenario_runs(path: Path) -> None:
    """Against the null server, shortened and sped up: every shape of it is a request that a server would read."""
    ready = read_scenario(path).changed({"requests": 12, "rate": 400.0, "warmup": 1, "abort_share": 0.0}, {})
    async with listening(lambda: NullProtocol(3)) as url:
        sender = RawSender(url)
        measured = await Drive(sender, ready.mix("m"), ready.load).run()
        await sender.close()
    assert [watch.outcome for watch in measured.watches] == ["ok"] * 12
    bodies = [json.loads(ready.mix("m").body(index)) for index in range(12)]
    assert {body["model"] for body in bodies} <= {"m", "stable", "candidate"}
    assert summarise(measured, Targets())["completed"] == 12


def test_what_the_files_promise() -> None:
    ready = {path.stem: read_scenario(path) for path in FILES}
    assert len(json.loads(ready["long_document"].mix("m").body(0))["prompt"].split()) == 16000
    words = [json.loads(ready["rag"].mix("m").body(index))["prompt"].split() for index in range(80)]
    assert len({tuple(text[:1350]) for text in words}) == 8 and len({tuple(text) for text in words}) == 80
    times = due_times(ready["burst"].load)
    assert sum(time % 30 >= 25 for time in times) > 1.5 * sum(time % 30 < 25 for time in times)
    assert ready["soak"].load.max_seconds == 8 * 3600 and due_times(ready["soak"].load)[-1] <= 8 * 3600
    assert len(due_times(ready["replay"].load)) == len(ready["replay"].sizes) == 67
    kinds = [ready["mixed_versions"].mix("").kind(index) for index in range(120)]
    assert 4 <= kinds.count("candidate") <= 24


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (("requests = 3", "requests = 0"), "load.requests"),
        (("requests = 3", "reqests = 3"), "reqests"),
        (("prompt_tokens = 4", "prompt_tokens = 4\nshared_prefix_tokens = 9"), "shared_prefix_tokens must not exceed"),
        (("prompt_tokens = 4", 'endpoint = "rpc"'), "endpoint"),
        (("requests = 3", "requests = 3\nrate = 1\nphases = [{rate = 1, seconds = 1}]"), "only one of them"),
        (("[[requests]]\nprompt_tokens = 4\n", ""), "requests"),
        (("[load]", "[load"), "no scenario"),
    ],
)
def test_what_is_wrong_in_a_file_is_named(tmp_path: Path, change: tuple[str, str], expected: str) -> None:
    path = tmp_path / "s.toml"
    path.write_text(GOOD)
    assert read_scenario(path).load.requests == 3
    path.write_text(GOOD.replace(*change))
    with pytest.raises(ScenarioError, match=expected):
        read_scenario(path)


def test_a_missing_file_and_a_bad_trace_are_named(tmp_path: Path) -> None:
    with pytest.raises(ScenarioError, match="cannot be read: No such file"):
        read_scenario(tmp_path / "none.toml")
    trace = tmp_path / "t.jsonl"
    for text, expected in (("", "empty"), ('{"timestamp": 1, "input_length": 5}', "line 1"), ("[]", "line 1")):
        trace.write_text(text)
        with pytest.raises(ScenarioError, match=expected):
            read_trace(trace)
    lines = [
        {"timestamp": 900, "input_length": 5, "output_length": 2, "hash_ids": [1]},
        {"timestamp": 400, "input_length": 7, "output_length": 3},
    ]
    trace.write_text("\n".join(map(json.dumps, lines)))
    assert [(one.timestamp_ms, one.prompt_tokens, one.output_tokens) for one in read_trace(trace)] == [(0, 7, 3), (500, 5, 2)]


def test_a_scenario_gives_way_to_what_is_changed(tmp_path: Path) -> None:
    burst = read_scenario(ROOT / "loadtests" / "scenarios" / "burst.toml")
    assert burst.changed({"requests": 5}, {}).load.phases == burst.load.phases
    closed = burst.changed({"concurrency": 3}, {"ttft_ms": 7.0})
    assert (closed.load.mode, closed.load.concurrency, closed.load.phases) == ("closed", 3, ())
    assert (closed.scenario.slo.ttft_ms, closed.scenario.slo.tpot_ms, closed.changes) == (7.0, 200, {"concurrency": 3})
    assert isinstance(burst, Ready) and burst.changes == {}


def test_a_long_document_fits_the_context_of_v5_2() -> None:
    """16,000 words are 16,000 tokens of the bundled tokenizer, whose 4,096 entries every nano model has."""
    body = json.loads(read_scenario(ROOT / "loadtests" / "scenarios" / "long_document.toml").mix("m").body(0))
    (ids,) = BpeTokenizer.load(bundled_directory(V2_3)).encode([body["prompt"]])
    # The first word has no space before it, and may be two.
    assert 16000 <= len(ids) <= 16001
    assert all(len(ids) + body["max_tokens"] <= shape.context_tokens for _, shape in V5_2.shapes)


# Comparisons and reports.


async def rows_of(count: int, gap_s: float, **labels: Any) -> list[dict[str, Any]]:
    ready = read_scenario(ROOT / "loadtests" / "scenarios" / "chat.toml").changed({"requests": 8, "concurrency": 4, "warmup": 1}, {})
    rows = []
    async with listening(lambda: NullProtocol(5, gap_s)) as url:
        for _ in range(count):
            sender = RawSender(url)
            measured = await Drive(sender, ready.mix("m"), ready.load).run()
            await sender.close()
            rows.append({**ROW, **summarise(measured, Targets(2000, 200)), **labels})
    return rows


ROW: dict[str, Any] = {
    **{"kind": "benchmark", "date": "2026-11-24T00:00:00+00:00", "label": "", "scenario": "chat", "changes": {"concurrency": 4, "seed": 1}},
    **{"url": "http://127.0.0.1:1", "endpoint": "chat", "model": "m", "mode": "closed", "rate": None, "concurrency": 4, "seed": 0},
    **{"cores": 2, "load_average": 0.0, "asked": {}},
}


async def test_a_comparison_says_what_is_apart(tmp_path: Path) -> None:
    slow, fast = await rows_of(3, 0.02), await rows_of(3, 0.002)
    found = {one.measure: one for one in compare(slow, fast)}
    assert found["tpot_ms.p50"].verdict == "better" and found["tpot_ms.p50"].ratio < 0.5
    assert found["output_tokens_per_s"].verdict == "better" and found["output_tokens_per_s"].ratio > 2
    assert {one.measure: one.verdict for one in compare(fast, slow)}["output_tokens_per_s"] == "worse"
    assert {one.verdict for one in compare(slow, slow)} == {"within spread"}
    assert found["tpot_ms.p50"].before.rows == 3 and found["tpot_ms.p50"].before.least <= found["tpot_ms.p50"].before.median
    assert {one.scenario for one in found.values()} == {"chat concurrency=4"}


def test_rounds_are_compared_one_by_one() -> None:
    def rounds(*speeds: float, **more: object) -> list[dict[str, object]]:
        return [{"output_tokens_per_s": speed, "ttft_ms": {"p50": 100 / speed}, **more} for speed in speeds]

    first = rounds(10.0, 20.0, 30.0)
    found = {one.measure: one for one in compare_rounds(first, rounds(20.0, 30.0, 60.0))}
    assert found["output_tokens_per_s"].ratio == Side(2.0, 1.5, 2.0, 3) and found["output_tokens_per_s"].verdict == "better"
    assert found["ttft_ms.p50"].verdict == "better" and found["ttft_ms.p50"].ratio.median == pytest.approx(0.5)
    assert set(found) == {"output_tokens_per_s", "ttft_ms.p50"}
    # The machine was twice as slow in one round: the sides overlap, the rounds agree.
    assert {one.verdict for one in compare_rounds(first, rounds(9.0, 19.0, 29.0))} == {"worse"}
    assert {one.verdict for one in compare_rounds(first, rounds(9.0, 21.0, 29.0))} == {"within spread"}
    assert {one.verdict for one in compare_rounds(first[:2], rounds(5.0, 5.0))} == {"too few rounds"}
    assert compare_rounds([{"output_tokens_per_s": 0.0}], [{"output_tokens_per_s": 1.0, "ttft_ms": None}]) == []


def test_a_side_without_values_is_none() -> None:
    assert side_of([{"ttft_ms": None}], "ttft_ms.p50") is None
    assert side_of([{"ttft_ms": {"p50": 2}}, {"ttft_ms": {"p50": 4}}, {}], "ttft_ms.p50") == Side(3.0, 2.0, 4.0, 2)


def test_rows_that_share_nothing_are_refused(tmp_path: Path) -> None:
    other = {**ROW, "scenario": "", "endpoint": "completions", "asked": {"prompt_tokens": 8, "output_tokens": 4}, "rate": 2.0}
    assert scenario_of(other) == "completions 8+4 2.0/s"
    with pytest.raises(RowsError, match="share no scenario"):
        compare([ROW], [other])
    path = tmp_path / "rows.jsonl"
    for text, expected in (('{"kind": "other"}', "no rows"), ("{", "one JSON row a line")):
        path.write_text(text)
        with pytest.raises(RowsError, match=expected):
            read_rows(path)


async def test_a_report_is_one_page_with_plots_and_nothing_from_elsewhere() -> None:
    pytest.importorskip("matplotlib")
    rows = await rows_of(2, 0.002, label="<b>ours</b>")
    rows[1]["kinds"] = {"a&b": {"requests": 4, "completed": 3, "met": 2, "ttft_ms": None, "tpot_ms": None}}
    failed = {**rows[0], "curves": {}, "timeline": {}, "ttft_ms": None, "tpot_ms": None, "errors": {"status_429": 8}, "label": "failed"}
    page = report([*rows, failed])
    assert page.count("<svg") == 4 and "<script" not in page and "src=" not in page and "@import" not in page
    assert "&lt;b&gt;ours&lt;/b&gt;" in page and "<b>" not in page and "a&amp;b" in page
    assert "<span class='bad'>8</span>" in page and "chat concurrency=4" in page
    assert f"{rows[0]['ttft_ms']['p50']:.1f} / {rows[0]['ttft_ms']['p99']:.1f}" in page
