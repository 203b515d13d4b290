"""A comparison with full attention of the same model: the summary by hand, prompts that fit, and the command on a tiny model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from service.cli import benchmark
from service.cli.far_quality import DEPTHS, make_cases, propose_dense, scored_text, summary
from service.inputs.recall_tasks import TASKS, RecallCase
from service.inputs.tokens import TokenCodec
from tests.tiny_models import build_tiny

LINES = [f"value_{number} = compute({number})" for number in range(300)]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny(tmp_path_factory.mktemp("quality") / "model", "llama", max_position_embeddings=1024)


def test_shares_by_task_and_depth() -> None:
    cases = [RecallCase("needle", depth, "", "12") for depth in (0.0, 0.0, 0.5)] + [RecallCase("tracing", 0.0, "", "9")]
    full = {"answers": [" 12", "12)", "13", "8"], "scores": [-1.0, -3.0], "far_blocks_read": 0.0, "seconds": 1.0}
    served = {"answers": [" 12", "x", "13", "8"], "scores": [-2.0, -2.0], "far_blocks_read": 7.0, "seconds": 2.0}
    row = summary(cases, {"full": full, "served": served})
    needle = row["tasks"]["needle"]
    assert (needle["cases"], needle["full"], needle["served"], needle["over_full"]) == (3, 0.6667, 0.3333, 0.4999)
    assert needle["same_answers"] == 0.6667 and needle["served_by_depth"] == [0.5, 0.0]
    assert row["tasks"]["tracing"]["over_full"] is None
    assert row["perplexity"]["change"] == 0.0 and row["far_blocks_read"] == {"full": 0.0, "served": 7.0}
    worse = summary(cases, {"full": full, "served": {**served, "scores": [-2.0, -2.02]}})
    assert 0.005 < worse["perplexity"]["change"] < 0.015


def test_the_layers_that_read_least_are_proposed() -> None:
    shares = {"0": 0.90, "1": 0.99, "2": 0.80, "3": 0.94, "4": 0.95, "5": 0.9499, "6": 1.0, "7": 0.97}
    assert propose_dense(shares, 8) == {"below": 0.95, "most": 2, "proposed": "0,2"}
    assert propose_dense({**shares, "0": 0.96}, 8)["proposed"] == "2,3"
    assert propose_dense({"0": 0.96, "1": 0.95}, 8)["proposed"] == propose_dense({"0": 0.5}, 3)["proposed"] == "none"
    assert propose_dense({}, 8)["proposed"] is None


def test_prompts_are_as_long_as_lines_allow(tiny: Path) -> None:
    codec = TokenCodec.load(tiny)
    cases = make_cases(codec, LINES, 600, 2)
    assert len(cases) == 2 * DEPTHS * len(TASKS)
    lengths = [len(codec.encode(case.prompt)) for case in cases]
    assert max(lengths) <= 600 - 16 and min(lengths) > 450
    assert len(scored_text(codec, LINES, 700)) == 700


def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *arguments: str) -> tuple[int, str, str]:
    monkeypatch.setattr("sys.argv", ["deepseek-benchmark", *arguments])
    code = benchmark.main()
    out, err = capsys.readouterr()
    return code, out, err


def test_the_command_compares_and_keeps_a_row(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = ("--attention_window", "64", "--far_blocks", "1", "--quality_tokens", "700", "--quality_cases", "1", "--kv_far", "int4")
    code, out, _ = run(
        capsys, monkeypatch, "--quality", "far", "--directory", str(tiny), *asked, "--out", str(tmp_path / "rows.jsonl"), "--label", "x"
    )
    row = json.loads(out.splitlines()[-1])
    assert code == 0 and json.loads((tmp_path / "rows.jsonl").read_text()) == row
    assert {kind: task["cases"] for kind, task in row["tasks"].items()} == dict.fromkeys(
        ("needle", "multi_key", "tracing", "aggregation"), DEPTHS
    )
    assert row["far_blocks_read"]["full"] == 0 < row["far_blocks_read"]["served"]
    assert row["label"] == "x" and row["cores"] >= 1
    assert row["asked"]["kv_far"] == "int4" and row["perplexity"]["tokens"] == 698
    assert 0 < abs(row["perplexity"]["change"]) < 0.2
    assert row["date"] and row["cpu"] and row["dtype"] in ("float32", "bfloat16") and row["kv_cache_dtype"] == row["dtype"]
    mass = row["attention_mass"]
    assert mass["tokens"] == 640 and mass["rows"] == 385 and mass["without_far"] < mass["read"] <= mass["best_possible"] < 1
    assert f"mass         read {mass['read']:.3f}" in out
    assert row["dense_layers"] == {"below": 0.95, "most": 0, "proposed": "none"} and "\ndense layers --dense_layers none  (" in out


def test_a_choice_of_tasks_is_asked_alone(tiny: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    flags = (
        "--attention_window",
        "64",
        "--quality_tokens",
        "700",
        "--quality_cases",
        "1",
        "--quality_tasks",
        "tracing",
        "needle",
        "needle",
    )
    code, out, _ = run(capsys, monkeypatch, "--quality", "far", "--directory", str(tiny), *flags)
    row = json.loads(out.splitlines()[-1])
    assert code == 0 and {kind: task["cases"] for kind, task in row["tasks"].items()} == {"tracing": DEPTHS, "needle": DEPTHS}
    # 16 far blocks cover what 700 tokens leave behind the window: nobody chooses.
    assert row["attention_mass"]["rows"] == 0 and "mass  " not in out and "dense layers not known" in out


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ((), "set --attention_window"),
        (("--quality_cases", "0"), "--quality_cases: '0' is not a whole number from 1 up"),
        (("--quality_cases", "-3"), "--quality_cases: '-3' is not a whole number from 1 up"),
        (("--attention_window", "-1"), "--attention_window must be a whole number from 0 up to 16777216, not '-1'"),
        (("--far_blocks", "x"), "--far_blocks must be a whole number from 0 up to 65536, not 'x'"),
        (("--attention_window", "64", "--quality_tokens", "100"), "must lie between 256"),
        (("--attention_window", "64", "--dense_layers", "0,5"), "names layer 5"),
        (
            ("--attention_window", "64", "--dense_layers", "x"),
            "--dense_layers must be whole numbers by comma, such as 0,1, or none, not 'x'",
        ),
        (("--attention_window", "64", "--quality_tokens", "300"), "the facts alone take more"),
    ],
)
def test_what_makes_no_comparison_is_refused(
    tiny: Path, flags: tuple[str, ...], words: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    code, _, err = run(capsys, monkeypatch, "--quality", "far", "--directory", str(tiny), *flags)
    assert code == 2 and words in err


def test_the_bundled_model_is_measured_where_none_is_named(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    code, _, err = run(capsys, monkeypatch, "--quality", "far", "--quality_tokens", "20000")
    assert code == 2 and "--quality_tokens 20000 must lie between 256 and the model's 16384" in err
