"""Other engines that `engine_speed` runs beside ours, on the same prompts, round by round.

Each is optional: what is not installed is only missed when it is asked for. Invariant: a peer generates as many tokens as ours, greedily.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch


class Speed(NamedTuple):
    """One round: tokens per second."""

    prefill: float
    decode: float


class Peer(Protocol):
    """An engine that runs rounds."""

    def run(self, texts: list[tuple[int, ...]], generate: int) -> Speed:
        """One round of prompts at once."""

    def close(self) -> None:
        """Let its memory go."""


class TransformersPeer:
    """`transformers` generate on the same weights: static batch, float32, greedy."""

    def __init__(self, directory: Path) -> None:
        from transformers import AutoModelForCausalLM

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


class OpenVinoPeer:
    """OpenVINO GenAI in a Python environment of its own, see `openvino_peer.py`."""

    def __init__(self, python: str, directory: str, threads: int, step_tokens: int) -> None:
        script = str(Path(__file__).with_name("openvino_peer.py"))
        command = [python, script, directory, str(threads), str(step_tokens)]
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
        return Speed(tokens / took["prefill_s"], len(texts) * (generate - 1) / took["decode_s"])

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
