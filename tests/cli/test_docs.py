"""docs/cli.md is what the definitions say, and the check can fail."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from service.cli import docs


def test_the_page_is_current() -> None:
    assert docs.DOCUMENT.read_text("utf-8") == docs.render(), "run python -m service.cli.docs"


@pytest.mark.parametrize("command", ["deepseek-serve", "deepseek-benchmark", "deepseek-train", "deepseek-convert", "deepseek-versions"])
def test_every_command_is_there(command: str) -> None:
    assert f"## {command}\n" in docs.render()


def test_writing_and_checking(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(docs, "DOCUMENT", tmp_path / "cli.md")
    monkeypatch.setattr(sys, "argv", ["docs", "--check"])
    assert docs.main() == 1 and "out of date" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["docs"])
    assert docs.main() == 0
    monkeypatch.setattr(sys, "argv", ["docs", "--check"])
    assert docs.main() == 0
    (tmp_path / "cli.md").write_text("old")
    assert docs.main() == 1
