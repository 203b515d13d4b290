"""Log-probs in the two shapes of the OpenAI protocol.

It does not know requests or streams. Invariant: what comes out is valid JSON, so −inf is −9999.
"""

from __future__ import annotations

import math
from typing import Any

from service.inputs.tokens import TokenCodec
from service.types.request import TokenLogprob

LOWEST = -9999.0


def chat_entry(codec: TokenCodec, entry: TokenLogprob) -> dict[str, Any]:
    """One entry of `choices[].logprobs.content`."""
    alternatives = [_chat_token(codec, token, logprob) for token, logprob in entry.top]
    return {**_chat_token(codec, entry.token, entry.logprob), "top_logprobs": alternatives}


def completion_logprobs(codec: TokenCodec, entries: list[TokenLogprob], offset: int) -> dict[str, Any]:
    """`choices[].logprobs` of a completion. A NaN stands for the first prompt token, which has no log-prob. `offset`: characters before.

    `top_logprobs` holds the alternatives and always the token itself.
    """
    tokens: list[str] = []
    values: list[float | None] = []
    top: list[dict[str, float] | None] = []
    offsets: list[int] = []
    decoder = codec.decoder(continues=offset > 0)
    for entry in entries:
        absent = math.isnan(entry.logprob)
        own = codec.token_text(entry.token)
        tokens.append(own)
        values.append(None if absent else _finite(entry.logprob))
        best = {codec.token_text(token): _finite(logprob) for token, logprob in entry.top}
        top.append(None if absent else {**best, own: _finite(entry.logprob)})
        offsets.append(offset)
        offset += len(decoder.push(entry.token))
    return {"tokens": tokens, "token_logprobs": values, "top_logprobs": top, "text_offset": offsets}


def _chat_token(codec: TokenCodec, token: int, logprob: float) -> dict[str, Any]:
    return {"token": codec.token_text(token), "logprob": _finite(logprob), "bytes": list(codec.token_bytes(token))}


def _finite(value: float) -> float:
    return max(value, LOWEST) if not math.isnan(value) else LOWEST
