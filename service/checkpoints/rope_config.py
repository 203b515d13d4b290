"""RoPE as Hugging Face configs spell it, old (`rope_theta`, `rope_scaling`) and new (`rope_parameters`), as a RopeSpec.

It knows no family. Invariant: a key that could change the rotation and is not obeyed is refused by name.
"""

from __future__ import annotations

from service.checkpoints.fields import Fields
from service.types.model_spec import RopeScaling, RopeSpec

DEFAULT_THETA = 10_000.0
_SPELLING = {"rope_theta", "rope_type", "type", "partial_rotary_factor"}
_KEYS = {
    RopeScaling.DEFAULT: set(),
    RopeScaling.LINEAR: {"factor"},
    RopeScaling.DYNAMIC: {"factor"},
    RopeScaling.LLAMA3: {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"},
    RopeScaling.YARN: {
        *("factor", "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"),
        "original_max_position_embeddings",
    },
}
_UNUSED_BUT_HARMLESS = {"finetuned", "original_max_position_embeddings"}


def read_rope(config: Fields, head_dim: int, trained_tokens: int) -> tuple[RopeSpec, int]:
    """The rotation of a config.json and the context that it reaches; `trained_tokens` is max_position_embeddings.

    Raises CheckpointError.
    """
    name = "rope_scaling" if config.has("rope_scaling") and config.values["rope_scaling"] else "rope_parameters"
    rope = config.nested(name)
    kind = _kind(rope)
    for key in rope.values:
        if rope.has(key) and key not in _KEYS[kind] | _SPELLING | _UNUSED_BUT_HARMLESS:
            raise rope.refusal(key, f"not understood for rope type {kind.value}")
    for source in (rope, config):
        if source.number("partial_rotary_factor", 1.0) != 1.0:
            raise source.refusal("partial_rotary_factor", "not served for this family: only 1.0 is")
    if head_dim % 2:
        raise config.refusal("head_dim", f"RoPE needs an even head dimension, not {head_dim}")
    theta = rope.number("rope_theta", config.number("rope_theta", DEFAULT_THETA, low=1.0), low=1.0)
    original = _original_context(config, rope, kind, trained_tokens)
    if kind is RopeScaling.DEFAULT:
        return RopeSpec(theta, head_dim, original_context=original), trained_tokens
    if kind is RopeScaling.DYNAMIC and head_dim < 4:
        raise config.refusal("head_dim", "too small for dynamic RoPE")
    factor = rope.number("factor", trained_tokens / original if kind is RopeScaling.YARN else None, low=1e-3, high=1e6)
    spec = RopeSpec(
        theta=theta,
        rotary_dim=head_dim,
        scaling=kind,
        factor=factor,
        original_context=original,
        low_freq_factor=rope.number("low_freq_factor", 1.0 if kind is not RopeScaling.LLAMA3 else None),
        high_freq_factor=rope.number("high_freq_factor", 4.0 if kind is not RopeScaling.LLAMA3 else None),
        beta_fast=rope.number("beta_fast", 32.0) or 32.0,
        beta_slow=rope.number("beta_slow", 1.0) or 1.0,
        attention_factor=rope.optional_number("attention_factor"),
        mscale=rope.optional_number("mscale"),
        mscale_all_dim=rope.optional_number("mscale_all_dim"),
        truncate=rope.flag("truncate", True),
    )
    if spec.high_freq_factor <= spec.low_freq_factor:
        raise rope.refusal("high_freq_factor", "must be greater than low_freq_factor")
    return spec, _reach(kind, factor, original, trained_tokens)


def _kind(rope: Fields) -> RopeScaling:
    name = "type" if not rope.has("rope_type") and rope.has("type") else "rope_type"
    if not rope.has(name):
        if rope.has("factor"):
            raise rope.refusal("rope_type", "must say what the factor is for")
        return RopeScaling.DEFAULT
    text = rope.text(name)
    if text not in {kind.value for kind in RopeScaling}:
        supported = ", ".join(kind.value for kind in RopeScaling)
        raise rope.refusal(name, f"not supported (supported: {supported})")
    return RopeScaling(text)


def _original_context(config: Fields, rope: Fields, kind: RopeScaling, trained_tokens: int) -> int:
    """The context before scaling. `transformers` lets the key outside the RoPE object win, for the kinds that use one."""
    if kind not in (RopeScaling.LLAMA3, RopeScaling.YARN):
        return trained_tokens
    outer = config.integer("original_max_position_embeddings", trained_tokens)
    return outer if config.has("original_max_position_embeddings") else rope.integer("original_max_position_embeddings", outer)


def _reach(kind: RopeScaling, factor: float, original: int, trained_tokens: int) -> int:
    """The longest context that a scaling is meant for: configs give the unscaled length for linear and dynamic, either for YaRN."""
    if kind in (RopeScaling.LINEAR, RopeScaling.DYNAMIC):
        return max(trained_tokens, int(trained_tokens * factor))
    return max(trained_tokens, int(original * factor)) if kind is RopeScaling.YARN else trained_tokens
