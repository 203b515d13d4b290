"""config.yaml of this project's own checkpoints: a version line and a shape, read and written.

It does not know tensors or the other files. Invariant: `version` alone decides what kind of network it is, whatever else the file says,
and writing then reading gives an equal spec.
"""

from __future__ import annotations

from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import yaml

from service.checkpoints.fields import Fields, read_text
from service.types.catalog import LINES, Shape, find_line
from service.types.errors import CheckpointError
from service.types.model_spec import ModelSpec

CONFIG = "config.yaml"
GENERATION_KEYS = ("temperature", "top_p", "top_k", "repetition_penalty")
_SHAPE_KEYS = tuple(entry.name for entry in fields(Shape))
_KEYS = frozenset({"version", "end_ids", "bos_id", "generation", *_SHAPE_KEYS})


def read_own(path: Path) -> tuple[ModelSpec, Fields]:
    """The spec of a config.yaml and its generation defaults as fields. Raises CheckpointError."""
    try:
        values = yaml.safe_load(read_text(path))
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise CheckpointError(f"{path} is not valid YAML.") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} must hold a mapping with `version` and the model's sizes.")
    config = Fields(values, str(path))
    for key in values:
        if key not in _KEYS:
            raise CheckpointError(f"{path}: {str(key)[:60]} is not a field of a version's configuration.")
    version = values.get("version")
    line = find_line(version) if isinstance(version, str) else None
    if line is None:
        raise config.refusal("version", f"must be one of {', '.join(repr(known.number) for known in LINES)}, in quotes")
    shape = _read_shape(config)
    bos = config.ids("bos_id", shape.vocab_size)
    return line.spec(shape, config.ids("end_ids", shape.vocab_size), bos[0] if bos else None), config.nested("generation")


def own_config(spec: ModelSpec, generation: dict[str, float] | None = None) -> str:
    """The config.yaml of a spec of one of the lines. Raises CheckpointError when the spec is not exactly one that a line gives."""
    line = find_line(spec.line or "")
    attention = spec.layers[0].attention
    shape = Shape(
        vocab_size=spec.vocab_size,
        dim=spec.dim,
        layers=len(spec.layers),
        heads=attention.heads,
        kv_heads=attention.kv_heads,
        mlp_hidden=spec.layers[0].mlp.hidden,
        context_tokens=spec.context_tokens,
        rope_theta=spec.rope.theta,
        head_dim=attention.head_dim,
    )
    if line is None or line.spec(shape, spec.end_ids, spec.bos_id) != spec:
        raise CheckpointError("this model is not one of a version line, so config.yaml cannot describe it.")
    values: dict[str, Any] = {"version": line.number, **asdict(shape), "end_ids": list(spec.end_ids)}
    if spec.bos_id is not None:
        values["bos_id"] = spec.bos_id
    if generation:
        values["generation"] = generation
    return str(yaml.safe_dump(values, sort_keys=False))


def _read_shape(config: Fields) -> Shape:
    shape = Shape(
        vocab_size=config.integer("vocab_size", high=1 << 24),
        dim=config.integer("dim"),
        layers=config.integer("layers", high=4096),
        heads=config.integer("heads"),
        kv_heads=config.integer("kv_heads"),
        mlp_hidden=config.integer("mlp_hidden"),
        context_tokens=config.integer("context_tokens"),
        rope_theta=config.number("rope_theta", 10_000.0, low=1.0),
        head_dim=config.integer("head_dim", 0, low=0),
    )
    head_dim = shape.head_dim or shape.dim // shape.heads
    if shape.heads % shape.kv_heads:
        raise config.refusal("kv_heads", f"does not divide the {shape.heads} heads")
    if head_dim < 2 or head_dim % 2:
        raise config.refusal("head_dim", f"RoPE needs an even head dimension, not {head_dim}")
    return shape
