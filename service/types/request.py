"""What a request asks and what comes back, after HTTP and before any scheduling.

Plain frozen data that crosses the process boundary. It does not know JSON field names of any protocol,
text of the prompt (only token ids) or time zones (`deadline_s` is the monotonic clock of the parent).
Invariant: a GenerationRequest describes exactly one sequence; `n` choices and prompt lists are several requests.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import NamedTuple


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the next token is drawn. Defaults are the OpenAI protocol's.

    `temperature` 0 is greedy. `top_k` 0 and `min_p` 0 are off. Order: penalties and bias on the logits, temperature, top_k,
    top_p, min_p, then one draw. Randomness is a function of (`seed`, `choice`, position) alone. `logprobs` is the number of alternatives to
    report beside the sampled token (0: only the sampled one; None: no log-probs), from the distribution before temperature
    and filters.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    seed: int = 0
    choice: int = 0
    logprobs: int | None = None


@dataclass(frozen=True, slots=True)
class Stop:
    """When a sequence ends. `token_ids` are the version's end tokens plus the request's; both are forbidden before `min_tokens`.

    `ignore_eos` drops the version's end tokens (`end_ids`) but keeps the request's own (`token_ids`). `strings` end the text before
    the match. `max_tokens` counts generated tokens and is at least 1 (0 is allowed with prompt log-probs: score the prompt only).
    """

    max_tokens: int
    min_tokens: int = 0
    strings: tuple[str, ...] = ()
    token_ids: tuple[int, ...] = ()
    end_ids: tuple[int, ...] = ()
    ignore_eos: bool = False

    @property
    def effective_ids(self) -> frozenset[int]:
        """The token ids that end this sequence."""
        return frozenset(self.token_ids) | (frozenset() if self.ignore_eos else frozenset(self.end_ids))


@dataclass(frozen=True, slots=True)
class ImageInput:
    """One image of a prompt: its `rows` × `columns` image tokens begin at position `start`, one after the other, row by row.

    `pixels` are RGB bytes, row by row, of exactly the size that the version's grid asks for. `digest` (hex) names grid and pixels: equal
    digests mean equal image tokens.
    """

    start: int
    rows: int
    columns: int
    digest: str
    pixels: bytes = field(repr=False)

    @property
    def tokens(self) -> int:
        """Image tokens in all."""
        return self.rows * self.columns

    @property
    def end(self) -> int:
        """The position behind the last image token."""
        return self.start + self.tokens


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """One sequence to generate.

    `request_id` is the HTTP request's; the choices of one request share it. `version` is the served name asked for.
    `tenant` is the caller (fair share of the queue), `priority` orders the queue (lower runs first), `cache_salt` separates prefix
    caches, `adapter` names a LoRA adapter (None until adapters are served; anything else is refused by name).
    `deadline_s` is an absolute monotonic time. `prompt_logprobs` like `Sampling.logprobs`, for the prompt's own tokens. `route` is the
    HTTP route it came by, a label of the latency metrics. `images` stand in the prompt in order of `start`, without overlap.
    """

    request_id: str
    version: str
    prompt: tuple[int, ...]
    stop: Stop
    sampling: Sampling = field(default_factory=Sampling)
    deadline_s: float = float("inf")
    tenant: str = ""
    priority: int = 0
    cache_salt: str = ""
    adapter: str | None = None
    prompt_logprobs: int | None = None
    route: str = ""
    images: tuple[ImageInput, ...] = ()

    @property
    def image_tokens(self) -> int:
        """How many of the prompt's tokens stand for images."""
        return sum(image.tokens for image in self.images)

    @property
    def pixel_bytes(self) -> int:
        """Bytes of the images' pixels."""
        return sum(len(image.pixels) for image in self.images)


class TokenLogprob(NamedTuple):
    """Log-probability (natural log) of one token and its best alternatives, best first."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


class FinishReason(Enum):
    """Why a sequence ended. Exactly one per accepted request."""

    STOP = "stop"
    LENGTH = "length"
    CANCELLED = "cancelled"
    ERROR = "error"


class TokenEvent(NamedTuple):
    """Text that became certain, with the tokens it came from. `text` may be empty while a character is incomplete.

    `logprobs` has an entry a token when asked for, else is empty.
    """

    text: str
    tokens: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...] = ()


class Usage(NamedTuple):
    """Tokens billed: prompt, of which found in the prefix cache, and generated (tokens run ahead of a stop are not counted)."""

    prompt_tokens: int
    cached_tokens: int
    generated_tokens: int


class FinishEvent(NamedTuple):
    """The one terminal event of a stream. `error` is set exactly when `reason` is ERROR (a `ServiceError`).

    `matched_stop` is the stop string or token id that ended it, if one did.
    """

    reason: FinishReason
    usage: Usage
    error: Exception | None = None
    matched_stop: str | int | None = None


class PromptEvent(NamedTuple):
    """Log-probs of the prompt's tokens from the second on, sent once before the first TokenEvent when asked for."""

    logprobs: tuple[TokenLogprob, ...]


Event = TokenEvent | PromptEvent | FinishEvent
