"""`deepseek-convert`: turn a model of one version line, or of a Hugging Face family, into one of another line.

It joins flags, the converter and the terminal; it knows no tensors. Invariant: a conversion that is refused, interrupted or killed leaves
nothing half-written, and whatever is wrong ends in one sentence and exit code 2.
"""

from __future__ import annotations

import sys
import time
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from service import __version__
from service.cli.ending import run_command
from service.config.attention import read_layers
from service.config.flags import FlagParser
from service.types.catalog import LINES, find_line
from service.types.errors import SettingsError
from service.types.model_spec import RopeScaling

if TYPE_CHECKING:
    from service.checkpoints.convert import Report, Wanted

PROGRAM = "deepseek-convert"
DESCRIPTION = (
    "Turn a model of one version line, or a Hugging Face directory, into a model of another line. What is added changes nothing that the "
    "model computes; what would be lost is named and needs --lossy."
)
_SCALINGS = {"none": RopeScaling.DEFAULT, **{kind.value: kind for kind in (RopeScaling.LINEAR, RopeScaling.DYNAMIC, RopeScaling.YARN)}}
_LINE_S = 2.0


def convert_parser() -> FlagParser:
    """The flags of `deepseek-convert`."""
    parser = FlagParser(PROGRAM, DESCRIPTION, __version__)
    models = parser.add_argument_group("Models")
    models.add_argument(
        "--input_model", metavar="PATH", default="", help="directory, or .safetensors, .bin, .pt or .pth file, of the model to convert"
    )
    models.add_argument(
        "--output_model", metavar="PATH", default="", help="directory to write, or one file when the name ends in .pt, .bin or .pth"
    )
    lines = ", ".join(line.number for line in LINES)
    models.add_argument("--target_version", metavar="VERSION", default="", help=f"line of the output ({lines}), or a patch of one")
    models.add_argument("--config", metavar="FILE", default="", help="config.yaml or config.json of an input that has none beside it")
    models.add_argument("--overwrite", action="store_true", help="replace an output that exists")
    change = parser.add_argument_group("Changes")
    change.add_argument(
        "--dtype", choices=("keep", "float32", "bfloat16", "float16"), default="keep", help="type of the weights (default %(default)s)"
    )
    change.add_argument("--max_position_embeddings", metavar="N", type=int, default=0, help="longest context in tokens; 0 keeps it")
    change.add_argument(
        "--rope_scaling", choices=tuple(_SCALINGS), default="", help="how positions reach a longer context; none leaves them to be tuned"
    )
    change.add_argument(
        "--dense_layers",
        metavar="N,N",
        action="append",
        default=None,
        help="layers of a v5.2 that read everything, such as 0,1, or none; the input's own when left out",
    )
    change.add_argument("--lossy", action="store_true", help="convert although something is lost")
    return parser


def main() -> int:
    """Run the command; returns its exit code."""
    return run_command(PROGRAM, _convert, sys.argv[1:])


def _convert(arguments: Sequence[str]) -> int:
    given = Namespace(**convert_parser().read(arguments))
    _check(given)
    wanted = _wanted(given)
    from service.checkpoints.convert import convert

    began_s = time.perf_counter()
    try:
        with _progress(Path(given.output_model).name) as moved:
            config = Path(given.config) if given.config else None
            report = convert(Path(given.input_model), Path(given.output_model), wanted, config, moved)
    except OSError as error:
        raise SettingsError(f"{error.filename or given.output_model} cannot be read or written: {error.strerror}.") from error
    print("\n".join(_lines(report, time.perf_counter() - began_s)))
    return 0


def _check(given: Namespace) -> None:
    for name in ("input_model", "output_model", "target_version"):
        if not getattr(given, name):
            raise SettingsError(f"--{name} is missing; see {PROGRAM} --help.")
    if find_line(given.target_version) is None:
        lines = ", ".join(line.number for line in LINES)
        raise SettingsError(f"--target_version {given.target_version[:40]!r} is no version line: choose one of {lines}, or a patch of one.")
    if given.config and not Path(given.config).is_file():
        raise SettingsError(f"--config {given.config} is not a file.")
    if given.config and Path(given.config).suffix not in (".yaml", ".yml", ".json"):
        raise SettingsError(f"--config {given.config} must be a .yaml file of ours or a config.json.")
    output = Path(given.output_model)
    if output.exists() and not given.overwrite:
        raise SettingsError(f"--output_model {output} exists: name another, or give --overwrite to replace it.")
    if output.absolute() == Path(given.input_model).absolute():
        raise SettingsError("--output_model is the input: name another place.")
    if not 0 <= given.max_position_embeddings < 1 << 31:
        raise SettingsError("--max_position_embeddings must be a number of tokens.")


def _wanted(given: Namespace) -> Wanted:
    from service.checkpoints.convert import Wanted
    from service.checkpoints.convert_plan import Stretch

    if given.rope_scaling and not given.max_position_embeddings:
        raise SettingsError("--rope_scaling is for a longer context: name it with --max_position_embeddings.")
    stretch = Stretch(given.max_position_embeddings, _SCALINGS.get(given.rope_scaling))
    dtype, dense_layers = "" if given.dtype == "keep" else given.dtype, read_layers(given.dense_layers)
    return Wanted(given.target_version, stretch, dtype, given.lossy, dense_layers)


@contextmanager
def _progress(name: str) -> Iterator[Callable[[int, int], None]]:
    """A bar on a terminal, else a line every few seconds; both on stderr."""
    if sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeElapsedColumn, TransferSpeedColumn

        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            DownloadColumn(binary_units=True),
            TransferSpeedColumn(),
            TimeElapsedColumn(),
        )
        with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task(f"writing {name}", total=None)
            yield lambda done, total: bar.update(task, completed=done, total=total)
        return
    said_s = time.monotonic()

    def say(done: int, total: int) -> None:
        nonlocal said_s
        if time.monotonic() - said_s >= _LINE_S:
            said_s = time.monotonic()
            print(f"writing {name}: {done / max(total, 1):.0%}", file=sys.stderr, flush=True)

    yield say


def _lines(report: Report, seconds: float) -> Iterator[str]:
    source, plan = report.source, report.plan
    before = f"v{source.spec.line}" if source.spec.line else source.spec.family
    yield f"{source.name} ({before}) -> {report.output} (v{report.version})"
    yield f"  parameters   {plan.target.parameters:,} (were {plan.source.parameters:,})"
    yield f"  context      {plan.target.context_tokens} tokens"
    yield f"  weights      {report.bytes_written:,} bytes in {seconds:.1f} s"
    for title, words in (("added", report.added), ("left out", report.left_out), ("lost", report.losses), ("note", plan.notes)):
        for text in words:
            yield f"  {title:<12} {text}"
    if not report.losses:
        within = "" if plan.notes else ", and it computes what it did"
        yield f"  lost         nothing: every weight is kept exactly{within}"
    if report.digest:
        checked = "verified" if source.verified else "not covered by digests"
        yield f"  digest       {report.digest[:12]} (the input was {checked})"


if __name__ == "__main__":
    sys.exit(main())
