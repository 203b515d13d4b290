"""`deepseek-benchmark --quality far --directory DIR`: what far blocks cost in answers, against full attention of the same model.

Two workers one after the other, driven without HTTP: the model with full attention, and as it would be served. Both answer the same prompts
(needles, traced variables, counts) and score the same text; last, the softmax mass of full attention in the blocks that are read is summed
over that text. It does not know how attention is computed. Invariant: both sides get equal
prompts and greedy sampling, and the row says how many far blocks were read, so that a comparison of nothing with nothing shows.
"""

from __future__ import annotations

import asyncio
import math
import random
import sysconfig
from argparse import Namespace
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from service.checkpoints.long_context import STORES, adapt
from service.checkpoints.manifest import Manifest, read_manifest
from service.cli.server_load import surroundings
from service.config.attention import read_attention
from service.config.bundled import bundled_source, named_directory, registry_path
from service.config.flags import FlagParser
from service.engine.supervisor import WorkerBackend
from service.inputs.recall_tasks import TASKS, RecallCase, Task
from service.inputs.tokens import TokenCodec
from service.schedulers.router import Model, Router
from service.telemetry import Telemetry
from service.types.errors import SettingsError
from service.types.plan import LoadRequest
from service.types.request import FinishEvent, GenerationRequest, PromptEvent, Sampling, Stop, TokenEvent
from service.types.settings import AttentionSettings, EngineSettings, SchedulerSettings

# What a task's cases are called in the row.
KINDS: dict[str, Task] = dict(zip(("needle", "multi_key", "tracing", "aggregation"), TASKS, strict=True))
DEPTHS = 10
ANSWER_TOKENS = 16
SCORED_TOKENS = 2048
# A layer that reads less of full attention's mass is proposed to stay dense, of every so many layers at most one.
DENSE_BELOW, LAYERS_OF_ONE_DENSE = 0.95, 4
_GIVEN = ("attention_window", "far_blocks", "far_refresh", "kv_far", "prefill", "max_position_embeddings", "rope_scaling")
# All flags of this comparison alone.
FAR_FLAGS = (*_GIVEN, "dense_layers", "quality_tokens", "quality_cases", "quality_tasks")


def add_far_quality_flags(parser: FlagParser, count: Callable[[str], int]) -> None:
    """The flags of a comparison with full attention; `count` reads a number from 1 up."""
    plain = AttentionSettings()
    group = parser.add_argument_group("Far blocks (--quality far)")
    group.add_argument("--quality_tokens", metavar="N", type=count, default=0, help="length of prompts; the model's context when left out")
    group.add_argument("--quality_cases", metavar="N", type=count, default=20, help="cases for each task and depth (default %(default)s)")
    group.add_argument("--quality_tasks", nargs="+", choices=tuple(KINDS), default=list(KINDS), help="which questions are asked (all)")
    group.add_argument("--attention_window", metavar="N", default=plain.attention_window, help="as of deepseek-serve")
    group.add_argument("--far_blocks", metavar="N", default=plain.far_blocks, help="as of deepseek-serve")
    group.add_argument("--far_refresh", metavar="N", default=plain.far_refresh, help="as of deepseek-serve")
    group.add_argument("--kv_far", choices=("auto", *STORES), default=plain.kv_far, help="as of deepseek-serve")
    group.add_argument("--prefill", choices=("sparse", "dense"), default=plain.prefill, help="as of deepseek-serve")
    group.add_argument("--dense_layers", metavar="N,N", action="append", default=None, help="as of deepseek-serve; repeatable")
    group.add_argument("--max_position_embeddings", metavar="N", default=0, help="as of deepseek-serve")
    group.add_argument("--rope_scaling", choices=("auto", "keep", "linear", "dynamic", "yarn"), default="auto", help="as of deepseek-serve")


async def measure_far_quality(given: Namespace) -> dict[str, Any]:
    """Both sides; the row. Raises SettingsError or CheckpointError."""
    directory = given.directory or bundled_source("").directory
    manifest = read_manifest(named_directory(directory, registry_path(""), "--directory"))
    asked = read_attention({name: getattr(given, name) for name in _GIVEN}, given.dense_layers)
    served = adapt(manifest.spec, asked)
    if not any(layer.attention.far for layer in served.layers):
        raise SettingsError("--quality compares far blocks with full attention, and this model has none: set --attention_window.")
    tokens = given.quality_tokens or served.context_tokens
    if not 256 <= tokens <= served.context_tokens:
        raise SettingsError(f"--quality_tokens {tokens} must lie between 256 and the model's {served.context_tokens}.")
    codec = TokenCodec.load(manifest.directory)
    lines = library_lines()
    cases = make_cases(codec, lines, tokens, given.quality_cases, [KINDS[kind] for kind in dict.fromkeys(given.quality_tasks)])
    text = scored_text(codec, lines, tokens)
    # A window that covers the context is full attention, computed exactly as such.
    full = replace(asked, attention_window=max(served.context_tokens, 64), far_blocks=0, far_refresh=0, kv_far="auto", prefill="sparse")
    sides = {"full": full, "served": asked}
    found = {name: await _answers(manifest, codec, side, cases, text) for name, side in sides.items()}
    mass = await asyncio.to_thread(_mass, manifest.directory, asked, text)
    row = {"what": "quality", "model": manifest.digest[:12], "tokens": tokens, "asked": asdict(asked)}
    row |= surroundings(given.label) | found["served"]["types"]
    dense = propose_dense(mass["read_by_layer"], len(served.layers))
    return {**row, **summary(cases, found), "attention_mass": mass, "dense_layers": dense}


def _mass(directory: Path, asked: AttentionSettings, text: Sequence[int]) -> dict[str, Any]:
    # Only this part of the command computes by itself: the others should not wait for torch.
    from service.engine.attention_mass import measure_mass

    return measure_mass(directory, asked, text)


def propose_dense(read_by_layer: dict[str, float], layers: int) -> dict[str, Any]:
    """Which of a model's `layers` should read everything: those that read least, as `--dense_layers` takes them; None where none chose."""
    most = layers // LAYERS_OF_ONE_DENSE
    lowest = sorted((read, int(layer)) for layer, read in read_by_layer.items() if read < DENSE_BELOW)[:most]
    listed = ",".join(str(layer) for layer in sorted(layer for _, layer in lowest)) or "none"
    return {"below": DENSE_BELOW, "most": most, "proposed": listed if read_by_layer else None}


def library_lines() -> list[str]:
    """Lines of the standard library's sources, in one fixed order."""
    root = Path(sysconfig.get_path("stdlib"))
    files = sorted(root.glob("*.py"))
    return [line for file in files for line in file.read_text("utf-8", errors="ignore").splitlines() if line.strip()]


def make_cases(codec: TokenCodec, lines: Sequence[str], tokens: int, each: int, tasks: Sequence[Task] = TASKS) -> list[RecallCase]:
    """`each` cases for every one of the tasks and each of `DEPTHS` depths, as near to `tokens` long as whole lines allow."""
    cases = []
    for task in tasks:
        for step in range(DEPTHS):
            for number in range(each):
                start = random.Random(f"{task.__name__} {step} {number}").randrange(len(lines))
                rotated = [*lines[start:], *lines[:start]]
                cases.append(_longest(codec, task, rotated, (step / DEPTHS, number), tokens - ANSWER_TOKENS))
    return cases


def _longest(codec: TokenCodec, task: Task, lines: Sequence[str], place: tuple[float, int], tokens: int) -> RecallCase:
    """The case with as many of the `lines` as fit into `tokens`."""
    count = min(len(lines), tokens // 4)
    while count > 0:
        case = task(lines[:count], *place)
        length = len(codec.encode(case.prompt))
        if length <= tokens:
            return case
        count = min(count - 1, int(count * tokens / length))
    raise SettingsError(f"--quality_tokens {tokens + ANSWER_TOKENS} are too few for this model's tokenizer: the facts alone take more.")


def scored_text(codec: TokenCodec, lines: Sequence[str], tokens: int) -> list[int]:
    """`tokens` tokens of the library's text, from its middle."""
    found: list[int] = []
    start = len(lines) // 2
    while len(found) < tokens:
        found += codec.encode("\n".join(lines[start : start + 200]) + "\n", add_special=not found)
        start += 200
    return found[:tokens]


async def _answers(
    manifest: Manifest, codec: TokenCodec, attention: AttentionSettings, cases: Sequence[RecallCase], text: Sequence[int]
) -> dict[str, Any]:
    """What one side makes of it: answers in the order of `cases`, log-probs of the text's last tokens, far blocks read, seconds,
    and the types in which it computed and kept keys and values."""
    spec = adapt(manifest.spec, attention)
    load = LoadRequest(str(manifest.directory.absolute()), max_rows=4, attention=attention, context_tokens=spec.context_tokens)
    telemetry = Telemetry()
    settings = SchedulerSettings(batch_size=4, queue_requests=1 << 20, queue_tokens=1 << 40, request_deadline_s=1e6, stream_events=1 << 16)
    backend = WorkerBackend(load, EngineSettings(step_deadline_s=600.0))
    router = Router([Model("quality", replace(manifest, spec=spec), codec, backend)], settings, telemetry)
    await router.start()
    try:
        began = asyncio.get_running_loop().time()
        answers = await asyncio.gather(*(_answer(router, codec.encode(case.prompt)) for case in cases))
        scores = await _scores(router, text)
        seconds = asyncio.get_running_loop().time() - began
        info = router.versions()[0].info
    finally:
        await router.close()
    read = sum(
        sample.value for family in telemetry.snapshot().collect() for sample in family.samples if "far_blocks_read_total" in sample.name
    )
    types = {} if info is None else {"dtype": info.dtype, "kv_cache_dtype": info.kv_cache_dtype or info.dtype}
    return {"answers": answers, "scores": scores[-SCORED_TOKENS:], "far_blocks_read": read, "seconds": seconds, "types": types}


async def _answer(router: Router, prompt: Sequence[int]) -> str:
    request = GenerationRequest(
        "quality", "quality", tuple(prompt), Stop(max_tokens=ANSWER_TOKENS, strings=("\n",)), Sampling(temperature=0.0)
    )
    parts: list[str] = []
    async for event in router.submit([request])[0]:
        if isinstance(event, TokenEvent):
            parts.append(event.text)
        elif isinstance(event, FinishEvent) and event.error is not None:
            raise event.error
    return "".join(parts)


async def _scores(router: Router, text: Sequence[int]) -> list[float]:
    request = GenerationRequest(
        "quality", "quality", tuple(text[:-1]), Stop(max_tokens=1, ignore_eos=True), Sampling(temperature=0.0), prompt_logprobs=0
    )
    scores: list[float] = []
    async for event in router.submit([request])[0]:
        if isinstance(event, PromptEvent):
            scores += [entry.logprob for entry in event.logprobs]
        elif isinstance(event, FinishEvent) and event.error is not None:
            raise event.error
    return scores


def summary(cases: Sequence[RecallCase], found: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Right answers by task and depth, perplexities of the text's last tokens, and how far the served side is from the full one."""
    kinds = dict.fromkeys(case.kind for case in cases)
    perplexity = {side: math.exp(-sum(made["scores"]) / len(made["scores"])) for side, made in found.items()}
    change = perplexity["served"] / perplexity["full"] - 1
    return {
        "tasks": {kind: _task(kind, cases, found) for kind in kinds},
        "perplexity": {**perplexity, "change": change, "tokens": len(found["full"]["scores"])},
        "far_blocks_read": {side: made["far_blocks_read"] for side, made in found.items()},
        "seconds": {side: round(made["seconds"], 1) for side, made in found.items()},
    }


def _task(kind: str, cases: Sequence[RecallCase], found: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Shares of right answers of one task: all, by depth, and of how many cases both sides say the same."""
    places = [index for index, case in enumerate(cases) if case.kind == kind]
    right = {
        side: {index: made["answers"][index].strip().startswith(cases[index].answer) for index in places} for side, made in found.items()
    }
    share = {side: _mean(marks.values()) for side, marks in right.items()}
    depths = sorted({cases[index].depth for index in places})
    return {
        "cases": len(places),
        **share,
        "over_full": round(share["served"] / share["full"], 4) if share["full"] else None,
        "same_answers": _mean(found["full"]["answers"][index] == found["served"]["answers"][index] for index in places),
        "depths": depths,
        **{
            f"{side}_by_depth": [_mean(mark for index, mark in marks.items() if cases[index].depth == depth) for depth in depths]
            for side, marks in right.items()
        },
    }


def _mean(marks: Iterable[bool]) -> float:
    found = list(marks)
    return round(sum(found) / len(found), 4)


def print_far_quality(row: dict[str, Any]) -> None:
    """The row as a few lines."""
    for kind, task in row["tasks"].items():
        shares = f"full {task['full']:.3f}  served {task['served']:.3f}  same answers {task['same_answers']:.3f}"
        print(f"{kind:12} {shares}  ({task['cases']} cases)")
    text = row["perplexity"]
    values = f"full {text['full']:.3f}  served {text['served']:.3f}  change {text['change']:+.2%}"
    print(f"perplexity   {values}  (last {text['tokens']} tokens)")
    mass = row["attention_mass"]
    if mass["rows"]:
        values = f"read {mass['read']:.3f}  best possible {mass['best_possible']:.3f}  without far {mass['without_far']:.3f}"
        print(f"mass         {values}  ({mass['rows']} positions that choose)")
    dense = row["dense_layers"]
    if dense["proposed"] is None:
        print("dense layers not known: every position reads all far blocks; measure more --quality_tokens")
        return
    print(
        f"dense layers --dense_layers {dense['proposed']}  (read below {dense['below']} of the mass, at most {dense['most']}, lowest first)"
    )
