"""config.json of the Hugging Face families llama, mistral, qwen2 and qwen3 as a ModelSpec, with their defaults and window rules.

It does not read weights or tokenizers. Invariant: a field that would change what the network computes is obeyed, or is neutral, or the
checkpoint is refused by that field's name; nothing is guessed.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from service.checkpoints.fields import Fields
from service.checkpoints.rope_config import read_rope
from service.types.errors import CheckpointError
from service.types.model_spec import DenseMlp, GroupedQueryAttention, LayerSpec, ModelSpec

FULL, SLIDING = "full_attention", "sliding_attention"


@dataclass(frozen=True, slots=True)
class Family:
    """What a family fixes: class prefix, defaults of missing fields, where biases and norms are, and which own fields it reads."""

    classes: str
    defaults: dict[str, Any]
    fields: frozenset[str]
    qkv_bias: bool = False
    qk_norm: bool = False


_WINDOW_FIELDS = frozenset({"use_sliding_window", "sliding_window", "max_window_layers", "layer_types"})
_QWEN = {"max_position_embeddings": 32768, "kv_heads": 32, "sliding_window": 4096, "max_window_layers": 28}
FAMILIES: dict[str, Family] = {
    "llama": Family(
        "Llama",
        {"max_position_embeddings": 2048, "bos_token_id": 1, "eos_token_id": 2},
        frozenset({"attention_bias", "mlp_bias"}),
    ),
    "mistral": Family(
        "Mistral",
        {"max_position_embeddings": 131072, "kv_heads": 8, "bos_token_id": 1, "eos_token_id": 2, "sliding_window": 4096},
        frozenset({"sliding_window"}),
    ),
    "qwen2": Family("Qwen2", _QWEN, _WINDOW_FIELDS, qkv_bias=True),
    "qwen3": Family("Qwen3", {**_QWEN, "head_dim": 128}, _WINDOW_FIELDS | {"attention_bias"}, qk_norm=True),
}

_UNDERSTOOD = frozenset(
    {
        *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"),
        *("head_dim", "hidden_act", "rms_norm_eps", "max_position_embeddings", "original_max_position_embeddings", "tie_word_embeddings"),
        *("rope_theta", "rope_scaling", "rope_parameters", "partial_rotary_factor", "layer_types"),
    }
)
_HARMLESS = frozenset(
    {
        *("attention_dropout", "attn_implementation", "_attn_implementation", "_attn_implementation_autoset", "hidden_dropout"),
        *("hidden_dropout_prob", "attention_probs_dropout_prob", "layerdrop", "initializer_range", "output_attentions"),
        *("output_hidden_states", "pretraining_tp", "max_window_layers", "chunk_size_feed_forward", "use_flash_attention_2"),
        *("attn_pdrop", "resid_pdrop", "embd_pdrop"),
    }
)
_TELLING = re.compile(
    r"quant|compress|expert|moe|rope|rotary|attention|attn|window|norm|bias|scal|multiplier|softcap|hidden|mlp|layer|residual|"
    r"head|lora|vision|audio|text_config|sparse|latent|cross|encoder|alibi|position_embedding|causal|parallel"
)


def read_config(values: dict[str, Any], source: str) -> ModelSpec:
    """The spec of a parsed config.json; `source` is its path for messages. `end_ids` are the config's own. Raises CheckpointError."""
    config = Fields(values, source)
    name = config.text("model_type")
    family = FAMILIES.get(name)
    if family is None:
        supported = ", ".join(FAMILIES)
        raise config.refusal("model_type", f"not a supported family (supported: {supported}, and this project's own version lines)")
    _refuse_unknown(config, name, family)
    return _spec(config, name, family)


def _refuse_unknown(config: Fields, name: str, family: Family) -> None:
    allowed = {f"{family.classes}ForCausalLM", f"{family.classes}Model"}
    architectures = config.values.get("architectures")
    if architectures and not (isinstance(architectures, list) and all(entry in allowed for entry in architectures)):
        raise config.refusal("architectures", f"only {family.classes}ForCausalLM is served")
    activation = config.text("hidden_act", "silu")
    if activation not in ("silu", "swish"):
        raise config.refusal("hidden_act", "only silu is served")
    known = _UNDERSTOOD | _HARMLESS | family.fields
    for key, value in config.values.items():
        if key in known or not _TELLING.search(key) or value in (None, False, "", [], {}) or (key, value) == ("is_causal", True):
            continue
        if key == "sliding_window" and _reaches_all(config, family):
            continue
        raise config.refusal(key, f"not served for {name}: it would change what the model computes")


def _reaches_all(config: Fields, family: Family) -> bool:
    """Whether a window that the family would ignore is as long as the context, so that ignoring it changes nothing."""
    context = config.integer("max_position_embeddings", family.defaults["max_position_embeddings"])
    return config.integer("sliding_window") >= context


def _spec(config: Fields, name: str, family: Family) -> ModelSpec:
    dim, heads = config.integer("hidden_size"), config.integer("num_attention_heads")
    layers, vocab_size = config.integer("num_hidden_layers", high=4096), config.integer("vocab_size", high=1 << 24)
    kv_heads = _kv_heads(config, family, heads)
    head_dim = config.integer("head_dim", family.defaults.get("head_dim", dim // heads))
    if head_dim * heads != dim and not config.has("head_dim") and "head_dim" not in family.defaults:
        raise config.refusal("hidden_size", f"not a multiple of the {heads} attention heads")
    trained = config.integer("max_position_embeddings", family.defaults["max_position_embeddings"])
    rope, context = read_rope(config, head_dim, trained)
    all_bias = "attention_bias" in family.fields and config.flag("attention_bias", False)
    mlp = DenseMlp(config.integer("intermediate_size"), bias="mlp_bias" in family.fields and config.flag("mlp_bias", False))

    def layer(window: int | None) -> LayerSpec:
        seen = None if window is None or window >= context else window
        attention = GroupedQueryAttention(
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            window=seen,
            qkv_bias=family.qkv_bias or all_bias,
            out_bias=all_bias,
            qk_norm=family.qk_norm,
        )
        return LayerSpec(attention, mlp)

    with_defaults = Fields({**{key: family.defaults.get(key) for key in ("bos_token_id", "eos_token_id")}, **config.values}, config.source)
    begin = with_defaults.ids("bos_token_id", vocab_size)
    return ModelSpec(
        family=name,
        vocab_size=vocab_size,
        dim=dim,
        layers=tuple(layer(window) for window in _windows(config, name, family, layers)),
        rope=rope,
        context_tokens=context,
        norm_eps=config.number("rms_norm_eps", 1e-6, low=0.0, high=1.0),
        tied_embeddings=config.flag("tie_word_embeddings", False),
        end_ids=with_defaults.ids("eos_token_id", vocab_size),
        bos_id=begin[0] if begin else None,
    )


def _kv_heads(config: Fields, family: Family, heads: int) -> int:
    given = "num_key_value_heads" in config.values
    kv_heads = config.integer("num_key_value_heads", heads if given else family.defaults.get("kv_heads", heads))
    if heads % kv_heads:
        raise config.refusal("num_key_value_heads", f"does not divide the {heads} attention heads")
    return kv_heads


def _windows(config: Fields, name: str, family: Family, layers: int) -> list[int | None]:
    """The window of every layer in visible tokens, the query's own included (`transformers`: key > query − window)."""
    kinds = _layer_types(config, layers)
    if "sliding_window" not in family.fields:
        if SLIDING in kinds:
            raise config.refusal("layer_types", f"not served for {name}: its layers have full attention")
        return [None] * layers
    window = config.integer("sliding_window", family.defaults["sliding_window"]) if _window_given(config) else None
    if name == "mistral":
        if kinds and set(kinds) != {FULL if window is None else SLIDING}:
            raise config.refusal("layer_types", "not what sliding_window gives every layer of this family")
        return [window] * layers
    window = window if config.flag("use_sliding_window", False) else None
    if not kinds:
        first = config.integer("max_window_layers", family.defaults["max_window_layers"], low=0)
        return [window if index >= first else None for index in range(layers)]
    if SLIDING in kinds and window is None:
        raise config.refusal("layer_types", "has sliding layers where use_sliding_window and sliding_window give no window")
    return [window if kind == SLIDING else None for kind in kinds]


def _window_given(config: Fields) -> bool:
    """A missing sliding_window has the family's default; an explicit null means none."""
    return "sliding_window" not in config.values or config.has("sliding_window")


def _layer_types(config: Fields, layers: int) -> list[str]:
    kinds = config.values.get("layer_types")
    if kinds is None:
        return []
    if not isinstance(kinds, list) or len(kinds) != layers or not all(kind in (FULL, SLIDING) for kind in kinds):
        raise CheckpointError(f"{config.source}: layer_types must give {FULL} or {SLIDING} for each of the {layers} layers.")
    return kinds
