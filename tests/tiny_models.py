"""Builders of tiny random checkpoints: Hugging Face directories of the four families and this project's own lines.

Written directly (no `transformers`, no torch unless asked for `.bin`), so that any room's tests can have one in milliseconds.
Invariant: the same arguments give the same files.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

from service.checkpoints.own_format import own_config
from service.checkpoints.pieces import parameter_shapes
from service.types.catalog import V3_5, Shape, VersionLine
from service.types.vision import VisionSpec

SPECIAL_TOKENS = ("<|begin|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>")
IMAGE_TOKEN, IMAGE_ID = "<|image|>", 271
BEGIN_ID, END_ID = 256, 257
MERGES = (("Ġ", "t"), ("h", "e"), ("i", "n"), ("Ġt", "he"), ("r", "e"), ("Ġ", "a"), ("e", "r"), ("o", "n"), ("in", "g"), ("Ġ", "s"))
TOKENIZER_TOKENS = 256 + len(SPECIAL_TOKENS) + len(MERGES)
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] not in ['system', 'user', 'assistant'] %}"
    "{{ raise_exception('unknown role ' + message['role']) }}{% endif %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
_ARCHITECTURES = {"llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
_STORED_NAMES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
_SIZES: dict[str, Any] = {
    "vocab_size": 331,
    "hidden_size": 64,
    "intermediate_size": 112,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "bos_token_id": BEGIN_ID,
    "eos_token_id": END_ID,
}
_FAMILY_EXTRAS: dict[str, dict[str, Any]] = {
    "llama": {"attention_bias": False, "mlp_bias": False},
    "mistral": {"sliding_window": None},
    "qwen2": {"use_sliding_window": False, "sliding_window": None, "max_window_layers": 2},
    "qwen3": {"head_dim": 16, "attention_bias": False, "use_sliding_window": False, "sliding_window": None, "max_window_layers": 2},
}


def build_tiny(
    directory: Path,
    family: str = "llama",
    *,
    seed: int = 0,
    dtype: str = "float32",
    storage: str = "single",
    spelling: str = "old",
    rope: dict[str, Any] | None = None,
    generation: dict[str, Any] | None = None,
    **overrides: Any,
) -> Path:
    """Write a checkpoint of `family` with random weights and return its directory.

    `storage` is single, sharded or bin; `spelling` of RoPE is old (rope_theta, rope_scaling) or new (rope_parameters), `rope` its scaling
    (with `rope_theta`, `rope_type` and so on); `generation` is written as generation_config.json; `overrides` are keys of config.json
    (None drops nothing: it is written as null).
    """
    directory.mkdir(parents=True, exist_ok=True)
    config = {**_SIZES, **_FAMILY_EXTRAS[family], **overrides, "model_type": family, "architectures": [_ARCHITECTURES[family]]}
    config.update(_rope_keys(rope or {}, spelling))
    config["torch_dtype" if spelling == "old" else "dtype"] = dtype
    _write_json(directory / "config.json", config)
    if generation is not None:
        _write_json(directory / "generation_config.json", generation)
    write_tokenizer(directory)
    write_weights(directory, tiny_weights(config, seed), dtype, storage)
    return directory


def tiny_weights(config: dict[str, Any], seed: int = 0) -> dict[str, np.ndarray]:
    """Random float32 weights for that config.json, under their Hugging Face names."""
    draw = np.random.default_rng(seed)
    dim, hidden, family = config["hidden_size"], config["intermediate_size"], config["model_type"]
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    head_dim = config.get("head_dim") or dim // heads
    weights: dict[str, np.ndarray] = {}

    def matrix(name: str, outputs: int, inputs: int, bias: bool = False) -> None:
        weights[f"{name}.weight"] = draw.standard_normal((outputs, inputs), dtype=np.float32) * np.float32(1.2 / inputs**0.5)
        if bias:
            weights[f"{name}.bias"] = draw.standard_normal(outputs, dtype=np.float32) * np.float32(0.2)

    def norm(name: str, size: int) -> None:
        weights[f"{name}.weight"] = 1 + draw.standard_normal(size, dtype=np.float32) * np.float32(0.1)

    weights["model.embed_tokens.weight"] = draw.standard_normal((config["vocab_size"], dim), dtype=np.float32) * np.float32(0.3)
    qkv_bias = family == "qwen2" or bool(config.get("attention_bias"))
    out_bias = family != "qwen2" and bool(config.get("attention_bias"))
    for index in range(config["num_hidden_layers"]):
        layer = f"model.layers.{index}"
        norm(f"{layer}.input_layernorm", dim)
        matrix(f"{layer}.self_attn.q_proj", heads * head_dim, dim, qkv_bias)
        matrix(f"{layer}.self_attn.k_proj", kv_heads * head_dim, dim, qkv_bias)
        matrix(f"{layer}.self_attn.v_proj", kv_heads * head_dim, dim, qkv_bias)
        matrix(f"{layer}.self_attn.o_proj", dim, heads * head_dim, out_bias)
        if family == "qwen3":
            norm(f"{layer}.self_attn.q_norm", head_dim)
            norm(f"{layer}.self_attn.k_norm", head_dim)
        norm(f"{layer}.post_attention_layernorm", dim)
        mlp_bias = bool(config.get("mlp_bias"))
        matrix(f"{layer}.mlp.gate_proj", hidden, dim, mlp_bias)
        matrix(f"{layer}.mlp.up_proj", hidden, dim, mlp_bias)
        matrix(f"{layer}.mlp.down_proj", dim, hidden, mlp_bias)
    norm("model.norm", dim)
    if not config["tie_word_embeddings"]:
        matrix("lm_head", config["vocab_size"], dim)
    return weights


def tiny_eyes() -> VisionSpec:
    """A patch encoder of a few thousand parameters: image tokens of 4 × 4 pixels, 2 to 9 an image."""
    return VisionSpec(patch=2, merge=2, dim=16, layers=1, heads=2, mlp_hidden=24, least_tokens=2, most_tokens=9, side_tokens=6)


def build_tiny_line(directory: Path, line: VersionLine = V3_5, *, seed: int = 0, scale: float = 1.5, **overrides: Any) -> Path:
    """Write a checkpoint of a version line with random weights and, where it reads images, `tiny_eyes`; `overrides` are sizes."""
    directory.mkdir(parents=True, exist_ok=True)
    sizes = {"vocab_size": 300, "dim": 32, "layers": 4, "heads": 4, "kv_heads": 2, "mlp_hidden": 48, "context_tokens": 512, **overrides}
    shape = Shape(**{"vision": tiny_eyes() if line.reads_images else None, **sizes})
    spec = line.spec(shape, end_ids=(END_ID,), image_id=IMAGE_ID if shape.vision is not None else None)
    (directory / "config.yaml").write_text(own_config(spec), encoding="utf-8")
    draw = np.random.default_rng(seed)
    weights: dict[str, np.ndarray] = {}
    for name, size in parameter_shapes(spec).items():
        drawn = draw.standard_normal(size, dtype=np.float32)
        weights[name] = 1 + 0.1 * drawn if name.endswith("norm.weight") else drawn * np.float32(scale / size[-1] ** 0.5)
    write_safetensors(directory / "model.safetensors", weights)
    write_tokenizer(directory, further=(IMAGE_TOKEN,))
    files = {path.name: path.read_bytes() for path in sorted(directory.iterdir())}
    listed = {name: {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)} for name, data in files.items()}
    _write_json(directory / "manifest.json", {"format": 1, "version": line.number, "files": listed})
    return directory


def write_weights(directory: Path, weights: dict[str, np.ndarray], dtype: str = "float32", storage: str = "single") -> None:
    """Write `weights` as one safetensors file, as two files with an index, or as pytorch_model.bin."""
    if storage == "bin":
        import torch  # only `.bin` needs it

        tensors = {name: torch.from_numpy(value).to(getattr(torch, dtype)) for name, value in weights.items()}
        torch.save(tensors, directory / "pytorch_model.bin")
        return
    if storage == "single":
        write_safetensors(directory / "model.safetensors", weights, dtype)
        return
    names = sorted(weights)
    halves = (names[: len(names) // 2], names[len(names) // 2 :])
    places: dict[str, str] = {}
    for number, half in enumerate(halves, start=1):
        file = f"model-{number:05d}-of-00002.safetensors"
        write_safetensors(directory / file, {name: weights[name] for name in half}, dtype)
        places.update(dict.fromkeys(half, file))
    total = sum(value.size for value in weights.values()) * (4 if dtype == "float32" else 2)
    _write_json(directory / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": places})


def write_safetensors(path: Path, weights: dict[str, np.ndarray], dtype: str = "float32") -> None:
    """Write one safetensors file; values are float32 and rounded to `dtype`."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    pieces: list[bytes] = []
    end = 0
    for name, value in weights.items():
        pieces.append(_encode(value, dtype))
        start, end = end, end + len(pieces[-1])
        header[name] = {"dtype": _STORED_NAMES[dtype], "shape": list(value.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"".join(pieces))


def write_tokenizer(directory: Path, chat_template: str | None = CHAT_TEMPLATE, further: tuple[str, ...] = ()) -> None:
    """Write tokenizer.json and tokenizer_config.json: byte-level BPE of 271 tokens that puts <|begin|> before a text.

    `further` special tokens come behind the others.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {character: index for index, character in enumerate(alphabet)}
    for index, (left, right) in enumerate(MERGES):
        vocab[left + right] = 256 + len(SPECIAL_TOKENS) + index
    vocab.update({token: 256 + index for index, token in enumerate(SPECIAL_TOKENS)})
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=list(MERGES)))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in (*SPECIAL_TOKENS, *further)])
    tokenizer.post_processor = processors.TemplateProcessing(single="<|begin|> $A", special_tokens=[("<|begin|>", BEGIN_ID)])
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": SPECIAL_TOKENS[0],
        "eos_token": SPECIAL_TOKENS[1],
        "model_max_length": 256,
        "clean_up_tokenization_spaces": False,
    }
    if chat_template is not None:
        settings["chat_template"] = chat_template
    _write_json(directory / "tokenizer_config.json", settings)


def _rope_keys(rope: dict[str, Any], spelling: str) -> dict[str, Any]:
    theta = rope.get("rope_theta", 10_000.0)
    scaling = {key: value for key, value in rope.items() if key != "rope_theta"}
    if spelling == "new":
        return {"rope_parameters": {"rope_theta": theta, **scaling, "rope_type": rope.get("rope_type", "default")}}
    return {"rope_theta": theta, "rope_scaling": scaling or None}


def _encode(value: np.ndarray, dtype: str) -> bytes:
    if dtype == "bfloat16":
        bits = np.ascontiguousarray(value, np.float32).view(np.uint32)
        return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16).tobytes()
    return np.ascontiguousarray(value, dtype).tobytes()


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2), encoding="utf-8")
