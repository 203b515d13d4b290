"""What is sent: random text of about a given number of tokens, the same for the same seed, and the request bodies around it.

It does not know the server's tokenizer: a short common word stands for a token, and the row reports what the server counted.
Invariant: prompt i is a function of (seed, i) alone; the shared prefix is a function of the seed.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import msgspec

_TEXT = (
    "the of and to in is for that it with as was on are by be this from or an at not have but they you all can more will one if about"
    " which when what time also into only other new some could these two may then do first any my now such like our over man me even most"
    " made after said through where back much before line right too means old same tell boy came want show form three small set put end"
    " does another well large must big such turn here why ask went men read need land us home move try kind hand picture again change"
)
_WORDS = _TEXT.split()


@dataclass(frozen=True, slots=True)
class PromptPlan:
    """The requests' shape: lengths in tokens (about), sampling and protocol. `endpoint` is `completions` or `chat`."""

    endpoint: str = "completions"
    model: str = ""
    prompt_tokens: int = 128
    shared_prefix_tokens: int = 0
    output_tokens: int = 64
    temperature: float = 0.0
    ignore_eos: bool = False
    seed: int = 0

    @property
    def path(self) -> str:
        """The route below `/v1`."""
        return "chat/completions" if self.endpoint == "chat" else "completions"

    def text(self, index: int) -> str:
        """Prompt `index`: the shared prefix, then words of its own."""
        prefix = _words(f"prefix {self.seed}", self.shared_prefix_tokens)
        own = _words(f"{self.seed} {index}", max(0, self.prompt_tokens - self.shared_prefix_tokens))
        return " ".join(prefix + own)

    def body(self, index: int) -> bytes:
        """The JSON body of request `index`, streaming with usage."""
        fields: dict[str, object] = {"model": self.model, "max_tokens": self.output_tokens, "temperature": self.temperature, "stream": True}
        fields["stream_options"] = {"include_usage": True}
        if self.ignore_eos:
            fields["ignore_eos"] = True
        if self.endpoint == "chat":
            fields["messages"] = [{"role": "user", "content": self.text(index)}]
        else:
            fields["prompt"] = self.text(index)
        return msgspec.json.encode(fields)


def _words(seed: str, count: int) -> list[str]:
    return random.Random(seed).choices(_WORDS, k=count)
