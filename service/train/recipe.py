"""A recipe: everything that makes one checkpoint, read from YAML into frozen data.

It does not know tensors, files of the corpus or the clock. Invariant: every key of a recipe is a field here and is obeyed; unknown keys,
missing keys and wrong types are refused by their path.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import MISSING, dataclass, fields, is_dataclass
from importlib import resources
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

import yaml

from service.train.recipe_parts import (
    AveragePart,
    CorpusPart,
    DistilPart,
    EvaluatePart,
    OptimizerPart,
    PicturesPart,
    PublishPart,
    QuantisePart,
    SamplePart,
    SchedulePart,
    SegmentPart,
)
from service.types.errors import SettingsError


@dataclass(frozen=True, slots=True)
class Recipe:
    """One committed recipe. `line` and `shape` name the network in the catalog, `dtype` the compute type (auto: the line's policy).

    `compile`: fuse the step with torch.compile where the machine has a C++ compiler; results agree within rounding.
    `gradient_checkpointing`: layers are computed again in the backward pass instead of kept.
    """

    name: str
    line: str
    shape: str
    seed: int
    dtype: str
    compile: bool
    vocab_size: int
    checkpoint_minutes: float
    corpus: CorpusPart
    schedule: SchedulePart
    optimizer: OptimizerPart
    average: AveragePart
    evaluate: EvaluatePart
    samples: SamplePart
    publish: PublishPart
    gradient_checkpointing: bool = False
    segments: SegmentPart | None = None
    distil: DistilPart | None = None
    quantise: QuantisePart | None = None
    pictures: PicturesPart | None = None

    @property
    def content(self) -> dict[str, Any]:
        """What the recipe says, as plain values; what has its default is left out."""
        said: dict[str, Any] = _said(self)
        return said

    @property
    def digest(self) -> str:
        """SHA-256 of the recipe's content, 64 hex digits; a run can be resumed only under the same one."""
        return hashlib.sha256(json.dumps(self.content, sort_keys=True).encode()).hexdigest()


def _said(value: Any) -> Any:
    """A part as plain values, without what has its default: a key that recipes did not have before does not change their digests."""
    if isinstance(value, tuple):
        return [_said(item) for item in value]
    if not is_dataclass(value):
        return value
    told = ((field, getattr(value, field.name)) for field in fields(value))
    return {field.name: _said(item) for field, item in told if field.default is MISSING or item != field.default}


def recipe_names() -> list[str]:
    """Names of the committed recipes."""
    folder = resources.files("service.train") / "recipes"
    return sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def load_recipe(name: str) -> Recipe:
    """The committed recipe `name`, or the recipe file at that path. Raises SettingsError saying which key is wrong."""
    path = Path(name)
    if path.suffix in {".yaml", ".yml"}:
        try:
            text = path.read_text(encoding="utf-8")
        except OSError as error:
            raise SettingsError(f"The recipe file {path} cannot be read: {error.strerror}.") from None
    elif name in recipe_names():
        text = (resources.files("service.train") / "recipes" / f"{name}.yaml").read_text(encoding="utf-8")
    else:
        raise SettingsError(f"There is no recipe {name!r}; there are: {', '.join(recipe_names())}, or give the path of a .yaml file.")
    return parse_recipe(text)


def parse_recipe(text: str) -> Recipe:
    """A recipe from YAML text. Raises SettingsError."""
    try:
        content = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise SettingsError(f"The recipe is not valid YAML: {' '.join(str(error).split())}.") from None
    recipe: Recipe = _build(Recipe, content, "recipe")
    _check(recipe)
    return recipe


def _build(kind: Any, content: object, where: str) -> Any:
    if get_origin(kind) is UnionType:
        return None if content is None else _build(get_args(kind)[0], content, where)
    if is_dataclass(kind):
        return _build_part(kind, content, where)
    if get_origin(kind) is tuple:
        if not isinstance(content, list):
            raise SettingsError(f"{where} must be a list.")
        return tuple(_build(get_args(kind)[0], item, f"{where}[{index}]") for index, item in enumerate(content))
    if kind is float and isinstance(content, int) and not isinstance(content, bool):
        return float(content)
    if type(content) is not kind:
        raise SettingsError(f"{where} must be {kind.__name__}, not {content!r}.")
    return content


def _build_part(kind: Any, content: object, where: str) -> Any:
    if not isinstance(content, dict):
        raise SettingsError(f"{where} must be a mapping.")
    hints = get_type_hints(kind)
    unknown = sorted(str(key) for key in content if key not in hints)
    if unknown:
        raise SettingsError(f"{where} has unknown keys: {', '.join(unknown)}; it has: {', '.join(sorted(hints))}.")
    missing = sorted(field.name for field in fields(kind) if field.name not in content and field.default is MISSING)
    if missing:
        raise SettingsError(f"{where} lacks: {', '.join(missing)}.")
    return kind(**{name: _build(hints[name], value, f"{where}.{name}") for name, value in content.items()})


def _divides(plan: SchedulePart) -> bool:
    if not plan.lengths or min(plan.micro_tokens, plan.batch_tokens, *(phase.tokens for phase in plan.lengths)) <= 0:
        return False
    passes = [(phase.tokens, plan.pass_tokens(phase.tokens)) for phase in plan.lengths]
    return all(each % tokens == 0 and plan.batch_tokens % each == 0 for tokens, each in passes)


def _check_extras(recipe: Recipe) -> Iterator[tuple[bool, str]]:
    """(is wrong, sentence) for the parts that only some recipes have."""
    segments, distil, quantise = recipe.segments, recipe.distil, recipe.quantise
    if segments is not None:
        lengths = [phase.tokens for phase in recipe.schedule.lengths]
        divides = segments.tokens > 0 and all(length % segments.tokens == 0 or length < segments.tokens for length in lengths)
        yield not divides, "recipe.segments.tokens must divide every length that is longer"
        yield segments.memory_tokens < 0, "recipe.segments.memory_tokens must not be negative"
        yield distil is not None, "a recipe has segments or distil, not both"
    if distil is not None:
        shares = min(distil.kl, distil.mse) >= 0 and 0 < distil.kl + distil.mse <= 1
        yield not shares, "recipe.distil.kl and mse must not be negative, and their sum must be above 0 and at most 1"
        yield distil.temperature <= 0, "recipe.distil.temperature must be above 0"
    pictures, phases = recipe.pictures, recipe.schedule.lengths
    asked = {(phase.tokens, phase.pictures) for phase in phases}
    yield len(asked) != len({tokens for tokens, _ in asked}), "phases of one length in recipe.schedule must have the same pictures"
    yield any(not 0 <= (share or 0) <= 1 for _, share in asked), "pictures of a phase in recipe.schedule must be in [0, 1]"
    yield pictures is None and any(share is not None for _, share in asked), "a recipe whose phases have pictures needs pictures"
    if pictures is not None:
        wrong = pictures.tokens < 0 or (pictures.tokens and recipe.schedule.micro_tokens % pictures.tokens)
        yield bool(wrong), "recipe.pictures.tokens must divide micro_tokens"
        yield pictures.variants < 0, "recipe.pictures.variants must not be negative"
        yield not 0 < pictures.share <= 1, "recipe.pictures.share must be in (0, 1]"
        yield not 0 < pictures.weight <= 1000, "recipe.pictures.weight must be in (0, 1000]"
        yield segments is not None or distil is not None, "recipe.pictures goes with neither segments nor distil"
    if quantise is not None:
        yield not 0 <= quantise.start < 1, "recipe.quantise.start must be in [0, 1)"


def _check(recipe: Recipe) -> None:
    plan, corpus = recipe.schedule, recipe.corpus
    for wrong, sentence in (
        *_check_extras(recipe),
        (recipe.optimizer.kind not in {"muon", "adamw"}, "recipe.optimizer.kind must be muon or adamw"),
        (recipe.dtype not in {"auto", "float32", "bfloat16", "float16"}, "recipe.dtype must be auto, float32, bfloat16 or float16"),
        (recipe.publish.dtype not in {"float32", "bfloat16", "float16"}, "recipe.publish.dtype must be float32, bfloat16 or float16"),
        (plan.steps <= 0 and plan.minutes <= 0, "recipe.schedule needs steps or minutes above 0"),
        (
            not _divides(plan),
            "in recipe.schedule every length must divide or be a multiple of micro_tokens, and both must divide batch_tokens",
        ),
        (not 0 <= plan.decay_from < 1, "recipe.schedule.decay_from must be in [0, 1)"),
        (plan.warmup_steps < 0, "recipe.schedule.warmup_steps must not be negative"),
        (not 1 <= corpus.recall_fewest_lines <= corpus.recall_lines, "recipe.corpus.recall_fewest_lines must be in [1, recall_lines]"),
        (not 0 <= corpus.recall_at_end <= 1, "recipe.corpus.recall_at_end must be in [0, 1]"),
        (not 0 <= recipe.average.decay < 1, "recipe.average.decay must be in [0, 1)"),
        (not 0 <= recipe.average.init < 1, "recipe.average.init must be in [0, 1)"),
    ):
        if wrong:
            raise SettingsError(f"{sentence}.")
