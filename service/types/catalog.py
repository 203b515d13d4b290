"""The version lines as literals: compare two versions by comparing them. A new line is a new literal, never a subclass.

A line fixes what its models are (gates, precision policy, modalities) and the nano and reference shapes they come in; checkpoints fill
in the rest. It does not know files or tensors. These lines are this project's own models, not releases of any company.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from service.types.kv_layout import FarSpec
from service.types.model_spec import (
    DenseMlp,
    GroupedQueryAttention,
    LayerSpec,
    ModelSpec,
    PrecisionSpec,
    RopeSpec,
    SharingSpec,
)
from service.types.vision import FusionSpec, VisionSpec


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes of one model of a line, and the few choices that a checkpoint may make otherwise than the models trained here.

    `head_dim` is dim / heads unless given. `rope` overrides `rope_theta`: a scaled rotation. By these choices (biases, no q/k norm, an
    output head of its own) a model of another family becomes one of a line and computes what it did. `vision` is for
    lines that read images, `shared_layers` > 1 (so many consecutive layers have one set of weights) for lines that share them. `window`,
    `far` (0 and None: the line's own) and `dense_layers`, which read everything, are for lines that read long contexts by far blocks.
    """

    vocab_size: int
    dim: int
    layers: int
    heads: int
    kv_heads: int
    mlp_hidden: int
    context_tokens: int
    rope_theta: float = 10_000.0
    head_dim: int = 0
    norm_eps: float = 1e-6
    tied_embeddings: bool = True
    qk_norm: bool = True
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    rope: RopeSpec | None = None
    vision: VisionSpec | None = None
    shared_layers: int = 1
    window: int = 0
    far: FarSpec | None = None
    dense_layers: tuple[int, ...] = ()

    @property
    def rotary_dim(self) -> int:
        """The size of a head, all of which turns."""
        return self.head_dim or self.dim // self.heads


@dataclass(frozen=True, slots=True)
class VersionLine:
    """One line: its number, name, what it adds, whether heads are gated, its precision policy and its shapes by name.

    `reads_images`: its shapes may have a patch encoder, whose image tokens are fused in after the lower half of the layers.
    `shares_weights`: in its shapes consecutive layers may compute with one set of weights. `far`: layers read a window of `window` tokens
    as they were computed, and behind it the best blocks.
    """

    number: str
    name: str
    essence: str
    gated_heads: bool
    precision: PrecisionSpec
    shapes: tuple[tuple[str, Shape], ...]
    reads_images: bool = False
    shares_weights: bool = False
    window: int = 0
    far: FarSpec | None = None

    @property
    def label(self) -> str:
        """The line as clients write it: `v2.3`."""
        return f"v{self.number}"

    def spec(self, shape: Shape, end_ids: tuple[int, ...] = (), bos_id: int | None = None, image_id: int | None = None) -> ModelSpec:
        """The network of this line in that shape; `image_id` only where the shape has `vision`."""
        vision = shape.vision if self.reads_images else None
        fusion = FusionSpec(shape.layers // 2, shape.heads, shape.kv_heads, shape.rotary_dim) if vision is not None else None
        attention = GroupedQueryAttention(
            heads=shape.heads,
            kv_heads=shape.kv_heads,
            head_dim=shape.rotary_dim,
            gate=self.gated_heads,
            qk_norm=shape.qk_norm,
            qkv_bias=shape.qkv_bias,
            out_bias=shape.out_bias,
        )
        layer = LayerSpec(attention, DenseMlp(shape.mlp_hidden, shape.mlp_bias))
        sparse = layer
        if self.far is not None:
            sparse = replace(layer, attention=replace(attention, window=shape.window or self.window, far=shape.far or self.far))
        dense = shape.dense_layers if self.far is not None else ()
        plain = RopeSpec(theta=shape.rope_theta, rotary_dim=shape.rotary_dim, original_context=shape.context_tokens)
        return ModelSpec(
            family="deepseek-line",
            vocab_size=shape.vocab_size,
            dim=shape.dim,
            layers=tuple(layer if index in dense else sparse for index in range(shape.layers)),
            rope=plain if shape.rope is None else shape.rope,
            context_tokens=shape.context_tokens,
            norm_eps=shape.norm_eps,
            tied_embeddings=shape.tied_embeddings,
            precision=self.precision,
            end_ids=end_ids,
            bos_id=bos_id,
            line=self.number,
            vision=vision,
            fusion=fusion,
            image_id=image_id if vision is not None else None,
            sharing=SharingSpec.runs(shape.layers, shape.shared_layers) if self.shares_weights and shape.shared_layers > 1 else None,
        )


# Small enough that the bundled models of all lines stay below 32 MiB together.
_NANO_TEXT = Shape(vocab_size=4096, dim=256, layers=4, heads=4, kv_heads=2, mlp_hidden=448, context_tokens=2048)
_ONE_BILLION = Shape(vocab_size=32_000, dim=2048, layers=20, heads=16, kv_heads=8, mlp_hidden=5504, context_tokens=4096)

V1_0 = VersionLine(
    number="1.0",
    name="base",
    essence="dense causal decoder with dynamic attention: a learned gate on each head's output",
    gated_heads=True,
    precision=PrecisionSpec(compute="float32", train_compute="float32"),
    shapes=(("nano", _NANO_TEXT), ("1b", _ONE_BILLION)),
)

V2_3 = VersionLine(
    number="2.3",
    name="performance",
    essence="v1.0 under a mixed precision policy: 16-bit compute; float32 accumulation, norms, softmax and master weights",
    gated_heads=True,
    precision=PrecisionSpec(compute="auto", train_compute="bfloat16", loss_scaling=True),
    shapes=(("nano", _NANO_TEXT), ("1b", _ONE_BILLION)),
)

_NANO_EYES = VisionSpec(patch=4, merge=2, dim=96, layers=3, heads=3, mlp_hidden=256, least_tokens=4, most_tokens=64, side_tokens=16)
_LARGE_EYES = VisionSpec(
    patch=14, merge=2, dim=1024, layers=24, heads=16, mlp_hidden=2752, least_tokens=16, most_tokens=576, side_tokens=48
)

V3_5 = VersionLine(
    number="3.5",
    name="enterprise",
    essence="v2.3 that also reads images: a patch encoder, image tokens among the text tokens, gated fusion of the two modalities",
    gated_heads=True,
    precision=V2_3.precision,
    shapes=(("nano", replace(_NANO_TEXT, vision=_NANO_EYES)), ("1b", replace(_ONE_BILLION, vision=_LARGE_EYES))),
    reads_images=True,
)

_NANO_LIGHT = Shape(
    vocab_size=4096, dim=96, layers=8, heads=4, kv_heads=2, mlp_hidden=224, context_tokens=2048, head_dim=32, shared_layers=8
)
_REFERENCE_LIGHT = Shape(vocab_size=32_000, dim=512, layers=12, heads=8, kv_heads=4, mlp_hidden=1536, context_tokens=4096, shared_layers=6)

V4_8 = VersionLine(
    number="4.8",
    name="light",
    essence="a small decoder whose consecutive layers share their weights, trained for int8 and distilled from v5.2",
    gated_heads=True,
    precision=PrecisionSpec(compute="auto", train_compute="float32", quantize="int8"),
    shapes=(("nano", _NANO_LIGHT), ("reference", _REFERENCE_LIGHT)),
    shares_weights=True,
)

_NANO_LONG = replace(_NANO_TEXT, context_tokens=16_384, rope_theta=500_000.0, dense_layers=(0,), vision=_NANO_EYES)
_REFERENCE = Shape(
    vocab_size=32_000, dim=1024, layers=24, heads=16, kv_heads=8, mlp_hidden=2752, context_tokens=16_384, rope_theta=500_000.0
)

V5_2 = VersionLine(
    number="5.2",
    name="flagship",
    essence="v3.5 over long contexts: a window of 2048 tokens as computed, all that lies behind it kept in int8 and chosen by blocks",
    gated_heads=True,
    precision=V2_3.precision,
    shapes=(("nano", _NANO_LONG), ("reference", replace(_REFERENCE, vision=_LARGE_EYES))),
    reads_images=True,
    window=2048,
    far=FarSpec(),
)

LINES: tuple[VersionLine, ...] = (V1_0, V2_3, V3_5, V4_8, V5_2)


def find_line(version: str) -> VersionLine | None:
    """The line named `v2.3`, `2.3` or by a patch of it (`v2.3.1`), or None."""
    number = version.removeprefix("v")
    for line in LINES:
        if number == line.number or number.startswith(line.number + "."):
            return line
    return None
