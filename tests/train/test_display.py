"""What a run shows off a terminal."""

from __future__ import annotations

from io import StringIO

from rich.console import Console

from service.train.display import Display
from service.train.evaluate import HeldOut
from service.train.loop import StepReport


def test_plain_lines_now_and_then() -> None:
    shown = StringIO()
    with Display(Console(file=shown, width=200)) as display:
        for step in range(1, 101):
            display.stepped(StepReport(step, 1000 * step, 4.0, 1.0, 1.0 * step, step / 100))
        display.evaluated(StepReport(100, 100_000, 4.0, 1.0, 100.0, 1.0), HeldOut(3.5, 10, 30))
    lines = shown.getvalue().splitlines()
    assert [line.split("  ")[0] for line in lines[:-1]] == ["step 1", "step 31", "step 61", "step 91", "step 100"]
    assert "loss 4.0000" in lines[1] and "1,000 tokens/s" in lines[1] and "1:09 left" in lines[1] and "31.0 %" in lines[1]
    assert "3.5000 nats/token" in lines[-1]


def test_a_bar_on_a_terminal() -> None:
    shown = StringIO()
    with Display(Console(file=shown, width=120, force_terminal=True)) as display:
        display.stepped(StepReport(1, 1000, 4.0, 1.0, 1.0, 0.5))
    assert "50.0 %" in shown.getvalue()
