"""`deepseek-train`: run a recipe and publish the checkpoint it makes.

It joins flags, the training room and the terminal; it knows no mathematics. Invariant: whatever is wrong with flags, recipe, state or
directories ends in one sentence and exit code 2; an interrupted run leaves a state file to resume and exit code 130.
"""

from __future__ import annotations

import math
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from service import __version__
from service.cli.ending import INTERRUPTED, run_command
from service.config.bundled import bundled_source
from service.config.flags import FlagParser, canonical
from service.config.launch import read_launch
from service.types.catalog import find_line
from service.types.errors import SettingsError

if TYPE_CHECKING:
    from service.train.display import Display, Silent
    from service.train.loop import Trainer
    from service.train.prepare import PreparedRun
    from service.train.source import Source

STATE_FILE = "state.pt"


@dataclass(frozen=True, slots=True)
class TrainFlags:
    """The command's flags. `steps` or `minutes` above 0 replace the recipe's budget; `threads` 0 leaves the choice to torch.

    `teacher` (for recipes that distil) and `init` are directories or names of bundled lines.
    """

    recipe: str
    out: Path
    results: Path | None
    resume: bool
    steps: int
    minutes: float
    threads: int
    device: str
    dtype: str
    teacher: str
    init: str


def build_parser() -> FlagParser:
    """The command's flags and their help."""
    from service.train.recipe import recipe_names

    parser = FlagParser("deepseek-train", "Train a model by a recipe and publish it as a checkpoint directory.", __version__)
    run = parser.add_argument_group("Run")
    run.add_argument("--recipe", default="", metavar="NAME", help=f"a committed recipe ({', '.join(recipe_names())}) or a .yaml file")
    run.add_argument(
        "--out", default="", metavar="DIR", help="directory of the run; the checkpoint is published in DIR/checkpoint (./NAME)"
    )
    run.add_argument("--resume", action="store_true", help="go on from the state in --out")
    run.add_argument("--steps", type=int, default=0, metavar="N", help="budget in optimiser steps instead of the recipe's")
    run.add_argument("--minutes", type=float, default=0.0, metavar="M", help="budget in minutes of wall clock instead of the recipe's")
    run.add_argument("--results", default="", metavar="FILE", help="append the run's JSON row to FILE")
    run.add_argument(
        "--teacher",
        default="",
        metavar="DIR",
        help="the model to learn from: a directory, or the name of a bundled line (recipes that distil)",
    )
    run.add_argument(
        "--init", default="", metavar="DIR", help="the model to train on, with its tokenizer: a directory, or the name of a bundled line"
    )
    machine = parser.add_argument_group("Machine")
    machine.add_argument("--threads", type=int, default=0, metavar="N", help="CPU threads; 0 is all cores")
    machine.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"), help="where to train (auto)")
    machine.add_argument(
        "--dtype", default="", choices=("auto", "float32", "bfloat16", "float16"), help="compute type instead of the recipe's"
    )
    return parser


def read_flags(arguments: Sequence[str]) -> TrainFlags:
    """Parse and check. Raises SettingsError."""
    given = build_parser().parse_args([canonical(argument) for argument in arguments])
    if not given.recipe:
        raise SettingsError("Say which recipe to run with --recipe NAME; see deepseek-train --help.")
    for name in ("steps", "minutes", "threads"):
        if not 0 <= getattr(given, name) < math.inf:
            raise SettingsError(f"--{name} must be a number from 0 on.")
    if given.steps and given.minutes:
        raise SettingsError("Give --steps or --minutes, not both.")
    out = Path(given.out or Path(given.recipe).name.removesuffix(".yaml").removesuffix(".yml"))
    results = Path(given.results) if given.results else None
    return TrainFlags(
        recipe=given.recipe,
        out=out,
        results=results,
        resume=given.resume,
        steps=given.steps,
        minutes=given.minutes,
        threads=given.threads,
        device=given.device,
        dtype=given.dtype,
        teacher=given.teacher,
        init=given.init,
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point: 0 when published, 2 when refused, 130 when interrupted."""
    return run_command("deepseek-train", lambda given: run(read_flags(given)), sys.argv[1:] if arguments is None else arguments)


def run(flags: TrainFlags) -> int:
    """Prepare, train, measure, publish. Of a group of processes rank 0 alone shows, measures and publishes."""
    from service.train.recipe import load_recipe

    recipe = load_recipe(flags.recipe)
    if flags.steps or flags.minutes:
        recipe = replace(recipe, schedule=replace(recipe.schedule, steps=flags.steps, minutes=flags.minutes))
    if flags.dtype:
        recipe = replace(recipe, dtype=flags.dtype)
    launch = read_launch()
    state_file = _claim(flags, leads=launch is None or launch.rank == 0)
    from service.train.display import Display, Silent
    from service.train.prepare import prepare
    from service.train.start import start

    with Display() if launch is None or launch.rank == 0 else Silent() as display:
        display.say(f"recipe {recipe.name}: reading the corpus and learning the tokenizer")
        prepared = prepare(recipe, teacher=_source(flags.teacher), init=_source(flags.init))
        trainer = start(prepared, flags.device, flags.threads, launch)
        return _run(flags, trainer, prepared, display, state_file)


def _run(flags: TrainFlags, trainer: Trainer, prepared: PreparedRun, display: Display | Silent, state_file: Path) -> int:
    from service.train.run import conclude, train

    if flags.resume:
        trainer.resume(state_file)
    display.say(
        f"{prepared.spec.parameters:,} parameters, {len(prepared.train):,} training tokens, {len(prepared.held_out):,} held out, "
        f"compute {str(trainer.dtype).removeprefix('torch.')} on {trainer.group.size} x {trainer.device.type}, step {trainer.state.step}"
    )
    finished = train(trainer, prepared, state_file, display, _stop_on_signals())
    trainer.group.close()
    if not finished:
        sources = "".join(f" --{name} {value}" for name, value in (("teacher", flags.teacher), ("init", flags.init)) if value)
        display.say(f"interrupted; go on with: deepseek-train --recipe {flags.recipe} --out {flags.out}{sources} --resume")
        return INTERRUPTED
    if not trainer.group.leads:
        return 0
    display.say("measuring on the held-out text")
    from service.train.publish import publish

    sys.stdout.write(publish(trainer, prepared, conclude(trainer, prepared), flags.out, flags.results) + "\n")
    return 0


def _source(name: str) -> Source | None:
    """The checkpoint in a directory, or the bundled model of a line. Raises SettingsError and CheckpointError."""
    if not name:
        return None
    from service.train.source import read_source

    return read_source(Path(bundled_source(name).directory if find_line(name) else name))


def _claim(flags: TrainFlags, leads: bool) -> Path:
    """The state file of the run's directory, which must be free, or hold a state when resuming; what will be written can be.

    Only rank 0 of a group looks: it is the one that writes.
    """
    state_file = flags.out / STATE_FILE
    if not leads:
        return state_file
    if flags.resume and not state_file.is_file():
        raise SettingsError(f"There is nothing to resume: {state_file} does not exist.")
    if not flags.resume and flags.out.exists() and (not flags.out.is_dir() or any(flags.out.iterdir())):
        raise SettingsError(f"{flags.out} is not empty; give another --out, or --resume to go on with that run.")
    try:
        flags.out.mkdir(parents=True, exist_ok=True)
        if flags.results is not None:
            flags.results.parent.mkdir(parents=True, exist_ok=True)
            flags.results.open("a").close()
    except OSError as error:
        raise SettingsError(f"{error.filename} cannot be written: {error.strerror}.") from None
    return state_file


class _Stop:
    """Becomes true when the process is asked to end; a second request ends it at once."""

    def __init__(self) -> None:
        self.asked = False

    def __call__(self) -> bool:
        return self.asked

    def ask(self, number: int, _frame: FrameType | None) -> None:
        """Note the request and give the signal its usual meaning again."""
        self.asked = True
        signal.signal(number, signal.SIG_DFL)


def _stop_on_signals() -> _Stop:
    stop = _Stop()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop.ask)
    return stop


if __name__ == "__main__":
    sys.exit(main())
