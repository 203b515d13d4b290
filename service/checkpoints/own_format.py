"""config.yaml of this project's own checkpoints: a version line and a shape, read and written.

It does not know tensors or the other files. Invariant: `version` alone decides what kind of network it is, whatever else the file says,
and writing then reading gives an equal spec.
"""

from __future__ import annotations

from dataclasses import MISSING, asdict, fields, replace
from pathlib import Path
from typing import Any

import yaml

from service.checkpoints.fields import Fields, read_text
from service.types.catalog import LINES, Shape, find_line
from service.types.errors import CheckpointError
from service.types.kv_layout import BLOCK_TOKENS, FarSpec, FarStore
from service.types.model_spec import ModelSpec, RopeScaling, RopeSpec
from service.types.vision import VisionSpec

CONFIG = "config.yaml"
GENERATION_KEYS = ("temperature", "top_p", "top_k", "repetition_penalty")
_SHAPE_KEYS = tuple(entry.name for entry in fields(Shape))
_FAR_KEYS = frozenset(entry.name for entry in fields(FarSpec))
_VISION_KEYS = tuple(entry.name for entry in fields(VisionSpec))
_KEYS = frozenset({"version", "end_ids", "bos_id", "image_id", "generation", *_SHAPE_KEYS})
# Written even where they have their default: a reader looks for them.
_ALWAYS = ("rope_theta", "head_dim")
_SWITCHES = ("tied_embeddings", "qk_norm", "qkv_bias", "out_bias", "mlp_bias")
_ROPE_NUMBERS = ("factor", "low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim")
# Divisors.
_LEAST = {"factor": 1e-3, "low_freq_factor": 1e-3, "high_freq_factor": 1e-3, "beta_fast": 1e-3, "beta_slow": 1e-3}
_ROPE_KEYS = frozenset({"scaling", "original_context", "truncate", *_ROPE_NUMBERS})


def read_own(path: Path) -> tuple[ModelSpec, Fields]:
    """The spec of a config.yaml and its generation defaults as fields. Raises CheckpointError."""
    return parse_own(read_text(path), str(path))


def read_version(path: Path) -> str:
    """The `version` of a config.yaml that `read_own` accepts, without a leading v: a line or a patch of it. Raises CheckpointError."""
    return str(yaml.safe_load(read_text(path))["version"]).removeprefix("v")


def parse_own(text: str, source: str) -> tuple[ModelSpec, Fields]:
    """The same from the text of a config.yaml; `source` is what messages call it. Raises CheckpointError."""
    try:
        values = yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise CheckpointError(f"{source} is not valid YAML.") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{source} must hold a mapping with `version` and the model's sizes.")
    config = Fields(values, source)
    for key in values:
        if key not in _KEYS:
            raise CheckpointError(f"{source}: {str(key)[:60]} is not a field of a version's configuration.")
    version = values.get("version")
    line = find_line(version) if isinstance(version, str) else None
    if line is None:
        raise config.refusal("version", f"must be one of {', '.join(repr(known.number) for known in LINES)}, in quotes")
    shape = _read_shape(config)
    if shape.vision is not None and not line.reads_images:
        raise config.refusal("vision", f"belongs to a line that reads images, and v{line.number} does not")
    if shape.shared_layers > 1 and not line.shares_weights:
        raise config.refusal("shared_layers", f"belongs to a line that shares weights, and v{line.number} does not")
    if line.far is None and (shape.window or shape.far is not None or shape.dense_layers):
        name = "window" if shape.window else "far" if shape.far is not None else "dense_layers"
        raise config.refusal(name, f"belongs to a line that reads long contexts by far blocks, and v{line.number} does not")
    bos, image = config.ids("bos_id", shape.vocab_size), config.ids("image_id", shape.vocab_size)
    if len(image) != (shape.vision is not None):
        raise config.refusal("image_id", "must be one token id with `vision`, and absent without it")
    spec = line.spec(shape, config.ids("end_ids", shape.vocab_size), bos[0] if bos else None, image[0] if image else None)
    return spec, config.nested("generation")


def own_config(spec: ModelSpec, generation: dict[str, float] | None = None, version: str | None = None) -> str:
    """The config.yaml of a spec of one of the lines; `version` may name a patch of it.

    Raises CheckpointError when no line gives the spec.
    """
    line = find_line(version or spec.line or "")
    shape = shape_of(spec)
    if line is None or line.spec(shape, spec.end_ids, spec.bos_id, spec.image_id) != spec:
        raise CheckpointError("this model is not one of a version line, so config.yaml cannot describe it.")
    values: dict[str, Any] = {"version": (version or line.number).removeprefix("v"), **_written(shape), "end_ids": list(spec.end_ids)}
    for name in ("bos_id", "image_id"):
        if getattr(spec, name) is not None:
            values[name] = getattr(spec, name)
    if generation:
        values["generation"] = generation
    return str(yaml.safe_dump(values, sort_keys=False))


def shape_of(spec: ModelSpec) -> Shape:
    """The shape from which a line makes a model of these sizes, taken from the first layer and the first that reads far blocks."""
    line = find_line(spec.line or "")
    sparse = next((layer.attention for layer in spec.layers if layer.attention.far is not None), None)
    dense = tuple(index for index, layer in enumerate(spec.layers) if layer.attention.far is None)
    attention, mlp = spec.layers[0].attention, spec.layers[0].mlp
    plain = RopeSpec(theta=spec.rope.theta, rotary_dim=attention.head_dim, original_context=spec.context_tokens)
    return Shape(
        vocab_size=spec.vocab_size,
        dim=spec.dim,
        layers=len(spec.layers),
        heads=attention.heads,
        kv_heads=attention.kv_heads,
        mlp_hidden=mlp.hidden,
        context_tokens=spec.context_tokens,
        rope_theta=spec.rope.theta,
        head_dim=attention.head_dim,
        norm_eps=spec.norm_eps,
        tied_embeddings=spec.tied_embeddings,
        qk_norm=attention.qk_norm,
        qkv_bias=attention.qkv_bias,
        out_bias=attention.out_bias,
        mlp_bias=mlp.bias,
        rope=None if spec.rope == plain else spec.rope,
        vision=spec.vision,
        shared_layers=1 if spec.sharing is None else spec.sharing.owners.count(0),
        window=0 if sparse is None or (line and line.window == sparse.window) else sparse.window or 0,
        far=None if sparse is None or (line and line.far == sparse.far) else sparse.far,
        dense_layers=dense if sparse is not None else (),
    )


def _written(shape: Shape) -> dict[str, Any]:
    """The fields of a shape that say something: those without a default, and those that differ from theirs."""
    values = {
        entry.name: getattr(shape, entry.name)
        for entry in fields(Shape)
        if entry.default is MISSING or entry.name in _ALWAYS or getattr(shape, entry.name) != entry.default
    }
    if shape.rope is not None:
        plain = RopeSpec(theta=shape.rope.theta, rotary_dim=shape.rope.rotary_dim)
        names = [entry.name for entry in fields(RopeSpec) if entry.name in _ROPE_KEYS and entry.name != "scaling"]
        differing = {name: getattr(shape.rope, name) for name in names if getattr(shape.rope, name) != getattr(plain, name)}
        values["rope"] = {"scaling": shape.rope.scaling.value, **differing}
    if shape.vision is not None:
        values["vision"] = asdict(shape.vision)
    if shape.far is not None:
        values["far"] = {**asdict(shape.far), "store": shape.far.store.value}
    if shape.dense_layers:
        values["dense_layers"] = list(shape.dense_layers)
    return values


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
        norm_eps=config.number("norm_eps", 1e-6, low=0.0, high=1.0),
        shared_layers=config.integer("shared_layers", 1),
        window=config.integer("window", 0, low=0),
    )
    plain = {entry.name: entry.default for entry in fields(Shape)}
    switches: dict[str, Any] = {name: config.flag(name, bool(plain[name])) for name in _SWITCHES}
    shape = replace(shape, **switches)
    if shape.heads % shape.kv_heads:
        raise config.refusal("kv_heads", f"does not divide the {shape.heads} heads")
    if shape.rotary_dim < 2 or shape.rotary_dim % 2:
        raise config.refusal("head_dim", f"RoPE needs an even head dimension, not {shape.rotary_dim}")
    return replace(
        shape,
        rope=_read_rope(config.nested("rope"), shape) if config.has("rope") else None,
        vision=_read_vision(config.nested("vision")) if config.has("vision") else None,
        far=_read_far(config.nested("far")) if config.has("far") else None,
        dense_layers=_read_dense_layers(config, shape.layers),
    )


def _read_rope(rope: Fields, shape: Shape) -> RopeSpec:
    for key in rope.values:
        if key not in _ROPE_KEYS:
            raise CheckpointError(f"{rope.source}: {str(key)[:60]} is not a field of a rotation.")
    kinds = {kind.value: kind for kind in RopeScaling}
    name = rope.text("scaling")
    if name not in kinds:
        raise rope.refusal("scaling", f"must be one of {', '.join(kinds)}")
    plain = RopeSpec(
        theta=shape.rope_theta,
        rotary_dim=shape.rotary_dim,
        scaling=kinds[name],
        original_context=rope.integer("original_context", shape.context_tokens),
        truncate=rope.flag("truncate", True),
    )
    numbers: dict[str, Any] = {key: rope.number(key, low=_LEAST.get(key, 0.0)) for key in _ROPE_NUMBERS if rope.has(key)}
    spec = replace(plain, **numbers)
    if spec.high_freq_factor <= spec.low_freq_factor:
        raise rope.refusal("high_freq_factor", "must be greater than low_freq_factor")
    return spec


def _read_far(config: Fields) -> FarSpec:
    for key in config.values:
        if key not in _FAR_KEYS:
            raise CheckpointError(f"{config.source}: {str(key)[:60]} is not a field of far blocks.")
    plain, stores = FarSpec(), {store.value: store for store in FarStore}
    store = config.text("store") if config.has("store") else plain.store.value
    if store not in stores:
        raise config.refusal("store", f"must be one of {', '.join(stores)}")
    spec = FarSpec(
        blocks=config.integer("blocks", plain.blocks, low=0),
        store=stores[store],
        refresh=config.integer("refresh", plain.refresh),
        sub_block_tokens=config.integer("sub_block_tokens", plain.sub_block_tokens),
        sink_blocks=config.integer("sink_blocks", plain.sink_blocks, low=0),
        dense_prompts=config.flag("dense_prompts", plain.dense_prompts),
    )
    for name in ("refresh", "sub_block_tokens"):
        if BLOCK_TOKENS % getattr(spec, name):
            raise config.refusal(name, f"must divide a block of {BLOCK_TOKENS} tokens")
    return spec


def _read_dense_layers(config: Fields, layers: int) -> tuple[int, ...]:
    found = config.values.get("dense_layers") or []
    if not isinstance(found, list) or not all(type(index) is int and 0 <= index < layers for index in found):
        raise config.refusal("dense_layers", f"must list layers from 0 to {layers - 1}")
    if len(set(found)) == layers:
        raise config.refusal("dense_layers", "leaves no layer that reads far blocks")
    return tuple(sorted(set(found)))


def _read_vision(config: Fields) -> VisionSpec:
    for key in config.values:
        if key not in _VISION_KEYS:
            raise CheckpointError(f"{config.source}: {str(key)[:60]} is not a field of a patch encoder.")
    vision = VisionSpec(**{name: config.integer(name, high=1 << 16) for name in _VISION_KEYS})
    if vision.dim % vision.heads:
        raise config.refusal("heads", f"does not divide the encoder's width of {vision.dim}")
    if not vision.least_tokens <= vision.most_tokens <= vision.side_tokens**2:
        raise config.refusal("most_tokens", "must lie between least_tokens and the square of side_tokens")
    return vision
