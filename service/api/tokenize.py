"""POST /tokenize and /detokenize: the version's own vocabulary, bounded like prompts.

It does not know sampling. Invariant: /tokenize shows exactly the ids that a generation route would use for the same input.
"""

from __future__ import annotations

from typing import Any

from fastapi import Request, Response

from service.api.context import JsonAnswer, Services
from service.api.fields import drop_neutral, prepare_messages, validate
from service.api.prompts import PromptReader
from service.api.schemas import DetokenizeBody, TokenizeBody
from service.api.translate import Translator, context_of
from service.types.errors import InvalidRequest

TOKENIZE_ROUTE, DETOKENIZE_ROUTE = "/tokenize", "/detokenize"


def parse_tokenize(data: dict[str, Any]) -> TokenizeBody:
    """The checked body of /tokenize."""
    fields = drop_neutral(data, {"add_generation_prompt": (None, True)}, frozenset(TokenizeBody.model_fields))
    if "messages" in fields:
        fields["messages"] = prepare_messages(fields["messages"])
    body = validate(TokenizeBody, fields)
    if (body.prompt is None) == (body.messages is None):
        raise InvalidRequest("Send either `prompt` or `messages`.", param="prompt")
    if body.messages is not None and body.add_special_tokens is not None:
        raise InvalidRequest("`add_special_tokens` is for `prompt`; a chat template places its own.", param="add_special_tokens")
    return body


async def tokenize(services: Services, request: Request) -> Response:
    """Token ids of a prompt or of messages."""
    body = parse_tokenize(await services.read(request))
    _, served = services.resolve(request, body.model)
    reader = PromptReader(served, services.renderer, services.settings.limits)
    if body.messages is not None:
        pictures = await services.images.read(served, services.router.versions(), body.messages)
        ids = (await reader.chat(body.messages, pictures=pictures)).ids
    else:
        ids = await reader.text(body.prompt or "", body.add_special_tokens is not False)
    answer: dict[str, Any] = {"count": len(ids), "max_model_len": context_of(served), "tokens": ids}
    if body.return_token_strs:
        answer["token_strs"] = [served.codec.token_text(token) for token in ids]
    return JsonAnswer(answer)


async def detokenize(services: Services, request: Request) -> Response:
    """The text of token ids, special tokens included."""
    body = validate(DetokenizeBody, await services.read(request))
    call, served = services.resolve(request, body.model)
    limits = services.settings.limits
    most = limits.prompt_characters_per_token * context_of(served)
    if len(body.tokens) > most:
        raise InvalidRequest(f"`tokens` may hold at most {most} ids.", param="tokens")
    Translator(served, call, limits).check_ids(body.tokens, "tokens")
    return JsonAnswer({"prompt": served.codec.decode(body.tokens, skip_special=False)})
