"""Log-probs of our loader and decoder against `transformers` on tiny checkpoints in awkward shapes, dense and over paged blocks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from service.checkpoints.load import load
from service.checkpoints.manifest import read_manifest
from service.kernels.kv_store import write_kv
from service.kernels.paged_attention import paged_attention
from service.models import layers
from service.models.attention import DenseAttend
from service.models.decoder import Decoder
from tests.tiny_models import build_tiny

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

PROMPT_TOKENS = 61
BLOCK_TOKENS = 8
TOLERANCE = 1e-4
SEVEN = {"num_attention_heads": 7, "num_key_value_heads": 1, "hidden_size": 112}
LLAMA3 = {"factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16}
YARN = {"factor": 4.0, "original_max_position_embeddings": 16}
WINDOWED = {"use_sliding_window": True, "sliding_window": 5, "num_hidden_layers": 3}

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-gqa1-odd": ("llama", {"num_key_value_heads": 4, "vocab_size": 337, "intermediate_size": 75}),
    "llama-gqa3-head-dim": ("llama", {"num_attention_heads": 6, "hidden_size": 66, "head_dim": 24}),
    "llama-gqa7-tied-sharded": ("llama", {**SEVEN, "tie_word_embeddings": True, "storage": "sharded"}),
    "llama-biases": ("llama", {"attention_bias": True, "mlp_bias": True, "rms_norm_eps": 1e-3}),
    "llama-theta-bf16": ("llama", {"rope": {"rope_theta": 500.0}, "dtype": "bfloat16", "storage": "bin"}),
    "llama-linear": ("llama", {"rope": {"rope_type": "linear", "factor": 4.0}, "max_position_embeddings": 16}),
    "llama-dynamic-inside": ("llama", {"rope": {"rope_type": "dynamic", "factor": 4.0}, "max_position_embeddings": 61}),
    "llama-llama3": ("llama", {"rope": {"rope_type": "llama3", **LLAMA3}, "max_position_embeddings": 64}),
    "llama-llama3-new": ("llama", {"rope": {"rope_type": "llama3", **LLAMA3}, "max_position_embeddings": 64, "spelling": "new"}),
    "llama-yarn": ("llama", {"rope": {"type": "yarn", **YARN}, "max_position_embeddings": 64}),
    "llama-yarn-factor": ("llama", {"rope": {"rope_type": "yarn", **YARN, "attention_factor": 0.7}, "max_position_embeddings": 64}),
    "llama-yarn-mscale": ("llama", {"rope": {"rope_type": "yarn", **YARN, "mscale": 0.8, "mscale_all_dim": 0.3, "beta_fast": 4}}),
    "llama-yarn-untruncated": ("llama", {"rope": {"rope_type": "yarn", **YARN, "truncate": False}, "spelling": "new"}),
    "mistral-window-gqa3": ("mistral", {"sliding_window": 7, "num_attention_heads": 6, "hidden_size": 96}),
    "mistral-window-one": ("mistral", {"sliding_window": 1, "head_dim": 18}),
    "mistral-full-tied-bin": ("mistral", {"tie_word_embeddings": True, "storage": "bin"}),
    "qwen2-windows-from-layer-1": ("qwen2", {**WINDOWED, "max_window_layers": 1, "sliding_window": 13}),
    "qwen2-yarn": ("qwen2", {"rope": {"type": "yarn", **YARN}, "max_position_embeddings": 16}),
    "qwen2-layer-types": ("qwen2", {**WINDOWED, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}),
    "qwen2-gqa7-tied-window-unused": ("qwen2", {**SEVEN, "tie_word_embeddings": True, "sliding_window": 3}),
    "qwen3-gqa7-head-dim": ("qwen3", {**SEVEN, "head_dim": 32, "storage": "sharded"}),
    "qwen3-biases-window": ("qwen3", {**WINDOWED, "attention_bias": True, "max_window_layers": 0, "sliding_window": 9}),
    "qwen3-linear-new-bin": ("qwen3", {"rope": {"rope_type": "linear", "factor": 3.0}, "spelling": "new", "storage": "bin"}),
}


class PagedAttend:
    """Keeps K/V of one sequence in shuffled blocks full of NaN, and gives back to null the blocks that a window has passed."""

    def __init__(self, decoder: Decoder, tokens: int) -> None:
        self.layers = decoder.spec.layers
        self.count = -(-tokens // BLOCK_TOKENS)
        self.order = torch.randperm(self.count, generator=torch.Generator().manual_seed(1)) + 1
        self.blocks = [self._empty(index) for index in range(len(self.layers))]
        self.start = self.length = 0

    def _empty(self, layer: int) -> tuple[Tensor, Tensor]:
        spec = self.layers[layer].attention
        shape = (self.count + 1, spec.kv_heads, BLOCK_TOKENS, spec.head_dim)
        return torch.full(shape, float("nan")), torch.full(shape, float("nan"))

    def __call__(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        spec = self.layers[layer].attention
        positions = torch.arange(self.start, self.start + self.length)
        keys, values = self.blocks[layer]
        write_kv(key, value, keys, values, self.order[positions // BLOCK_TOKENS], positions % BLOCK_TOKENS)
        table = self.order.clone()
        if spec.window is not None:
            table[: max(0, self.start - spec.window + 1) // BLOCK_TOKENS] = 0
        starts, context = torch.tensor([0, self.length]), torch.tensor([self.start + self.length])
        arguments = (table[None].int(), starts.int(), context.int())
        return paged_attention(query, keys, values, *arguments, scale=spec.head_dim**-0.5, window=spec.window)


def dense_logprobs(decoder: Decoder, tokens: Tensor) -> Tensor:
    count = len(tokens)
    return decoder(tokens, torch.arange(count), DenseAttend(1, count, decoder.spec.layers)).log_softmax(-1)


def paged_logprobs(decoder: Decoder, tokens: Tensor, step: int) -> Tensor:
    attend = PagedAttend(decoder, len(tokens))
    rows = []
    for start in range(0, len(tokens), step):
        part = tokens[start : start + step]
        attend.start, attend.length = start, len(part)
        rows.append(decoder(part, torch.arange(start, start + len(part)), attend))
    return torch.cat(rows).log_softmax(-1)


def reference_model(directory: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager").eval()


@pytest.fixture(params=CASES)
def checkpoint(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    family, arguments = CASES[request.param]
    return build_tiny(tmp_path / "model", family, seed=len(request.param), **arguments)


@torch.inference_mode()
def test_logprobs_equal_transformers(checkpoint: Path) -> None:
    decoder = load(read_manifest(checkpoint), "cpu", torch.float32)
    tokens = torch.randint(0, decoder.spec.vocab_size, (PROMPT_TOKENS,), generator=torch.Generator().manual_seed(2))
    expected = reference_model(checkpoint)(tokens[None]).logits[0].log_softmax(-1)
    assert expected.std() > 0.5
    torch.testing.assert_close(dense_logprobs(decoder, tokens), expected, rtol=0, atol=TOLERANCE)
    for step in (1, 5, PROMPT_TOKENS):
        torch.testing.assert_close(paged_logprobs(decoder, tokens, step), expected, rtol=0, atol=TOLERANCE)


@torch.inference_mode()
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_packed_weights_give_the_same_logprobs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str) -> None:
    """The layout of large matrices, forced upon small ones of odd sizes, with biases and without."""
    monkeypatch.setattr(layers, "PACK_ELEMENTS", 0)
    build_tiny(tmp_path, family, **SEVEN, vocab_size=333, intermediate_size=75)
    decoder = load(read_manifest(tmp_path), "cpu", torch.float32)
    tokens = torch.arange(PROMPT_TOKENS)
    expected = reference_model(tmp_path)(tokens[None]).logits[0].log_softmax(-1)
    for step in (1, 5, PROMPT_TOKENS):
        torch.testing.assert_close(paged_logprobs(decoder, tokens, step), expected, rtol=0, atol=TOLERANCE)


@torch.inference_mode()
def test_dynamic_rope_beyond_its_context_equals_transformers_fed_token_by_token(tmp_path: Path) -> None:
    build_tiny(tmp_path, "llama", rope={"rope_type": "dynamic", "factor": 4.0}, max_position_embeddings=16)
    decoder, reference = load(read_manifest(tmp_path), "cpu", torch.float32), reference_model(tmp_path)
    tokens = torch.randint(0, decoder.spec.vocab_size, (PROMPT_TOKENS,), generator=torch.Generator().manual_seed(2))
    cache, rows = None, []
    for token in tokens:
        answer = reference(token.view(1, 1), past_key_values=cache, use_cache=True)
        cache = answer.past_key_values
        rows.append(answer.logits[0, 0])
    expected = torch.stack(rows).log_softmax(-1)
    torch.testing.assert_close(dense_logprobs(decoder, tokens), expected, rtol=0, atol=TOLERANCE)
    for step in (1, 7, PROMPT_TOKENS):
        torch.testing.assert_close(paged_logprobs(decoder, tokens, step), expected, rtol=0, atol=TOLERANCE)


@torch.inference_mode()
@pytest.mark.parametrize("fault", ["window", "theta", "eps", "tied"])
def test_the_comparison_has_teeth(tmp_path: Path, fault: str) -> None:
    """A model that differs in one configuration value is told apart by the tolerance used above."""
    values: dict[str, Any] = {"sliding_window": 7}
    changed: dict[str, Any] = {
        "window": {"sliding_window": 8},
        "theta": {"rope": {"rope_theta": 9_000.0}},
        "eps": {"rms_norm_eps": 1e-3},
        "tied": {"tie_word_embeddings": True},
    }[fault]
    build_tiny(tmp_path / "right", "mistral", **values)
    build_tiny(tmp_path / "wrong", "mistral", **{**values, **changed})
    tokens = torch.arange(PROMPT_TOKENS)
    right, wrong = (dense_logprobs(load(read_manifest(tmp_path / name), "cpu", torch.float32), tokens) for name in ("right", "wrong"))
    assert (right - wrong).abs().max() > 10 * TOLERANCE


@torch.inference_mode()
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_directories_written_by_transformers_load(tmp_path: Path, family: str) -> None:
    """What save_pretrained of today writes (its config spelling, its sharding) is read back with equal results."""
    reference = reference_model(build_tiny(tmp_path / "ours", family, max_position_embeddings=64))
    reference.save_pretrained(tmp_path / "single")
    reference.save_pretrained(tmp_path / "sharded", max_shard_size="100KB")
    assert (tmp_path / "sharded" / "model.safetensors.index.json").is_file()
    tokens = torch.arange(PROMPT_TOKENS)
    expected = reference(tokens[None]).logits[0].log_softmax(-1)
    for name in ("single", "sharded"):
        decoder = load(read_manifest(tmp_path / name), "cpu", torch.float32)
        torch.testing.assert_close(dense_logprobs(decoder, tokens), expected, rtol=0, atol=TOLERANCE)


@torch.inference_mode()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_weights_stay_near(tmp_path: Path, dtype: torch.dtype) -> None:
    manifest = read_manifest(build_tiny(tmp_path, "qwen3"))
    tokens = torch.arange(PROMPT_TOKENS)
    exact = dense_logprobs(load(manifest, "cpu", torch.float32), tokens)
    decoder = load(manifest, "cpu", dtype)
    rounded = dense_logprobs(decoder, tokens).float()
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype, attn_implementation="eager")
    their_error = (theirs(tokens[None]).logits[0].float().log_softmax(-1) - exact).abs().max()
    assert 0 < (rounded - exact).abs().max() <= 2 * their_error
    assert decoder.weight_bytes == 2 * manifest.spec.parameters
