"""How a run shows itself: a progress bar on a terminal, a plain line now and then elsewhere.

It does not know trainers or files. Invariant: it only reports; nothing is computed here that a run depends on.
"""

from __future__ import annotations

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from service.train.evaluate import HeldOut
from service.train.loop import StepReport

_LINE_SECONDS = 30.0


class Display:
    """Watches a run. Tokens a second are averaged over about twenty steps."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(stderr=True)
        self._bar = Progress(TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>5.1f} %"), console=self.console)
        self._task = self._bar.add_task("training", total=1.0)
        self._seconds_per_token = 0.0
        self._before: StepReport | None = None
        self._loss = 0.0
        self._printed_s = float("-inf")

    def __enter__(self) -> Display:
        if self.console.is_terminal:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.console.is_terminal:
            self._bar.stop()

    def stepped(self, report: StepReport) -> None:
        """Move the bar, or print a line when the last is old enough."""
        line = self._line(report)
        if self.console.is_terminal:
            self._bar.update(self._task, completed=report.progress, description=line)
        elif report.elapsed_s - self._printed_s >= _LINE_SECONDS or report.progress >= 1.0:
            self._printed_s = report.elapsed_s
            self.console.print(f"{line}  {100 * report.progress:.1f} %", highlight=False, soft_wrap=True)

    def evaluated(self, report: StepReport, held_out: HeldOut) -> None:
        """Print a held-out loss."""
        self.say(
            f"held out after {report.tokens:,} tokens: {held_out.nats_per_token:.4f} nats/token, {held_out.bits_per_byte:.4f} bits/byte"
        )

    def say(self, text: str) -> None:
        """Print one line above the bar."""
        self.console.print(text, highlight=False, soft_wrap=True)

    def _line(self, report: StepReport) -> str:
        before = self._before
        if before is not None and report.tokens > before.tokens:
            latest = (report.elapsed_s - before.elapsed_s) / (report.tokens - before.tokens)
            self._seconds_per_token = 0.95 * self._seconds_per_token + 0.05 * latest if self._seconds_per_token else latest
        self._loss = report.loss if before is None else 0.9 * self._loss + 0.1 * report.loss
        self._before = report
        rate = 1.0 / self._seconds_per_token if self._seconds_per_token else 0.0
        left_s = report.elapsed_s * (1.0 - report.progress) / report.progress if report.progress else 0.0
        minutes, seconds = divmod(round(left_s), 60)
        return f"step {report.step}  {report.tokens:,} tokens  loss {self._loss:.4f}  {rate:,.0f} tokens/s  {minutes}:{seconds:02d} left"


class Silent:
    """Shows nothing: the other processes of a group."""

    def __enter__(self) -> Silent:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def stepped(self, report: StepReport) -> None:
        """Nothing."""

    def evaluated(self, report: StepReport, held_out: HeldOut) -> None:
        """Nothing."""

    def say(self, text: str) -> None:
        """Nothing."""
