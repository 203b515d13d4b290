"""Which stored tensor fills which rows of which parameter: our own names one to one, Hugging Face's separate q, k, v, gate and up fused.

It does not know files or bytes, and needs no torch. Invariant: a match uses every stored tensor exactly once and fills every parameter, or
it is refused with the name at fault.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from service.types.errors import CheckpointError
from service.types.model_spec import LayerSpec, ModelSpec
from service.types.vision import FusionSpec, VisionSpec

HARMLESS = re.compile(r"(^|.*\.)rotary_emb\.(inv_freq|cos_cached|sin_cached)$|.*\.self_attn\.(masked_bias|bias)$")
TIED_HEAD = "lm_head.weight"
EMBEDDING = "model.embed_tokens.weight"


@dataclass(frozen=True, slots=True)
class Piece:
    """The stored tensor `source` of `shape` fills the rows of parameter `target` from `first_row` on."""

    target: str
    source: str
    first_row: int
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Match:
    """How to fill a model: `pieces` in the order of its parameters; `duplicates` are (stored copy, stored original) that must be equal."""

    pieces: tuple[Piece, ...]
    duplicates: tuple[tuple[str, str], ...] = ()


def parameter_shapes(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    """Name and shape of every parameter of the decoder of `spec`, in order."""
    shapes: dict[str, tuple[int, ...]] = {"embed.weight": (spec.vocab_size, spec.dim)}
    for index, layer in enumerate(spec.layers):
        own = _layer_shapes(layer, spec.dim) if spec.owner(index) == index else _norm_shapes(spec.dim)
        shapes.update({f"layers.{index}.{name}": shape for name, shape in own})
    shapes["norm.weight"] = (spec.dim,)
    if not spec.tied_embeddings:
        shapes["head.weight"] = (spec.vocab_size, spec.dim)
    if spec.vision is not None:
        shapes.update({f"vision.{name}": shape for name, shape in _vision_shapes(spec.vision, spec.dim)})
    if spec.fusion is not None:
        shapes.update({f"fusion.{name}": shape for name, shape in _fusion_shapes(spec.fusion, spec.dim)})
    return shapes


def match_own(spec: ModelSpec, stored: Mapping[str, tuple[int, ...]]) -> Match:
    """Match tensors of our own format, given their shapes by name. Raises CheckpointError."""
    pieces = tuple(Piece(name, name, 0, shape) for name, shape in parameter_shapes(spec).items())
    _check(pieces, stored, frozenset())
    return Match(pieces)


def match_hugging_face(spec: ModelSpec, stored: Mapping[str, tuple[int, ...]]) -> Match:
    """Match tensors under Hugging Face names, with or without the prefix `model.`. Raises CheckpointError."""
    bare = EMBEDDING not in stored and EMBEDDING.removeprefix("model.") in stored
    pieces = [Piece(p.target, p.source.removeprefix("model.") if bare else p.source, p.first_row, p.shape) for p in _foreign(spec)]
    embedding = pieces[0].source
    duplicates: tuple[tuple[str, str], ...] = ()
    if spec.tied_embeddings and TIED_HEAD in stored:
        if embedding in stored:
            duplicates = ((TIED_HEAD, embedding),)
        else:
            pieces[0] = Piece("embed.weight", TIED_HEAD, 0, pieces[0].shape)
    _check(tuple(pieces), stored, frozenset(copy for copy, _ in duplicates))
    for copy, original in duplicates:
        if stored[copy] != stored[original]:
            raise CheckpointError(f"{copy} and {original} should be one tied tensor and differ in shape.")
    return Match(tuple(pieces), duplicates)


def _check(pieces: tuple[Piece, ...], stored: Mapping[str, tuple[int, ...]], allowed: frozenset[str]) -> None:
    missing = [piece.source for piece in pieces if piece.source not in stored]
    if missing:
        raise CheckpointError(f"the weights lack {_listed(missing)}.")
    wanted = {piece.source for piece in pieces} | allowed
    left_over = [name for name in stored if name not in wanted and not HARMLESS.match(name)]
    if left_over:
        raise CheckpointError(f"the weights have {_listed(left_over)}, which this model has no place for.")
    for piece in pieces:
        if stored[piece.source] != piece.shape:
            raise CheckpointError(f"{piece.source} has shape {list(stored[piece.source])} and should have {list(piece.shape)}.")


def _listed(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _layer_shapes(layer: LayerSpec, dim: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    attention, mlp = layer.attention, layer.mlp
    width = attention.heads * attention.head_dim
    rows = width + 2 * attention.kv_heads * attention.head_dim
    yield "attention_norm.weight", (dim,)
    yield from _linear("attention.qkv", rows, dim, attention.qkv_bias)
    yield from _linear("attention.out", dim, width, attention.out_bias)
    if attention.qk_norm:
        yield "attention.query_norm.weight", (attention.head_dim,)
        yield "attention.key_norm.weight", (attention.head_dim,)
    if attention.gate:
        yield from _linear("attention.gate", attention.heads, dim, True)
    yield "mlp_norm.weight", (dim,)
    yield from _linear("mlp.gate_up", 2 * mlp.hidden, dim, mlp.bias)
    yield from _linear("mlp.down", dim, mlp.hidden, mlp.bias)


def _norm_shapes(dim: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield "attention_norm.weight", (dim,)
    yield "mlp_norm.weight", (dim,)


def _vision_shapes(vision: VisionSpec, dim: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield from _linear("patch", vision.dim, vision.patch_values, True)
    for name in ("row_embed", "column_embed"):
        yield f"{name}.weight", (vision.side_tokens * vision.merge, vision.dim)
    for index in range(vision.layers):
        layer = f"layers.{index}"
        yield f"{layer}.attention_norm.weight", (vision.dim,)
        yield from _linear(f"{layer}.attention.qkv", 3 * vision.dim, vision.dim, False)
        yield from _linear(f"{layer}.attention.out", vision.dim, vision.dim, False)
        yield f"{layer}.mlp_norm.weight", (vision.dim,)
        yield from _linear(f"{layer}.mlp.gate_up", 2 * vision.mlp_hidden, vision.dim, False)
        yield from _linear(f"{layer}.mlp.down", vision.dim, vision.mlp_hidden, False)
    yield "norm.weight", (vision.dim,)
    yield from _linear("projector.inner", dim, vision.merge**2 * vision.dim, True)
    yield from _linear("projector.out", dim, dim, True)


def _fusion_shapes(fusion: FusionSpec, dim: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    for name in ("norm", "image_norm"):
        yield f"{name}.weight", (dim,)
    for name in ("query", "text"):
        yield from _linear(name, fusion.width, dim, False)
    yield from _linear("key_value", 2 * fusion.kv_width, dim, False)
    yield from _linear("gates", 2 * fusion.heads, dim, True)
    yield from _linear("out", dim, fusion.width, False)


def _linear(name: str, outputs: int, inputs: int, bias: bool) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{name}.weight", (outputs, inputs)
    if bias:
        yield f"{name}.bias", (outputs,)


_RENAMED = {
    "attention_norm": "input_layernorm",
    "mlp_norm": "post_attention_layernorm",
    "attention.query_norm": "self_attn.q_norm",
    "attention.key_norm": "self_attn.k_norm",
    "attention.out": "self_attn.o_proj",
    "mlp.down": "mlp.down_proj",
}


def _foreign(spec: ModelSpec) -> Iterator[Piece]:
    for target, shape in parameter_shapes(spec).items():
        if not target.startswith("layers."):
            source = {"embed.weight": EMBEDDING, "norm.weight": "model.norm.weight", "head.weight": TIED_HEAD}[target]
            yield Piece(target, source, 0, shape)
            continue
        _, index, name = target.split(".", 2)
        module, kind = name.rsplit(".", 1)
        first = 0
        for part, rows in _parts(module, spec.layers[int(index)], shape[0]):
            yield Piece(target, f"model.layers.{index}.{part}.{kind}", first, (rows, *shape[1:]))
            first += rows


def _parts(module: str, layer: LayerSpec, rows: int) -> tuple[tuple[str, int], ...]:
    attention = layer.attention
    if module == "attention.qkv":
        kv = attention.kv_heads * attention.head_dim
        return (
            ("self_attn.q_proj", attention.heads * attention.head_dim),
            ("self_attn.k_proj", kv),
            ("self_attn.v_proj", kv),
        )
    if module == "mlp.gate_up":
        return ("mlp.gate_proj", layer.mlp.hidden), ("mlp.up_proj", layer.mlp.hidden)
    return ((_RENAMED[module], rows),)
