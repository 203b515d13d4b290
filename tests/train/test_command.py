"""`deepseek-train`: a small run from flags to checkpoint, and one sentence for whatever is wrong."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import yaml

from service.checkpoints.manifest import read_manifest, verify
from service.cli.train import build_parser, main, read_flags


@pytest.fixture
def recipe_file(tmp_path: Path, content: dict[str, Any], library: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The small recipe as a file; the corpus is the small library."""
    monkeypatch.setattr("service.train.corpus.library_root", lambda: library)
    monkeypatch.chdir(tmp_path)
    small = content | {
        "schedule": content["schedule"] | {"lengths": [{"until": 1.0, "tokens": 32}]},
        "evaluate": {"times": 1, "tokens": 64, "final_tokens": 100},
    }
    small["samples"] = {"prompts": ["def double(n):\n"], "chats": [], "temperatures": [0.0], "tokens": 2}
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(small))
    return str(path)


def test_a_run_is_published_then_longer(recipe_file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--recipe", recipe_file, "--threads", "1", "--device=cpu", "--results", "rows/training.jsonl"]
    assert main([*arguments, "--steps", "2"]) == 0
    shown = capsys.readouterr()
    row = json.loads(shown.out.splitlines()[-1])
    assert (
        row["steps"] == 2
        and row["threads"] == 1
        and row["held_out_tokens"] == 100
        and row["dtype"] == "float32"
        and row["recipe"] == "tiny"
    )
    assert "step 2" in shown.err and "held out" in shown.err
    manifest = read_manifest(tmp_path / "tiny" / "checkpoint")
    verify(manifest)
    assert main([*arguments, "--steps", "3", "--resume", "--out", "tiny"]) == 0
    rows = [json.loads(line) for line in (tmp_path / "rows" / "training.jsonl").read_text().splitlines()]
    assert [entry["steps"] for entry in rows] == [2, 3]
    assert read_manifest(tmp_path / "tiny" / "checkpoint").digest != manifest.digest


def test_an_interrupted_run_can_be_resumed(recipe_file: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from service.train.display import Display

    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    plain = Display.stepped

    def interrupted(self: Display, report: Any) -> None:
        plain(self, report)
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Display, "stepped", interrupted)
    try:
        assert main(["--recipe", recipe_file, "--steps", "5", "--out", "run"]) == 130
    finally:
        for number, was in zip((signal.SIGTERM, signal.SIGINT), before, strict=True):
            signal.signal(number, was)
    assert "--resume" in capsys.readouterr().err and Path("run/state.pt").is_file() and not Path("run/checkpoint").exists()


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    assert main(arguments) == 2
    shown = capsys.readouterr()
    assert shown.out == "" and shown.err.startswith("deepseek-train: ") and shown.err.count("\n") == 1
    return shown.err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "--recipe"),
        (["--recipe", "nano-v0"], "nano-v2.3"),
        (["--recipe", "missing.yaml"], "missing.yaml"),
        (["--recipe", "nano-v2.3", "--resume"], "nothing to resume"),
        (["--recipe", "nano-v2.3", "--steps", "-1"], "--steps"),
        (["--recipe", "nano-v2.3", "--minutes", "-0.5"], "--minutes"),
        (["--recipe", "nano-v2.3", "--minutes", "nan"], "--minutes"),
        (["--recipe", "nano-v2.3", "--threads", "-2"], "--threads"),
        (["--recipe", "nano-v2.3", "--steps", "many"], "--steps"),
        (["--recipe", "nano-v2.3", "--steps", "1", "--minutes", "1"], "not both"),
        (["--recipe", "nano-v2.3", "--dtype", "int4"], "--dtype"),
        (["--recipe", "nano-v2.3", "--device", "tpu"], "--device"),
        (["--recipe", "nano-v2.3", "--step", "3"], "--steps"),
        (["--recipe", "nano-v2.3", "--out", "full"], "not empty"),
        (["--recipe", "nano-v2.3", "--out", "file/below"], "file"),
        (["--recipe", "nano-v2.3", "--results", "full"], "full"),
    ],
)
def test_wrong_flags(
    arguments: list[str], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "something").touch()
    (tmp_path / "file").touch()
    assert words in refused(arguments, capsys)


def test_a_wrong_recipe_key(recipe_file: str, capsys: pytest.CaptureFixture[str]) -> None:
    path = Path(recipe_file)
    path.write_text(path.read_text() + "learning_rate: 1\n")
    assert "learning_rate" in refused(["--recipe", recipe_file], capsys)


def test_spellings_and_defaults() -> None:
    flags = read_flags(["--recipe", "nano-v2.3", "--minutes", "2"])
    assert flags.out == Path("nano-v2.3") and flags.minutes == 2.0 and flags.results is None
    assert read_flags(["--recipe", "a/b.yaml"]).out == Path("b")
    assert read_flags(["--recipe", "a/b.yaml", "--out", "c"]).out == Path("c")
    assert "nano-v2.3" in build_parser().format_help()
