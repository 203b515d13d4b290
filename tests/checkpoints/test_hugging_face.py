from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from service.checkpoints.hugging_face import FAMILIES, read_config
from service.types.errors import CheckpointError
from service.types.model_spec import ModelSpec, RopeScaling
from tests.tiny_models import build_tiny


def config_of(tmp_path: Path, family: str, **overrides: Any) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((build_tiny(tmp_path / "built", family) / "config.json").read_text())
    return {**config, **overrides}


def windows(spec: ModelSpec) -> list[int | None]:
    return [layer.attention.window for layer in spec.layers]


@pytest.mark.parametrize("family", FAMILIES)
def test_sizes_and_family_traits(tmp_path: Path, family: str) -> None:
    spec = read_config(config_of(tmp_path, family, rms_norm_eps=1e-5), "config.json")
    attention = spec.layers[0].attention
    assert (spec.family, spec.vocab_size, spec.dim, len(spec.layers), spec.context_tokens) == (family, 331, 64, 2, 256)
    assert (attention.heads, attention.kv_heads, attention.head_dim) == (4, 2, 16)
    assert (attention.qkv_bias, attention.out_bias) == (family == "qwen2", False)
    assert attention.qk_norm == (family == "qwen3")
    assert not attention.gate
    assert (spec.norm_eps, spec.tied_embeddings, spec.end_ids, spec.bos_id) == (1e-5, False, (257,), 256)


def test_missing_fields_have_the_familys_defaults(tmp_path: Path) -> None:
    def spec(family: str, *dropped: str) -> ModelSpec:
        config = config_of(tmp_path, family)
        return read_config({key: value for key, value in config.items() if key not in dropped}, "config.json")

    assert spec("llama", "num_key_value_heads").layers[0].attention.kv_heads == 4
    assert spec("llama", "eos_token_id", "bos_token_id").end_ids == (2,)
    assert spec("llama", "max_position_embeddings").context_tokens == 2048
    assert spec("qwen2", "eos_token_id", "bos_token_id").end_ids == ()
    assert spec("qwen3", "head_dim").layers[0].attention.head_dim == 128
    assert windows(spec("mistral", "sliding_window", "max_position_embeddings")) == [4096, 4096]


def test_windows_follow_each_familys_rules(tmp_path: Path) -> None:
    def of(family: str, **overrides: Any) -> list[int | None]:
        return windows(read_config(config_of(tmp_path, family, num_hidden_layers=3, **overrides), "config.json"))

    assert of("mistral", sliding_window=9) == [9, 9, 9]
    assert of("mistral", sliding_window=None) == [None] * 3
    assert of("mistral", sliding_window=256) == [None] * 3
    assert of("qwen2", sliding_window=9, max_window_layers=1) == [None] * 3
    assert of("qwen2", sliding_window=9, max_window_layers=1, use_sliding_window=True) == [None, 9, 9]
    types = ["sliding_attention", "full_attention", "sliding_attention"]
    assert of("qwen3", sliding_window=9, use_sliding_window=True, layer_types=types) == [9, None, 9]
    assert of("llama", sliding_window=256) == [None] * 3


def test_biases(tmp_path: Path) -> None:
    llama = read_config(config_of(tmp_path, "llama", attention_bias=True, mlp_bias=True), "config.json").layers[0]
    assert (llama.attention.qkv_bias, llama.attention.out_bias, llama.mlp.bias) == (True, True, True)
    qwen3 = read_config(config_of(tmp_path, "qwen3", attention_bias=True), "config.json").layers[0]
    assert (qwen3.attention.qkv_bias, qwen3.attention.out_bias, qwen3.mlp.bias) == (True, True, False)


def test_end_ids_may_be_a_list(tmp_path: Path) -> None:
    assert read_config(config_of(tmp_path, "llama", eos_token_id=[257, 5, 257]), "config.json").end_ids == (257, 5)


def test_harmless_fields_of_real_configurations_are_accepted(tmp_path: Path) -> None:
    extra = {
        **{"attention_dropout": 0.1, "initializer_range": 0.5, "pretraining_tp": 2, "use_cache": False, "transformers_version": "4.40"},
        **{"_name_or_path": "x", "use_mrope": False, "quantization_config": None, "unsloth_version": "1", "is_encoder_decoder": False},
        **{"output_hidden_states": False, "encoder_no_repeat_ngram_size": 0, "cross_attention_hidden_size": None, "pruned_heads": {}},
    }
    assert read_config(config_of(tmp_path, "llama", **extra), "config.json").dim == 64


REFUSED = {
    "family": ("llama", {"model_type": "gpt_neox"}, "model_type"),
    "class": ("llama", {"architectures": ["LlamaForSequenceClassification"]}, "architectures"),
    "activation": ("llama", {"hidden_act": "gelu"}, "hidden_act"),
    "quantization": ("llama", {"quantization_config": {"quant_method": "gptq"}}, "quantization_config"),
    "experts": ("mistral", {"num_local_experts": 8}, "num_local_experts"),
    "softcap": ("llama", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping"),
    "mrope": ("qwen2", {"use_mrope": True}, "use_mrope"),
    "unheard-of": ("qwen3", {"attention_sparsity_v9": 3}, "attention_sparsity_v9"),
    "llama-window": ("llama", {"sliding_window": 100}, "sliding_window"),
    "mistral-layer-types": ("mistral", {"sliding_window": 9, "layer_types": ["full_attention"] * 2}, "layer_types"),
    "layer-type": ("qwen3", {"layer_types": ["chunked_attention"] * 2}, "layer_types"),
    "layer-count": ("qwen3", {"layer_types": ["full_attention"]}, "layer_types"),
    "sliding-without-window": ("qwen2", {"layer_types": ["sliding_attention"] * 2}, "layer_types"),
    "zero-window": ("mistral", {"sliding_window": 0}, "sliding_window"),
    "kv-heads": ("llama", {"num_key_value_heads": 3}, "num_key_value_heads"),
    "indivisible": ("llama", {"hidden_size": 65}, "hidden_size"),
    "odd-head": ("llama", {"head_dim": 15}, "head_dim"),
    "no-size": ("llama", {"hidden_size": None}, "hidden_size"),
    "text-size": ("llama", {"hidden_size": "64"}, "hidden_size"),
    "true-size": ("llama", {"num_hidden_layers": True}, "num_hidden_layers"),
    "endless-layers": ("llama", {"num_hidden_layers": 10**9}, "num_hidden_layers"),
    "nan-eps": ("llama", {"rms_norm_eps": float("nan")}, "rms_norm_eps"),
    "end-id": ("llama", {"eos_token_id": 331}, "eos_token_id"),
    "tied-text": ("llama", {"tie_word_embeddings": "yes"}, "tie_word_embeddings"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_understood_is_refused_by_name(tmp_path: Path, case: str) -> None:
    family, overrides, name = REFUSED[case]
    with pytest.raises(CheckpointError, match=rf"config\.json: {name}\b") as refused:
        read_config(config_of(tmp_path, family, **overrides), "config.json")
    assert str(refused.value).count("\n") == 0


def test_an_unknown_family_learns_what_is_supported(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="llama, mistral, qwen2, qwen3, and this project's own version lines"):
        read_config(config_of(tmp_path, "llama", model_type="mamba"), "config.json")


@pytest.mark.parametrize("spelling", ["old", "new"])
def test_rope_spellings_agree(tmp_path: Path, spelling: str) -> None:
    rope = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "rope_theta": 5e5, "mscale": 0.7}
    config = json.loads(
        (build_tiny(tmp_path, "qwen3", rope=rope, spelling=spelling, max_position_embeddings=32) / "config.json").read_text()
    )
    spec = read_config(config, "config.json")
    assert (spec.rope.scaling, spec.rope.theta, spec.rope.factor) == (RopeScaling.YARN, 5e5, 4.0)
    assert (spec.rope.original_context, spec.rope.mscale, spec.context_tokens) == (32, 0.7, 128)
