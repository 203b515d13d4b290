"""Flags, table and row of the measurements that start engines themselves."""

from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest

from service.cli import benchmark, machine_benchmark
from service.cli.benchmark import benchmark_parser
from service.cli.machine_benchmark import finish
from service.cli.version_comparison import Comparison
from service.train.corpus import read_corpus
from service.types.errors import SettingsError

SPREAD = {"median": 2.0, "min": 1.0, "max": 3.0, "rounds": 3}
TIER: dict[str, Any] = {
    "kind": "tier",
    "tier": "edge",
    "flags": "--quantize int8",
    "cores": 2,
    "directory": "nano",
    "baseline_tokens_per_s": SPREAD,
    "tokens_per_s": SPREAD,
    "ratio": SPREAD,
    "between": {"--dtype float16": {"median": 1.23, "min": 1.1, "max": 1.3, "rounds": 3}},
    "claim": 1.8,
    "share_of_limit": {"prefill": 0.5, "decode": 0.25},
}
QUALITY: dict[str, Any] = {
    "kind": "quality",
    "cores": 2,
    "directory": "nano",
    "float32_perplexity": 10.0,
    "forms": {"int8": {"perplexity": 10.05, "ratio": 1.005, "agreement": 0.98, "within_bound": True}},
}


def flags(*arguments: str) -> Namespace:
    return Namespace(**benchmark_parser().read(arguments))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--quality", "int8,int3"), "--quality must name .*, not 'int3'"),
        (("--quality", "far,int8"), "or far alone, not 'far'"),
        (("--quality", ","), "--quality must name .*, not ','"),
        (("--backends", "none,int2"), "--backends must name .*, not 'int2'"),
        (("--backends", ","), "--backends must name .*, not ','"),
        (
            ("--backends", "none", "--keep_table", "/nonexistent/x.json"),
            "--keep_table /nonexistent/x.json lies in a directory that does not",
        ),
        (("--backends", "none", "--keep_table", "/"), "--keep_table / is a directory"),
        (("--backends", "none", "--keep_table", __file__), "--keep_table .* is not a table of measurements"),
        (("--tier", "cpu", "--out", "/nonexistent/x.jsonl"), "--out /nonexistent/x.jsonl lies in a directory that does not"),
        (("--quality", "far", "--directory", "x", "--out", "/nonexistent/x.jsonl"), "--out /nonexistent/x.jsonl lies"),
        (("--tier", "cpu", "--directory", "v9.9"), r"--directory 'v9\.9' is not bundled \(bundled: .*v3\.5.* name a directory that exists"),
        (("--backends", "int8", "--directory", "v5.2"), "--backends cannot measure nano-v5.2: .* far blocks; name another --directory"),
    ],
)
def test_what_cannot_be_measured_is_refused_at_once(arguments: tuple[str, ...], words: str) -> None:
    with pytest.raises(SettingsError, match=words):
        benchmark._benchmark(arguments)
    assert not Path("/nonexistent").exists()


def test_what_a_table_cannot_take_is_not_lost(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    row = {"kind": "backends", "forms": {}, "measured": [], "cores": 2, "directory": "nano"}

    def full(path: str) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("service.cli.backends.staged_file", full)
    monkeypatch.setattr("service.cli.benchmark_results.Path.open", lambda *_, **__: full(""))
    for named in ("--keep_table", "--out"):
        with pytest.raises(SettingsError, match=f"{named} .* cannot be written: No space left"):
            finish(flags("--backends", "none", named, str(tmp_path / "x")), row)
        assert json.loads(capsys.readouterr().out.splitlines()[-1]) == row


async def test_the_checkpoint_is_a_directory_a_line_or_the_newest_that_will_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[str] = []

    async def measure(directory: Path, *_: object) -> dict[str, Any]:
        asked.append(directory.name)
        return {}

    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    monkeypatch.setattr(machine_benchmark, "measure_backends", measure)
    monkeypatch.setattr(machine_benchmark, "measure_quality", measure)
    for arguments in (("--backends", "int8"), ("--quality", "int8"), ("--backends", "int8", "--directory", "v3.5")):
        await machine_benchmark.measure_machine(flags(*arguments))
    await machine_benchmark.measure_machine(flags("--quality", "int8", "--directory", str(tmp_path)))
    assert asked == ["nano-v4.8", "nano-v5.2", "nano-v3.5", tmp_path.name]


@pytest.mark.parametrize("row", [TIER, QUALITY])
def test_stdout_ends_with_the_row_and_out_gets_it(row: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "rows.jsonl"
    assert finish(flags("--out", str(out)), row) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == json.loads(out.read_text()) == row


def test_a_bound_that_does_not_hold_is_the_exit_code(capsys: pytest.CaptureFixture[str]) -> None:
    form = {**QUALITY["forms"]["int8"], "within_bound": False}
    assert finish(flags(), {**QUALITY, "forms": {"int8": form}}) == 1
    assert "+0.50%" in capsys.readouterr().out


def test_the_command_measures_what_the_flags_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[tuple[object, ...]] = []

    async def quality(*arguments: object) -> dict[str, Any]:
        asked.append(arguments)
        return {key: value for key, value in QUALITY.items() if key not in ("cores", "directory")}

    async def tier(*arguments: object) -> dict[str, Any]:
        asked.append(arguments)
        return {key: value for key, value in TIER.items() if key not in ("cores", "directory")}

    monkeypatch.setattr(machine_benchmark, "measure_quality", quality)
    monkeypatch.setattr(machine_benchmark, "measure_tier", tier)
    (tmp_path / "t.txt").write_text("words")
    common = ("--directory", str(tmp_path), "--threads", "3", "--label", "here")
    assert benchmark._benchmark(["--quality", "int4,int8,int4", "--text", str(tmp_path / "t.txt"), "--text_tokens", "77", *common]) == 0
    row = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (row["label"], row["directory"]) == ("here", tmp_path.name) and row["cores"] >= 1
    assert benchmark._benchmark(["--tier", "cpu", "--rounds", "7", "--prompt_tokens", "9", "--output_tokens", "8", *common]) == 0
    assert asked == [(tmp_path, ("int4", "int8"), "words", 77, 3), ("cpu", tmp_path, 3, 7, (9, 8))]


def test_versions_are_compared_on_text_that_no_recipe_trains_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[tuple[Any, ...]] = []

    async def versions(*arguments: object) -> dict[str, Any]:
        asked.append(arguments)
        return {"kind": "versions"}

    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    monkeypatch.setattr(machine_benchmark, "compare_versions", versions)
    monkeypatch.setattr(machine_benchmark, "_print", lambda row: None)
    command = ["--versions", f"v2.3,mine={tmp_path}", "--rounds", "7", "--prompt_tokens", "9", "--output_tokens", "8", "--threads", "3"]
    assert benchmark._benchmark(command) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["kind"] == "versions"
    sources, text, tokens, comparison = asked[0]
    assert [source.name for source in sources] == ["v2.3", "mine"] and sources[1].directory == str(tmp_path)
    assert tokens == 16384 and comparison == Comparison(9, 8, 7, 3)
    assert len(text) > 50_000 and not any(document in text for document in read_corpus(60, chat_share=0.0).train if len(document) > 2000)
    (tmp_path / "t.txt").write_text("words")
    assert benchmark._benchmark([*command, "--text", str(tmp_path / "t.txt")]) == 0 and asked[1][1] == "words"


def test_a_text_that_cannot_be_read_is_one_sentence() -> None:
    with pytest.raises(SettingsError, match="--text /nowhere cannot be read: No such file"):
        machine_benchmark._text("/nowhere")


def test_the_text_of_every_machine() -> None:
    assert len(machine_benchmark._text("")) > 50_000
