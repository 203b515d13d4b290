"""The bodies of the routes as strict schemas: no coercion, no field that is not listed, ranges checked.

It does not know limits that are settings (translate.py checks those) or what a model can do. Invariant: every field here is obeyed;
tests/api/test_fields_obeyed.py walks them.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainValidator


def _as_list(value: object) -> object:
    return [value] if isinstance(value, str) else value


def _check_prompt(value: object) -> object:
    """A prompt in one of its four shapes; the ids' range is the version's affair."""
    if isinstance(value, str):
        return value
    if isinstance(value, list) and value:
        if all(isinstance(item, str) for item in value) or _are_ids(value):
            return value
        if all(isinstance(item, list) and item and _are_ids(item) for item in value):
            return value
    raise ValueError("must be a text, a list of texts, a list of token ids or a list of lists of token ids, none empty")


def _are_ids(value: list[Any]) -> bool:
    return all(type(item) is int for item in value)


Prompt = Annotated[str | list[str] | list[int] | list[list[int]], PlainValidator(_check_prompt)]
Seed = Annotated[int, Field(ge=-(2**63), lt=2**64)]
TokenId = Annotated[int, Field(ge=0, lt=2**32)]


class StrictModel(BaseModel):
    """Common strictness."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, hide_input_in_errors=True, protected_namespaces=())


class StreamOptions(StrictModel):
    """`stream_options`."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class SamplingBody(StrictModel):
    """Fields that both generation routes share. None means absent."""

    model: str | None = Field(None, max_length=256)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1, lt=2**31)
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(None, gt=0, le=100)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    logit_bias: dict[str, float] | None = None
    seed: Seed | None = None
    stop: Annotated[list[str], BeforeValidator(_as_list)] | None = None
    stop_token_ids: list[TokenId] | None = Field(None, max_length=64)
    max_tokens: int | None = Field(None, ge=0, lt=2**31)
    min_tokens: int | None = Field(None, ge=0, lt=2**31)
    ignore_eos: bool | None = None
    cache_salt: str | None = Field(None, min_length=1, max_length=256)
    priority: int | None = Field(None, ge=-(2**31), lt=2**31)
    cost: Literal["any", "low"] | None = None


class CompletionBody(SamplingBody):
    """POST /v1/completions."""

    prompt: Prompt
    echo: bool | None = None
    logprobs: int | None = Field(None, ge=0)
    best_of: int | None = Field(None, ge=1)


class TextPart(StrictModel):
    """A content part."""

    type: Literal["text"]
    text: str


class ImageUrl(StrictModel):
    """A data URL, or an http(s) URL of a listed host; `detail` low takes a quarter of the image tokens."""

    url: str = Field(min_length=1)
    detail: Literal["auto", "low", "high"] | None = None


class ImagePart(StrictModel):
    """A content part that is an image."""

    type: Literal["image_url"]
    image_url: ImageUrl


ContentPart = Annotated[TextPart | ImagePart, Field(discriminator="type")]


class ChatMessage(StrictModel):
    """One message; neighbouring text parts of `content` are joined by line breaks, images stand where they are."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[str | list[ContentPart] | None, Field(union_mode="left_to_right")] = None
    name: str | None = Field(None, max_length=256)


class ChatBody(SamplingBody):
    """POST /v1/chat/completions."""

    messages: list[ChatMessage] = Field(min_length=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0)
    max_completion_tokens: int | None = Field(None, ge=1, lt=2**31)
    chat_template_kwargs: dict[str, bool | int | float | str | None] | None = Field(None, max_length=32)


class TokenizeBody(StrictModel):
    """POST /tokenize: a prompt, or messages through the version's chat template."""

    model: str | None = Field(None, max_length=256)
    prompt: str | None = None
    messages: list[ChatMessage] | None = Field(None, min_length=1)
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None


class DetokenizeBody(StrictModel):
    """POST /detokenize."""

    model: str | None = Field(None, max_length=256)
    tokens: list[TokenId]
