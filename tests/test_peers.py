"""The other engines of `engine_speed`, without those engines: the pipe to one in an environment of its own, llama.cpp's order of rows, and
the int8 weights that vLLM reads; and our own service as a peer.

Whether llama.cpp answers as we do was checked with it, see `loadtests/llamacpp_peer.py`; it is not among what the tests install.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from loadtests.llamacpp_peer import LAYER_NAMES, gguf_name, in_pairs
from loadtests.peers import ChildPeer
from loadtests.served_peer import ServedPeer
from loadtests.vllm_peer import convert
from tests.tiny_models import build_tiny

CHILD = """
import json, sys
print("a library says something")
print(json.dumps({"arguments": sys.argv[1:]}), flush=True)
for line in sys.stdin:
    asked = json.loads(line)
    if not asked["generate"]:
        sys.exit(3)
    print(json.dumps({"prefill_s": 0.5, "decode_s": 0.25, "decoded": 7}), flush=True)
"""


def test_a_peer_over_a_pipe_says_what_it_is_and_runs_rounds(tmp_path: Path) -> None:
    script = tmp_path / "peer.py"
    script.write_text(CHILD)
    peer = ChildPeer(script, sys.executable, "MODEL", 2, 512)
    assert peer.about == {"arguments": ["MODEL", "2", "512"]}
    assert peer.run([(1, 2, 3), (4, 5, 6)], generate=6) == (6 / 0.5, 7 / 0.25)
    with pytest.raises(RuntimeError, match="ended with code 3"):
        peer.run([(1,)], generate=0)
    peer.close()


def test_our_own_service_is_a_peer(tmp_path: Path) -> None:
    peer = ServedPeer(build_tiny(tmp_path / "model", "llama"), tmp_path / "cache", ["--threads", "1", "--registry", "none"])
    speeds = [peer.run([(5, 6, 7), (8, 9, 10)], generate=24) for _ in range(5)]
    assert all(speed.prefill > 0 for speed in speeds)
    # All pieces of a round may lie in a socket together when a busy machine lets the client read.
    assert any(speed.decode > 0 for speed in speeds)
    for memory in (peer.about["ready"], peer.about["after_requests"]):
        assert memory["worker"] > memory["front_end"] > 1 << 20
    with pytest.raises(RuntimeError, match="context"):
        peer.run([(5, 6, 7), (8, 9, 10)], generate=1 << 20)
    peer.close()


def rotated(heads: np.ndarray, position: int, *, pairs: bool) -> np.ndarray:
    """[heads, size] rotated to a position: the two halves of a head against each other, or neighbours."""
    half = heads.shape[1] // 2
    angles = position * 100.0 ** (-np.arange(half) / half)
    first, second = (heads[:, ::2], heads[:, 1::2]) if pairs else (heads[:, :half], heads[:, half:])
    turned = first * np.cos(angles) - second * np.sin(angles), first * np.sin(angles) + second * np.cos(angles)
    return np.stack(turned, 2).reshape(heads.shape) if pairs else np.concatenate(turned, 1)


def test_rows_in_pairs_give_the_scores_of_rows_in_halves() -> None:
    draw = np.random.default_rng(0)
    heads, size, hidden = 3, 8, 16
    query, key = draw.normal(size=(2, heads * size, hidden))
    at, before = draw.normal(size=(2, hidden))

    def scores(query: np.ndarray, key: np.ndarray, *, pairs: bool) -> np.ndarray:
        mine, theirs = ((weight @ row).reshape(heads, size) for weight, row in ((query, at), (key, before)))
        return (rotated(mine, 7, pairs=pairs) * rotated(theirs, 3, pairs=pairs)).sum(1)

    expected = scores(query, key, pairs=False)
    np.testing.assert_allclose(scores(in_pairs(query, heads), in_pairs(key, heads), pairs=True), expected)
    assert not np.allclose(scores(query, key, pairs=True), expected)


def test_names_in_a_gguf_file() -> None:
    assert gguf_name("model.layers.11.self_attn.o_proj.weight") == "blk.11.attn_output.weight"
    assert [gguf_name("model.embed_tokens.weight"), gguf_name("model.norm.weight")] == ["token_embd.weight", "output_norm.weight"]
    assert len({gguf_name(f"model.layers.0.{name}.weight") for name in LAYER_NAMES}) == 9


def test_weights_in_int8_stand_for_the_weights(tmp_path: Path) -> None:
    source = build_tiny(tmp_path / "model", "llama")
    convert(source, tmp_path / "int8")
    before, after = (load_file(path / "model.safetensors") for path in (source, tmp_path / "int8"))
    products = [name for name in before if name.endswith("_proj.weight")]
    assert len(products) == 7 * json.loads((source / "config.json").read_text())["num_hidden_layers"]
    for name, weight in before.items():
        if name not in products:
            assert torch.equal(after[name], weight)
            continue
        scale = after[f"{name}_scale"]
        assert after[name].dtype == torch.int8 and scale.shape == (len(weight), 1)
        assert ((after[name].float() * scale - weight.float()).abs() <= 0.5001 * scale).all()
    assert json.loads((tmp_path / "int8" / "config.json").read_text())["quantization_config"]["quant_method"] == "compressed-tensors"
