"""Random checkpoints of known shapes in the Hugging Face layout, for speed measurements: the numbers do not depend on what weights say.

Knows only files; written once to a cache directory and reused. `python -m loadtests.shapes llama-385m DIR` writes one.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

SHAPES: dict[str, dict[str, int]] = {
    "llama-385m": {
        "hidden": 1280,
        "layers": 20,
        "heads": 20,
        "kv_heads": 4,
        "head_dim": 64,
        "mlp": 3456,
        "vocab": 32_000,
        "context": 16_384,
    },
    "llama-1b": {
        "hidden": 2048,
        "layers": 20,
        "heads": 16,
        "kv_heads": 8,
        "head_dim": 128,
        "mlp": 5504,
        "vocab": 32_000,
        "context": 4_096,
    },
    "llama-60m": {"hidden": 512, "layers": 8, "heads": 8, "kv_heads": 2, "head_dim": 64, "mlp": 1408, "vocab": 32_000, "context": 8_192},
}


def write_shape(name: str, directory: Path, dtype: torch.dtype = torch.float32) -> Path:
    """Write the checkpoint `name` of SHAPES into `directory` unless it is there already; returns the directory."""
    if (directory / "config.json").exists():
        return directory
    shape = SHAPES[name]
    directory.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(0)

    def random(*size: int) -> torch.Tensor:
        return (torch.randn(*size, generator=generator) * size[-1] ** -0.5).to(dtype)

    hidden, query, kv = shape["hidden"], shape["heads"] * shape["head_dim"], shape["kv_heads"] * shape["head_dim"]
    state = {"model.embed_tokens.weight": random(shape["vocab"], hidden), "model.norm.weight": torch.ones(hidden, dtype=dtype)}
    for index in range(shape["layers"]):
        stem = f"model.layers.{index}."
        state |= {
            stem + "self_attn.q_proj.weight": random(query, hidden),
            stem + "self_attn.k_proj.weight": random(kv, hidden),
            stem + "self_attn.v_proj.weight": random(kv, hidden),
            stem + "self_attn.o_proj.weight": random(hidden, query),
            stem + "mlp.gate_proj.weight": random(shape["mlp"], hidden),
            stem + "mlp.up_proj.weight": random(shape["mlp"], hidden),
            stem + "mlp.down_proj.weight": random(hidden, shape["mlp"]),
            stem + "input_layernorm.weight": torch.ones(hidden, dtype=dtype),
            stem + "post_attention_layernorm.weight": torch.ones(hidden, dtype=dtype),
        }
    save_file(state, directory / "model.safetensors", metadata={"format": "pt"})
    write_tokenizer(directory, shape["vocab"])
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": shape["mlp"],
        "num_hidden_layers": shape["layers"],
        "num_attention_heads": shape["heads"],
        "num_key_value_heads": shape["kv_heads"],
        "head_dim": shape["head_dim"],
        "vocab_size": shape["vocab"],
        "max_position_embeddings": shape["context"],
        "rms_norm_eps": 1e-5,
        "rope_theta": 10_000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": True,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "torch_dtype": str(dtype).removeprefix("torch."),
    }
    (directory / "config.json").write_text(json.dumps(config, indent=2))
    return directory


def write_tokenizer(directory: Path, vocabulary: int) -> None:
    """A byte-level tokenizer with filler entries, so that every id decodes to some text."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    entries = ["<s>", "</s>", *letters]
    entries += [f"w{index}" for index in range(vocabulary - len(entries))]
    tokenizer = Tokenizer(models.BPE(vocab={text: index for index, text in enumerate(entries)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = {"bos_token": "<s>", "eos_token": "</s>", "tokenizer_class": "PreTrainedTokenizerFast"}
    settings["chat_template"] = "{% for m in messages %}{{ m.content }}\n{% endfor %}"
    (directory / "tokenizer_config.json").write_text(json.dumps(settings, indent=2))


if __name__ == "__main__":
    write_shape(sys.argv[1], Path(sys.argv[2]))
