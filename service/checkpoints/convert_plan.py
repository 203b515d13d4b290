"""What a conversion changes, decided from two specs alone: parameters copied, filled in or left out, and what a reader of the model loses.

It does not know values or files, and needs no torch. Invariants: what is filled in leaves the function as it was; a difference between the
specs that this file does not understand is refused, so that a new kind of layer is never converted by accident.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import NamedTuple

from service.checkpoints.own_format import shape_of
from service.checkpoints.pieces import parameter_shapes
from service.types.catalog import Shape, VersionLine
from service.types.errors import CheckpointError
from service.types.model_spec import GroupedQueryAttention, ModelSpec, RopeScaling, RopeSpec

# sigmoid(32) is 1 in float32 and in every narrower type, and 32 is a number of each of them.
OPEN_GATE = 32.0


class Neutral(NamedTuple):
    """Parameters that change nothing while they hold `value`; `what` names them in a report."""

    pattern: re.Pattern[str]
    value: float
    what: str


# What layers that share weights have in common; their norms are their own.
SHARED_PARTS = ("attention.", "mlp.")
NEUTRALS = (
    Neutral(re.compile(r"layers\.\d+\.attention\.gate\.weight"), 0.0, "head gates, open"),
    Neutral(re.compile(r"layers\.\d+\.attention\.gate\.bias"), OPEN_GATE, "head gates, open"),
)


@dataclass(frozen=True, slots=True)
class Stretch:
    """Another context: `tokens` of it (0: as it is), reached by `scaling` of the rotation (None: the rotation stays)."""

    tokens: int = 0
    scaling: RopeScaling | None = None


@dataclass(frozen=True, slots=True)
class ConversionPlan:
    """From `source` to `target`. `losses` need the user's consent, `notes` do not.

    `copied` names the source's parameter for each of the target's; `filled` and `dropped` are parameters of the target and of the source.
    """

    source: ModelSpec
    target: ModelSpec
    copied: Mapping[str, str]
    filled: Mapping[str, Neutral]
    dropped: tuple[str, ...]
    losses: tuple[str, ...]
    notes: tuple[str, ...]


def plan_conversion(
    source: ModelSpec,
    line: VersionLine,
    stretch: Stretch = Stretch(),
    equal_layers: int = 1,
    dense_layers: tuple[int, ...] | None = None,
) -> ConversionPlan:
    """How a model becomes one of `line`. Raises CheckpointError when it cannot, whatever the user consents to.

    `equal_layers` > 1: so many consecutive layers have equal weights, which a line that shares them stores once. `dense_layers` read
    everything in a line with far blocks; None keeps the source's own.
    """
    sizes = shape_of(source)
    if dense_layers is not None:
        _require_dense(line, dense_layers, sizes.layers)
        sizes = replace(sizes, dense_layers=tuple(sorted(set(dense_layers))))
    target = _stretched(source, sizes, line, stretch, equal_layers)
    losses, notes = _differences(source, target)
    if line.reads_images and target.vision is None:
        notes.append("the model reads text only: it has no patch encoder")
    before, after = parameter_shapes(source), parameter_shapes(target)
    copied: dict[str, str] = {}
    filled: dict[str, Neutral] = {}
    for name, shape in after.items():
        origin, neutral = _owned(source, name), neutral_of(name)
        if origin in before:
            if before[origin] != shape:
                raise CheckpointError(f"{name} is {list(before[origin])} and {line.label} has {list(shape)}: the two cannot be converted.")
            copied[name] = origin
        elif neutral is not None:
            filled[name] = neutral
        else:
            raise CheckpointError(f"{line.label} needs {name}, which this model lacks and nothing neutral can stand for.")
    used = set(copied.values())
    dropped = tuple(name for name in before if name not in used and _owned(target, name) not in copied)
    return ConversionPlan(source, target, copied, filled, dropped, tuple(losses), tuple(notes))


def _owned(spec: ModelSpec, name: str) -> str:
    """The parameter that stands for `name` where layers share their weights."""
    part, _, rest = name.partition(".")
    index, _, leaf = rest.partition(".")
    if part != "layers" or not leaf.startswith(SHARED_PARTS):
        return name
    return f"layers.{spec.owner(int(index))}.{leaf}"


def neutral_of(name: str) -> Neutral | None:
    """The neutral value of a parameter, if it has one."""
    return next((neutral for neutral in NEUTRALS if neutral.pattern.fullmatch(name)), None)


def _require_dense(line: VersionLine, dense_layers: tuple[int, ...], layers: int) -> None:
    """Raises CheckpointError for a list that a model of the line cannot have."""
    if line.far is None:
        raise CheckpointError(f"--dense_layers is for a line whose layers have a window, and every layer of {line.label} reads everything.")
    outside = [index for index in dense_layers if not 0 <= index < layers]
    if outside:
        raise CheckpointError(f"--dense_layers names layer {outside[0]}, and the model has the layers 0 … {layers - 1}.")
    if len(set(dense_layers)) == layers:
        raise CheckpointError("--dense_layers leaves no layer with a window: leave one out.")


def _stretched(source: ModelSpec, shape: Shape, line: VersionLine, stretch: Stretch, equal_layers: int) -> ModelSpec:
    """The spec of the line in that shape of the source, its context as asked."""
    context = stretch.tokens or source.context_tokens
    if source.sharing is None:
        shape = replace(shape, shared_layers=equal_layers)
    if stretch.scaling is not None and context <= source.context_tokens:
        raise CheckpointError(f"a scaled rotation is for a context longer than the model's {source.context_tokens} tokens.")
    if context > source.context_tokens and source.rope.scaling is not RopeScaling.DEFAULT:
        raise CheckpointError(
            f"the model's rotation is scaled already ({source.rope.scaling.value}): it reaches {source.context_tokens}, not {context}."
        )
    if stretch.scaling not in (None, RopeScaling.DEFAULT):
        rope = RopeSpec(
            theta=source.rope.theta,
            rotary_dim=source.rope.rotary_dim,
            scaling=stretch.scaling,
            factor=context / source.context_tokens,
            original_context=source.context_tokens,
        )
        shape = replace(shape, rope=rope)
    return line.spec(replace(shape, context_tokens=context), source.end_ids, source.bos_id, source.image_id)


def _differences(source: ModelSpec, target: ModelSpec) -> tuple[list[str], list[str]]:
    """What is lost and what merely differs, in words. Raises CheckpointError for a difference that has none."""
    losses: list[str] = []
    notes: list[str] = []
    old, new = source.context_tokens, target.context_tokens
    if new < old:
        losses.append(f"prompts of more than {new} tokens are refused; the context was {old}")
    elif new > old:
        notes.append(_longer(target.rope, old, new))
    if source.precision != target.precision:
        notes.append(f"served in {target.precision.compute}, as the line's policy says (was {source.precision.compute})")
    if source.sharing != target.sharing:
        words = "equal layers are stored once" if source.sharing is None else "weights that layers shared are stored for each of them"
        notes.append(f"{words}: {target.parameters:,} parameters instead of {source.parameters:,}")
    understood = {"family", "line", "layers", "rope", "context_tokens", "precision", "sharing"}
    if source.vision is not None and target.vision is None:
        losses.append("images are no longer read")
        understood |= {"vision", "fusion", "image_id"}
    for entry in fields(ModelSpec):
        if entry.name not in understood and getattr(source, entry.name) != getattr(target, entry.name):
            raise CheckpointError(f"{entry.name} is {getattr(source, entry.name)} here, which a model of the line cannot have.")
    keeps_far = any(layer.attention.far for layer in target.layers)
    for before, after in zip(source.layers, target.layers, strict=True):
        if before.mlp != after.mlp:
            raise CheckpointError("the layers' feed-forward parts differ from each other, which a model of the line cannot have.")
        _require_known_attention(before.attention, after.attention)
        lost, noted = _seen(before.attention, after.attention, min(old, new), keeps_far)
        losses += [text for text in lost if text not in losses]
        notes += [text for text in noted if text not in notes]
    return losses, notes


def _longer(rope: RopeSpec, old: int, new: int) -> str:
    if rope.scaling is RopeScaling.DEFAULT:
        return f"the context grows from {old} to {new} tokens over positions that were never trained: tune the model before relying on them"
    kept = "unchanged" if rope.scaling is RopeScaling.DYNAMIC else "changed too, as this scaling does"
    return f"the context grows from {old} to {new} tokens by {rope.scaling.value} scaling; answers within {old} tokens are {kept}"


def _require_known_attention(before: GroupedQueryAttention, after: GroupedQueryAttention) -> None:
    """A gate is a matter of parameters, `_seen` knows windows; any other difference is refused."""
    for entry in fields(GroupedQueryAttention):
        if entry.name not in ("gate", "window", "far") and getattr(before, entry.name) != getattr(after, entry.name):
            raise CheckpointError(
                f"an attention layer's {entry.name} is {getattr(before, entry.name)}, which a model of the line cannot have."
            )


def _seen(before: GroupedQueryAttention, after: GroupedQueryAttention, context: int, keeps_far: bool) -> tuple[list[str], list[str]]:
    """(losses, notes) of what a token sees. To see less by far blocks, a line's own way to long prompts, needs no consent, nor does
    seeing all in a layer while others keep far blocks: somebody named it."""
    was, now = _window(before, context), _window(after, context)
    if was == now and (was is None or before.far == after.far):
        return [], []
    if now is None and before.far is not None and keeps_far:
        return [], [f"layers named dense read everything where they read {_seen_words(before, was)}"]
    if was is None and after.far is not None:
        return [], [f"prompts of more than {now} tokens are read through a window of {now} and the best blocks behind it"]
    return [f"a token sees {_seen_words(after, now)} where it saw {_seen_words(before, was)}"], []


def _window(attention: GroupedQueryAttention, context: int) -> int | None:
    """The window, or None where it covers the context."""
    return None if attention.window is None or attention.window >= context else attention.window


def _seen_words(attention: GroupedQueryAttention, window: int | None) -> str:
    if window is None:
        return "all tokens before it"
    return f"{window} tokens" if attention.far is None else f"{window} tokens and the best blocks behind them ({attention.far.store.value})"
