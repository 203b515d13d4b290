"""Other engines that `engine_speed` and `gpu_serving` run beside ours, on the same prompts, round by round.

Each is optional: what is not installed is only missed when it is asked for. Invariant: a peer generates as many tokens as ours, greedily.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch

from service.checkpoints.pieces import match_hugging_face
from service.types.model_spec import ModelSpec

# Tokens of a block of the cache of transformers' continuous batching.
CACHE_BLOCK_TOKENS = 256


class Speed(NamedTuple):
    """One round: prompt tokens per second until the last sequence has its first token, and what is generated after that, per second."""

    prefill: float
    decode: float


class Run(NamedTuple):
    """One round, token by token: when it began, and for each sequence when its tokens came and what they are."""

    began_s: float
    times_s: list[list[float]]
    tokens: list[list[int]]


class Peer(Protocol):
    """An engine that runs rounds; `about` says what it is, for the row."""

    about: dict[str, Any]

    def run(self, texts: list[tuple[int, ...]], generate: int) -> Speed:
        """One round of prompts at once."""

    def close(self) -> None:
        """Let its memory go."""


class TransformersPeer:
    """`transformers` generate on the same weights: static batch, float32, greedy."""

    def __init__(self, directory: Path) -> None:
        from transformers import AutoModelForCausalLM, __version__

        self.about: dict[str, Any] = {"version": __version__}
        self._model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()

    @torch.inference_mode()
    def run(self, texts: list[tuple[int, ...]], generate: int) -> Speed:
        """One round. The logits of each step pass a processor, whose first call ends the prefill."""
        from transformers import LogitsProcessorList

        calls: list[float] = []

        def note_time(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            calls.append(time.perf_counter())
            return scores

        ids = torch.tensor(texts)
        began = time.perf_counter()
        self._model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            pad_token_id=1,
            eos_token_id=None,
            max_new_tokens=generate,
            min_new_tokens=generate,
            logits_processor=LogitsProcessorList([note_time]),
        )
        end = time.perf_counter()
        return Speed(ids.numel() / (calls[0] - began), len(texts) * (generate - 1) / (end - calls[0]))

    def close(self) -> None:
        """Let the weights go."""
        del self._model


class ChildPeer:
    """An engine in a Python environment of its own that answers rounds over a pipe, such as `openvino_peer.py`."""

    def __init__(self, script: Path, python: str, model: str, threads: int, step_tokens: int) -> None:
        command = [python, str(script), model, str(threads), str(step_tokens)]
        self._child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.about = self._answer()

    def run(self, texts: list[tuple[int, ...]], generate: int) -> Speed:
        """One round."""
        if self._child.stdin is None:
            raise RuntimeError("the peer has no stdin")
        self._child.stdin.write(json.dumps({"prompts": texts, "generate": generate}) + "\n")
        self._child.stdin.flush()
        took = self._answer()
        tokens = sum(len(text) for text in texts)
        return Speed(tokens / took["prefill_s"], took["decoded"] / took["decode_s"])

    def close(self) -> None:
        """End the child."""
        if self._child.stdin is not None:
            self._child.stdin.close()
        self._child.wait(timeout=60)

    def _answer(self) -> dict[str, Any]:
        """The next line that is JSON: libraries print too."""
        for line in self._child.stdout or ():
            if line.startswith("{"):
                answer: dict[str, Any] = json.loads(line)
                return answer
            print(line, end="", file=sys.stderr)
        raise RuntimeError(f"the peer ended with code {self._child.wait()}")


class ContinuousBatchingPeer:
    """`transformers` continuous batching of a llama on the very weights of our decoder, which `weights` names; greedy, no prefix sharing.

    It takes flash attention where that is installed, and sizes its cache by itself where there is a GPU.
    """

    def __init__(self, spec: ModelSpec, weights: Mapping[str, torch.Tensor]) -> None:
        self._library, place = transformers_library(), weights["embed.weight"]
        with torch.device(place.device):
            self._model = self._library.AutoModelForCausalLM.from_config(llama_config(spec), dtype=place.dtype).eval().requires_grad_(False)
        own = dict(self._model.named_parameters())
        for piece in match_hugging_face(spec, {name: tuple(weight.shape) for name, weight in own.items()}).pieces:
            own[piece.source].data = weights[piece.target][piece.first_row : piece.first_row + piece.shape[0]]
        self._config: Any = None

    def prepare(self, sequences: int, context: int, step_tokens: int) -> None:
        """Runs from now on are of so many sequences of up to `context` tokens, in steps of at most `step_tokens`."""
        self._model.destroy_cached_continuous_batching_manager()
        blocks = None if self._model.device.type == "cuda" else 2 * sequences * (context // CACHE_BLOCK_TOKENS + 2)
        self._config = self._library.ContinuousBatchingConfig(num_blocks=blocks, max_batch_tokens=step_tokens, allow_block_sharing=False)

    def run(self, texts: list[tuple[int, ...]], generate: int) -> Run:
        """One round. Raises RuntimeError with its words where a sequence failed."""
        greedy = {"do_sample": False, "eos_token_id": -1, "pad_token_id": 0, "max_new_tokens": generate}
        found = self._model.generate_batch(
            [list(text) for text in texts],
            generation_config=self._library.GenerationConfig(**greedy),
            continuous_batching_config=self._config,
            record_timestamps=True,
            persistent_manager=True,
            max_new_tokens=generate,
        )
        outputs = list(found.values())
        wrong = next((output.error for output in outputs if output.error), None)
        if wrong or len(outputs) != len(texts) or any(len(output.generated_tokens) != generate for output in outputs):
            raise RuntimeError(wrong or "a sequence of transformers ended before it had all its tokens")
        began_s = min(output.created_time for output in outputs)
        return Run(began_s, [list(output.timestamps) for output in outputs], [list(output.generated_tokens) for output in outputs])

    def close(self) -> None:
        """Let its cache and the model go; the weights are ours."""
        self._model.destroy_cached_continuous_batching_manager()
        del self._model


def transformers_library() -> Any:
    """The package, imported when it is needed; to a type checker it is anything."""
    import transformers

    return transformers


def llama_config(spec: ModelSpec) -> Any:
    """The configuration of transformers for a plain llama of ours."""
    layer = spec.layers[0]
    return transformers_library().LlamaConfig(
        vocab_size=spec.vocab_size,
        hidden_size=spec.dim,
        intermediate_size=layer.mlp.hidden,
        num_hidden_layers=len(spec.layers),
        num_attention_heads=layer.attention.heads,
        num_key_value_heads=layer.attention.kv_heads,
        head_dim=layer.attention.head_dim,
        max_position_embeddings=spec.context_tokens,
        rms_norm_eps=spec.norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": spec.rope.theta},
        tie_word_embeddings=spec.tied_embeddings,
        bos_token_id=None,
        eos_token_id=None,
    )
