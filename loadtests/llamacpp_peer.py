"""llama.cpp as a peer of `engine_speed`: continuous batching through its C interface, one round a line of stdin; and its file.

Runs in an environment of its own (`pip install llama-cpp-python gguf safetensors`); it imports nothing of ours. A Hugging Face llama with
tied embeddings becomes a GGUF file there with `python llamacpp_peer.py convert DIR OUT.gguf q8_0` (or q4_0, f16, f32; every matrix of that
type, the embeddings too, which llama.cpp's own tool leaves in Q6_K beside q4_0); `python llamacpp_peer.py OUT.gguf THREADS STEP_TOKENS`
serves rounds. Invariant: a round's times are those of the library's own steps: the first token of every sequence ends the prefill.

Checked on llama-385m beside `transformers` in float32, five prompts of 40 to 156 tokens at once, 24 greedy tokens each. An f16 file gives
the same 120 tokens, also in steps of 64; an f32 file leaves them only where the two best logits are within 0.002 (the KV cache is f16),
q8_0 within 0.05. Without the order of `in_pairs` all five differ, by the seventh token at the latest. q4_0 gives other tokens (random
weights are far from 4 bits), but those of an f16 file of the same rounded weights for 2 to 24 tokens.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

LAYER_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
KEPT_TOGETHER = 256  # llama.cpp rounds the room of a sequence up to a multiple of this.


def in_pairs(weight: Any, heads: int) -> Any:
    """Rows of a q or k matrix in llama.cpp's order: it rotates neighbours, Hugging Face the two halves of a head."""
    rows, columns = weight.shape
    return weight.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)


def gguf_name(name: str) -> str:
    """The GGUF name of a parameter of a Hugging Face llama."""
    if name == "model.embed_tokens.weight":
        return "token_embd.weight"
    if name == "model.norm.weight":
        return "output_norm.weight"
    layer, _, rest = name.removeprefix("model.layers.").partition(".")
    return f"blk.{layer}.{LAYER_NAMES[rest.removesuffix('.weight')]}.weight"


def convert(directory: str, out: str, kind: str) -> None:
    """Write the checkpoint in `directory` as the GGUF file `out`, its matrices in `kind` (q8_0, q4_0, f16 or f32)."""
    import gguf
    from safetensors import safe_open

    config = json.loads((Path(directory) / "config.json").read_text("utf-8"))
    if config["model_type"] != "llama" or not config["tie_word_embeddings"]:
        raise ValueError("only a llama with tied embeddings can be converted")
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    writer = gguf.GGUFWriter(out, "llama")
    describe(writer, config)
    writer.add_file_type(gguf.LlamaFileType[f"MOSTLY_{kind.upper()}" if kind != "f32" else "ALL_F32"])
    with safe_open(Path(directory) / "model.safetensors", "numpy") as tensors:
        for name in tensors.keys():  # noqa: SIM118 (an object of another kind than dict)
            weight = tensors.get_tensor(name).astype(np.float32)
            if "q_proj" in name or "k_proj" in name:
                weight = in_pairs(weight, heads if "q_proj" in name else kv_heads)
            stored = gguf.GGMLQuantizationType[kind.upper() if weight.ndim == 2 else "F32"]
            writer.add_tensor(gguf_name(name), gguf.quantize(np.ascontiguousarray(weight), stored), raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def describe(writer: Any, config: dict[str, Any]) -> None:
    """The sizes of the model, and no tokenizer: prompts come as ids."""
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("no_vocab")


class Engine:
    """A model and, while rounds keep their shape, one context; precision, KV cache and attention as llama.cpp has them by default."""

    def __init__(self, path: str, threads: int, step_tokens: int) -> None:
        import llama_cpp

        self._library, self._threads, self._step_tokens = llama_cpp, threads, step_tokens
        llama_cpp.llama_backend_init()
        self._model = llama_cpp.llama_model_load_from_file(path.encode(), llama_cpp.llama_model_default_params())
        if self._model is None:
            raise RuntimeError(f"llama.cpp does not load {path}")
        self._vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model))
        self._batch = llama_cpp.llama_batch_init(step_tokens, 0, 1)
        self._context: Any = None
        self._shape = (0, 0)

    def room(self, sequences: int, tokens: int) -> None:
        """An empty context for so many sequences of so many tokens; one that is there already with this shape stays."""
        shape = (sequences, -(-tokens // KEPT_TOGETHER) * KEPT_TOGETHER)
        if shape != self._shape:
            if self._context is not None:
                self._library.llama_free(self._context)
            wanted = self._library.llama_context_default_params()
            wanted.n_seq_max, wanted.n_ctx = sequences, sequences * shape[1]
            wanted.n_batch = wanted.n_ubatch = self._step_tokens
            wanted.n_threads = wanted.n_threads_batch = self._threads
            self._context, self._shape = self._library.llama_init_from_model(self._model, wanted), shape
            if self._context is None:
                raise RuntimeError(f"llama.cpp has no context for {shape[0]} sequences of {shape[1]} tokens")
        self._library.llama_memory_clear(self._library.llama_get_memory(self._context), False)

    def step(self, rows: list[tuple[int, int, int, bool]]) -> Any:
        """Compute rows of (token, position, sequence, whether its next token is wanted); the likeliest next tokens, in order."""
        batch, wanted = self._batch, 0
        for index, (token, position, sequence, last) in enumerate(rows):
            batch.token[index], batch.pos[index], batch.logits[index] = token, position, last
            batch.n_seq_id[index], batch.seq_id[index][0] = 1, sequence
            wanted += last
        batch.n_tokens = len(rows)
        if (code := self._library.llama_decode(self._context, batch)) != 0:
            raise RuntimeError(f"llama.cpp answered {code} to a step of {len(rows)} rows")
        if not wanted:
            self._library.llama_synchronize(self._context)
            return ()
        logits = np.ctypeslib.as_array(self._library.llama_get_logits(self._context), (wanted, self._vocabulary))
        return logits.argmax(axis=1).tolist()

    def run(self, prompts: list[list[int]], generate: int) -> tuple[float, float, int, list[list[int]]]:
        """(seconds to the last first token, seconds from there to the end, tokens in these, all tokens) of one round, greedy and past every
        end token.
        """
        self.room(len(prompts), max(map(len, prompts)) + generate)
        waiting = [
            (token, position, sequence, position == len(prompt) - 1)
            for sequence, prompt in enumerate(prompts)
            for position, token in enumerate(prompt)
        ]
        found: list[list[int]] = [[] for _ in prompts]
        began = time.perf_counter()
        first, before = 0.0, 0
        while not all(len(tokens) == generate for tokens in found):
            rows = [
                (tokens[-1], len(prompts[sequence]) + len(tokens) - 1, sequence, True)
                for sequence, tokens in enumerate(found)
                if 0 < len(tokens) < generate
            ]
            taken = self._step_tokens - len(rows)
            rows += waiting[:taken]
            del waiting[:taken]
            for token, sequence in zip(self.step(rows), [row[2] for row in rows if row[3]], strict=True):
                found[sequence].append(token)
            if not first and all(found):
                first, before = time.perf_counter(), sum(map(len, found))
        return first - began, time.perf_counter() - first, sum(map(len, found)) - before, found


def serve(path: str, threads: int, step_tokens: int) -> None:
    """Serve rounds: {"prompts": …, "generate": …} in, {"prefill_s": …, "decode_s": …, "decoded": …, "tokens": …} out; the first line says
    what it is.
    """
    began = time.perf_counter()
    engine = Engine(path, threads, step_tokens)
    import llama_cpp

    about = {"version": llama_cpp.__version__, "system": llama_cpp.llama_print_system_info().decode()}
    print(json.dumps({"loaded_s": time.perf_counter() - began, **about}), flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        prefill_s, decode_s, decoded, tokens = engine.run(asked["prompts"], asked["generate"])
        print(json.dumps({"prefill_s": prefill_s, "decode_s": decode_s, "decoded": decoded, "tokens": tokens}), flush=True)


def main() -> None:
    """`convert DIR OUT KIND`, or rounds over `MODEL THREADS STEP_TOKENS`."""
    if sys.argv[1] == "convert":
        convert(sys.argv[2], sys.argv[3], sys.argv[4])
    else:
        serve(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))


if __name__ == "__main__":
    main()
