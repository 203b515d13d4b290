"""What is sent: random text of about a given number of tokens, the same for the same seed, and the request bodies around it.

It does not know the server's tokenizer: a short common word stands for a token, and the row reports what the server counted.
Invariant: request i is a function of (seed, i) alone; the shared prefixes are functions of the seed.
"""

from __future__ import annotations

import base64
import random
import struct
import zlib
from collections.abc import Sequence
from typing import Literal, Protocol

import msgspec

from service.loadgen.arrivals import Count, NotNegative, Positive, Share, Whole

# Each is one token, behind a space, of the bundled model's small vocabulary too: n words are n tokens.
_TEXT = (
    "the of and to in is for that it with as was on are by be this from or an at not have but they you all can more will one if about"
    " which when what time also into only other new some could these two may then do first any now such like over man me even most after"
    " through where back before line right too means old same want show form set end does another must such here men read need us try"
    " kind hand again change"
)
_WORDS = _TEXT.split()


class Requests(Protocol):
    """What is sent, by number."""

    def path(self, index: int) -> str:
        """The route of request `index`, below the server's address."""

    def body(self, index: int) -> bytes:
        """Its JSON body."""

    def kind(self, index: int) -> str:
        """The word under which it is counted."""


class PromptPlan(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Requests of one shape: lengths in tokens (about), sampling and protocol. In a mix it is chosen with its `weight`.

    Both lengths vary by `length_spread` (0.5: from half to one and a half of what is given). The shared prefix is one of `prefixes`.
    `images` random pictures of `image_pixels` a side come with each chat message.
    """

    name: str = ""
    endpoint: Literal["completions", "chat"] = "completions"
    model: str = ""
    prompt_tokens: Count = 128
    shared_prefix_tokens: Whole = 0
    prefixes: Count = 1
    output_tokens: Count = 64
    length_spread: Share = 0.0
    images: Whole = 0
    image_pixels: Count = 64
    temperature: NotNegative = 0.0
    ignore_eos: bool = False
    weight: Positive = 1.0
    seed: Whole = 0

    def __post_init__(self) -> None:
        if self.shared_prefix_tokens > self.prompt_tokens:
            raise ValueError("shared_prefix_tokens must not exceed prompt_tokens")
        if self.images and self.endpoint != "chat":
            raise ValueError("images need the endpoint chat")

    def path(self, index: int) -> str:
        """The route."""
        del index
        return "/v1/chat/completions" if self.endpoint == "chat" else "/v1/completions"

    def kind(self, index: int) -> str:
        """The shape's name, else its model."""
        del index
        return self.name or self.model

    def text(self, index: int) -> str:
        """Prompt `index`: a shared prefix, then words of its own."""
        chosen = random.Random(f"choice {self.seed} {index}").randrange(self.prefixes) if self.prefixes > 1 else 0
        prefix = _words(f"prefix {self.seed} {chosen}" if chosen else f"prefix {self.seed}", self.shared_prefix_tokens)
        own = _words(f"{self.seed} {index}", max(0, self._length(self.prompt_tokens, index) - self.shared_prefix_tokens))
        return " ".join(prefix + own)

    def body(self, index: int) -> bytes:
        """The JSON body of request `index`, streaming with usage."""
        fields: dict[str, object] = {"model": self.model, "max_tokens": self._length(self.output_tokens, -index - 1)}
        fields |= {"temperature": self.temperature, "stream": True, "stream_options": {"include_usage": True}}
        if self.ignore_eos:
            fields["ignore_eos"] = True
        if self.endpoint == "chat":
            fields["messages"] = [{"role": "user", "content": self._content(index)}]
        else:
            fields["prompt"] = self.text(index)
        return msgspec.json.encode(fields)

    def _content(self, index: int) -> object:
        if not self.images:
            return self.text(index)
        pictures = (random_png(self.image_pixels, f"{self.seed} {index} {number}") for number in range(self.images))
        urls = ("data:image/png;base64," + base64.b64encode(picture).decode() for picture in pictures)
        return [*({"type": "image_url", "image_url": {"url": url}} for url in urls), {"type": "text", "text": self.text(index)}]

    def _length(self, tokens: int, index: int) -> int:
        if not self.length_spread:
            return tokens
        return max(1, round(tokens * random.Random(f"length {self.seed} {index}").uniform(1 - self.length_spread, 1 + self.length_spread)))


class Mix:
    """Requests of several shapes, each chosen with its weight; `sizes` (prompt, output tokens) of a trace go before a shape's own."""

    def __init__(self, plans: Sequence[PromptPlan], seed: int, sizes: Sequence[tuple[int, int]] = ()) -> None:
        self._plans, self._weights, self._seed, self._sizes = plans, [plan.weight for plan in plans], seed, sizes

    def path(self, index: int) -> str:
        """The route of request `index`."""
        return self._plan(index).path(index)

    def body(self, index: int) -> bytes:
        """The JSON body of request `index`."""
        plan = self._plan(index)
        if index < len(self._sizes):
            prompt, output = self._sizes[index]
            shared = min(plan.shared_prefix_tokens, prompt)
            plan = msgspec.structs.replace(plan, prompt_tokens=prompt, output_tokens=output, shared_prefix_tokens=shared, length_spread=0.0)
        return plan.body(index)

    def kind(self, index: int) -> str:
        """The name of request `index`'s shape."""
        return self._plan(index).kind(index)

    def _plan(self, index: int) -> PromptPlan:
        return random.Random(f"mix {self._seed} {index}").choices(self._plans, self._weights)[0]


def random_png(pixels: int, seed: str) -> bytes:
    """A PNG of `pixels` a side, RGB, of random blocks: so that it neither compresses to nothing nor costs much to make."""
    generator, size = random.Random(seed), max(1, pixels // 8)
    rows = []
    for _ in range(-(-pixels // size)):
        colours = [generator.randbytes(3) for _ in range(-(-pixels // size))]
        rows += [b"\0" + b"".join(colour * size for colour in colours)[: 3 * pixels]] * size
    header = struct.pack(">IIBBBBB", pixels, pixels, 8, 2, 0, 0, 0)
    parts = ((b"IHDR", header), (b"IDAT", zlib.compress(b"".join(rows[:pixels]), 1)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in parts
    )


def _words(seed: str, count: int) -> list[str]:
    return random.Random(seed).choices(_WORDS, k=count)
