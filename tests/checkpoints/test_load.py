from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from service.checkpoints.hugging_face import FAMILIES
from service.checkpoints.load import load
from service.checkpoints.manifest import read_manifest
from service.models.attention import DenseAttend
from service.models.layers import DIFFERENTIABLE, Linear
from service.types.errors import CheckpointError
from tests.tiny_models import build_tiny, tiny_weights, write_weights

TOKENS = torch.arange(20)


def config_of(directory: Path) -> dict[str, object]:
    values: dict[str, object] = json.loads((directory / "config.json").read_text())
    return values


@pytest.mark.parametrize("family", FAMILIES)
def test_fused_weights_are_the_stored_ones_in_order(tmp_path: Path, family: str) -> None:
    directory = build_tiny(tmp_path, family, seed=5)
    decoder = load(read_manifest(directory), "cpu", torch.float32, serving=False)
    stored = {name: torch.from_numpy(value) for name, value in tiny_weights(config_of(directory), 5).items()}
    state = decoder.state_dict()
    layer = "model.layers.1."
    qkv = [stored[f"{layer}self_attn.{part}_proj.weight"] for part in "qkv"]
    assert torch.equal(state["layers.1.attention.qkv.weight"], torch.cat(qkv))
    gate_up = [stored[f"{layer}mlp.{part}_proj.weight"] for part in ("gate", "up")]
    assert torch.equal(state["layers.1.mlp.gate_up.weight"], torch.cat(gate_up))
    assert torch.equal(state["layers.1.mlp_norm.weight"], stored[f"{layer}post_attention_layernorm.weight"])
    assert torch.equal(state["head.weight"], stored["lm_head.weight"])
    assert sum(parameter.numel() for parameter in decoder.parameters()) == decoder.spec.parameters
    assert all(not parameter.requires_grad for parameter in decoder.parameters())


@torch.inference_mode()
def test_serving_packs_every_linear_and_keeps_the_function(tmp_path: Path) -> None:
    manifest = read_manifest(build_tiny(tmp_path, "qwen2"))
    plain, packed = load(manifest, "cpu", torch.float32, serving=False), load(manifest, "cpu", torch.float32)
    attend = DenseAttend(1, len(TOKENS), manifest.spec.layers)
    torch.testing.assert_close(packed(TOKENS, TOKENS, attend), plain(TOKENS, TOKENS, attend), rtol=1e-4, atol=1e-4)
    linears = [module for module in packed.modules() if isinstance(module, Linear)]
    assert len(linears) == 2 * 4 + 1
    assert all(linear.weight is None and linear.packed is not None and linear.kernels is not DIFFERENTIABLE for linear in linears)
    assert packed.weight_bytes == plain.weight_bytes == manifest.weight_bytes
    assert not packed.training


def test_progress_counts_every_byte(tmp_path: Path) -> None:
    manifest = read_manifest(build_tiny(tmp_path, dtype="bfloat16", storage="sharded"))
    seen: list[tuple[int, int]] = []
    load(manifest, "cpu", torch.float32, lambda done, total: seen.append((done, total)))
    assert seen[-1] == (4 * manifest.spec.parameters, 4 * manifest.spec.parameters)
    assert [done for done, _ in seen] == sorted({done for done, _ in seen})


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", ["model.layers.1.self_attn.v_proj.weight", "model.norm.weight", "lm_head.weight"])
def test_values_that_are_not_finite_are_named(tmp_path: Path, name: str, value: float) -> None:
    directory = build_tiny(tmp_path)
    weights = tiny_weights(config_of(directory))
    weights[name].flat[-1] = value
    write_weights(directory, weights)
    with pytest.raises(CheckpointError, match=rf"^{name} holds values that are not finite"):
        load(read_manifest(directory), "cpu", torch.float32)


def test_values_too_large_for_the_dtype_are_named(tmp_path: Path) -> None:
    directory = build_tiny(tmp_path)
    weights = tiny_weights(config_of(directory))
    weights["model.norm.weight"][3] = 1e6
    write_weights(directory, weights)
    with pytest.raises(CheckpointError, match=r"^model\.norm\.weight has values too large for float16"):
        load(read_manifest(directory), "cpu", torch.float16)
    load(read_manifest(directory), "cpu", torch.bfloat16)


def test_a_second_copy_of_a_tied_head_must_be_equal(tmp_path: Path) -> None:
    directory = build_tiny(tmp_path, tie_word_embeddings=True)
    weights = tiny_weights(config_of(directory))
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].copy()
    write_weights(directory, weights)
    load(read_manifest(directory), "cpu", torch.bfloat16)
    weights["lm_head.weight"][7, 7] += 1
    write_weights(directory, weights)
    with pytest.raises(CheckpointError, match=r"lm_head\.weight differs from model\.embed_tokens\.weight"):
        load(read_manifest(directory), "cpu", torch.float32)


def test_bin_files_are_checked_like_safetensors(tmp_path: Path) -> None:
    directory = build_tiny(tmp_path, storage="bin")
    weights = tiny_weights(config_of(directory))
    del weights["model.norm.weight"]
    write_weights(directory, weights, storage="bin")
    with pytest.raises(CheckpointError, match=r"lack model\.norm\.weight"):
        load(read_manifest(directory), "cpu", torch.float32)


PEAK = """
import sys, torch
from pathlib import Path
from service.checkpoints.load import load
from service.checkpoints.manifest import read_manifest
def kibibytes(field):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(field))
torch.set_num_threads(1)
warm = load(read_manifest(Path(sys.argv[1])), "cpu", torch.float32)
before = kibibytes("VmRSS")
decoder = load(read_manifest(Path(sys.argv[2])), "cpu", torch.float32)
print(1024 * (kibibytes("VmHWM") - before), decoder.weight_bytes)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_loading_holds_the_model_and_one_matrix(tmp_path: Path) -> None:
    """About 200 MiB with a largest matrix of 64 MiB: the peak stays under the model, one matrix and a few chunks."""
    build_tiny(tmp_path / "warm")
    sizes = {"hidden_size": 1024, "intermediate_size": 8192, "num_hidden_layers": 2, "vocab_size": 300}
    build_tiny(tmp_path / "large", num_attention_heads=16, **sizes)
    command = [sys.executable, "-c", PEAK, str(tmp_path / "warm"), str(tmp_path / "large")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    taken, weight_bytes = (int(word) for word in done.stdout.split())
    assert weight_bytes > 200 << 20
    assert taken < weight_bytes + (64 << 20) + (32 << 20)
