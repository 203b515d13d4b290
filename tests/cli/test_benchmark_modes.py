"""Which flags go together: whatever a measurement does not obey is refused by name before anything is measured."""

from __future__ import annotations

import re

import pytest

from service.cli import benchmark
from service.cli.benchmark import benchmark_parser
from service.cli.benchmark_modes import FAR, FILES, LOAD, OBEYED, SERVERS
from service.types.errors import SettingsError

FILE_PAIR, SERVER_PAIR = ("--compare", "a", "b"), ("--compare", "http://127.0.0.1:1", "http://127.0.0.1:2")
# How each is asked for.
ASKED: dict[str, tuple[str, ...]] = {
    LOAD: (),
    FILES: FILE_PAIR,
    SERVERS: SERVER_PAIR,
    "--rows": ("--rows", "a.jsonl"),
    "--tier": ("--tier", "cpu"),
    "--quality": ("--quality", "int8"),
    FAR: ("--quality", "far"),
    "--versions": ("--versions", "v2.3"),
    "--backends": ("--backends", "int8"),
}
ASKING = {"tier", "quality", "versions", "backends", "rows", "compare"}
VALUES = {"endpoint": "chat", "client": "raw", "kv_far": "int8", "prefill": "dense", "rope_scaling": "keep", "quality_tasks": "needle"}
FLAGS = [flag.removeprefix("--") for flag in benchmark_parser().known_flags() if flag not in ("--help", "--about")]


def refusal(*arguments: str) -> str:
    with pytest.raises(SettingsError) as caught:
        benchmark._benchmark(arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_every_flag_is_obeyed_by_some_measurement_and_every_one_has_its_flags() -> None:
    assert set().union(*OBEYED.values()) == set(FLAGS)
    assert set(OBEYED) == set(ASKED)


@pytest.mark.parametrize("mode", ASKED)
def test_a_flag_that_is_not_obeyed_is_refused_by_name(mode: str) -> None:
    refused = 0
    for flag in sorted(set(FLAGS) - OBEYED[mode] - ASKING):
        value = () if flag == "ignore_eos" else (VALUES.get(flag, "1"),)
        said = refusal(*ASKED[mode], f"--{flag}", *value)
        assert said.startswith(f"--{flag} belongs to " if mode == LOAD else f"--{flag} does not go with {mode}: it belongs to "), said
        refused += 1
    assert refused >= 10


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            ("--tier", "cpu", "--report", "x.html"),
            "--report does not go with --tier: it belongs to a load, --compare of servers and --rows.",
        ),
        (("--tier", "cpu", "--scenario", "f.toml"), "--scenario does not go with --tier: it belongs to a load and --compare of servers."),
        (("--backends", "int8", "--url", "http://127.0.0.1:1"), "--url does not go with --backends: it belongs to a load."),
        (
            ("--quality=int8", "--rounds=3"),
            "--rounds does not go with --quality: it belongs to --compare of servers, --tier, --versions and",
        ),
        (("--quality", "far", "--threads", "2"), "--threads does not go with --quality far"),
        (("--versions", "v2.3", "--far-blocks", "2"), "--far_blocks does not go with --versions: it belongs to --quality far."),
        (("--text", "x.txt"), "--text belongs to --quality and --versions: give one of these too."),
        (("--directory", "x"), "--directory belongs to --tier, --quality and --backends: give one of these too."),
        (("--keep_table", "x.json"), "--keep_table belongs to --backends: give it too."),
        (("--tier", "cpu", "--quality", "int8"), "--tier and --quality ask for two things: give only one of them."),
        (("--rows", "a.jsonl", "--backends", "int8"), "--rows and --backends ask for two things"),
        ((*SERVER_PAIR, "--tier", "cpu"), "--compare and --tier ask for two things"),
        (("--quality", ""), "--quality says nothing"),
    ],
)
def test_a_refusal_says_where_a_flag_belongs(arguments: tuple[str, ...], words: str) -> None:
    assert re.search(re.escape(words), refusal(*arguments))


def test_what_is_obeyed_comes_as_far_as_the_measurement(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def reached(given: object) -> None:
        raise SettingsError("measured")

    monkeypatch.setattr(benchmark, "measure_machine", reached)
    monkeypatch.setattr(benchmark, "measure_far_quality", reached)
    for arguments in (
        ("--tier", "edge", "--directory", "d", "--threads", "1", "--rounds", "2", "--prompt_tokens", "9", "--output_tokens", "8"),
        ("--quality", "int8,int4", "--text", "t", "--label", "x"),
        ("--quality", "far", "--attention_window", "64", "--label", "x"),
        ("--versions", "a,b", "--text", "t", "--text_tokens", "70"),
        ("--backends", "none"),
    ):
        assert refusal(*arguments) == "measured" and capsys.readouterr().err == ""
    assert refusal("--tier", "cpu", "--threads", "4096") == "measured"
    assert capsys.readouterr().err.startswith("deepseek-benchmark: --threads 4096 is more than the ")
