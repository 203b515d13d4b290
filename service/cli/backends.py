"""`deepseek-benchmark --backends`: torch beside an exported graph on the same checkpoint, and the table that `--backend auto` asks.

It does not know how either computes. Invariants: both sides generate for the same prompts in alternating rounds of one run; a table keeps
one entry for each size, kind of weights and batch, the newest.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from service.checkpoints.bundled import bundled_directory, complete_lines
from service.checkpoints.manifest import read_manifest
from service.checkpoints.onnx_support import unsupported
from service.checkpoints.stage import staged_file
from service.cli.local_engine import LocalEngine, Round, random_prompts, spread
from service.engine.backend_choice import Measured, read_table
from service.types.errors import SettingsError
from service.types.settings import EngineSettings, SchedulerSettings

BATCHES = (1, 8, 32)
KINDS = ("none", "int8", "int4")


async def measure_backends(directory: Path, kinds: tuple[str, ...], threads: int, rounds: int, asked: tuple[int, int]) -> dict[str, Any]:
    """The row: for each of `kinds` and BATCHES the output tokens a second of both engines and their ratio, with what a table keeps.

    `asked` are the tokens of each prompt and of each answer. Raises StartupError.
    """
    spec = read_manifest(directory).spec
    if gap := next(filter(None, (unsupported(spec, kind) for kind in kinds)), ""):
        raise SettingsError(f"--backends cannot measure {directory.name}: the ONNX graph does not support {gap}; name another --directory.")
    prompt_tokens, output_tokens = asked
    measured: list[Measured] = []
    forms: dict[str, Any] = {}
    for kind in kinds:
        settings = EngineSettings(device="cpu", quantize=kind, threads=threads, context_tokens=prompt_tokens + output_tokens + 1)
        async with AsyncExitStack() as stack:
            engines = {}
            for backend in ("torch", "onnx"):
                engine = LocalEngine(directory, replace(settings, backend=backend), SchedulerSettings(batch_size=max(BATCHES)))
                engines[backend] = await stack.enter_async_context(engine)
            forms[kind] = {"dtypes": {name: engine.info.dtype for name, engine in engines.items()}, "batches": {}}
            for batch in BATCHES:
                sides = await _sides(engines, batch, rounds, asked)
                torch, onnx = ([round(entry.output, 3) for entry in sides[name]] for name in ("torch", "onnx"))
                ratio = spread([mine / theirs for mine, theirs in zip(onnx, torch, strict=True)])
                forms[kind]["batches"][str(batch)] = {"torch": spread(torch), "onnx": spread(onnx), "ratio": ratio}
                measured.append(
                    Measured(spec.parameters, kind, batch, spread(torch)["median"], spread(onnx)["median"], spec.vision is not None)
                )
    entries = [asdict(entry) for entry in measured]
    return {"kind": "backends", "prompt_tokens": prompt_tokens, "output_tokens": output_tokens, "forms": forms, "measured": entries}


def newest_computed(kinds: Sequence[str]) -> Path:
    """The directory of the newest bundled line that the graph computes in all `kinds` of weights. Raises SettingsError."""
    for line in reversed(complete_lines()):
        spec = read_manifest(bundled_directory(line)).spec
        if not any(unsupported(spec, kind) for kind in kinds):
            return bundled_directory(line)
    raise SettingsError("no bundled model is there that the ONNX graph computes: name a checkpoint with --directory.")


def kept_table(path: Path) -> list[Measured]:
    """What the table at `path` holds, nothing where there is none yet. Raises SettingsError for another file."""
    return read_table(str(path), "--keep_table") if path.exists() else []


def keep_table(path: Path, row: dict[str, Any]) -> None:
    """Enter what a row measured into the table at `path`, with where it was measured. Raises SettingsError."""
    new = [Measured(**entry) for entry in row["measured"]]
    known = kept_table(path)
    entries = {(entry.parameters, entry.quantize, entry.batch, entry.images): entry for entry in (*known, *new)}
    about = {name: row[name] for name in ("date", "program", "cores", "directory") if name in row}
    table = {"newest": about, "measured": [asdict(entries[key]) for key in sorted(entries)]}
    try:
        with staged_file(path) as partial:
            partial.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise SettingsError(f"--keep_table {path} cannot be written: {error.strerror}.") from None


async def _sides(engines: dict[str, LocalEngine], batch: int, rounds: int, asked: tuple[int, int]) -> dict[str, list[Round]]:
    """The rounds of each engine, alternating, after one that warms up."""
    sides: dict[str, list[Round]] = {name: [] for name in engines}
    for number in range(rounds + 1):
        prompts = random_prompts(batch, asked[0], engines["torch"].info.vocab_size, number)
        for name, engine in engines.items():
            sides[name].append(await engine.generate(prompts, asked[1]))
    return {name: entries[1:] for name, entries in sides.items()}
