"""What becomes of every field name of the protocols that is not in a schema: refused by name, or accepted because it changes nothing.

It does not know the fields that are served (schemas.py). Invariant: an accepted field either is in a schema, or is harmless, or has a
value that means "as if it were absent".
"""

from __future__ import annotations

from typing import Any, Final, TypeVar

from pydantic import BaseModel, ValidationError

from service.api.errors import clip
from service.types.errors import InvalidRequest, UnknownField, UnsupportedField

Schema = TypeVar("Schema", bound=BaseModel)

# Accepted with any value: they change nothing in the answer.
HARMLESS: Final = frozenset(
    {"user", "metadata", "safety_identifier", "prompt_cache_key", "prompt_cache_retention", "parallel_tool_calls", "request_id"}
)

_EMPTY: Final[tuple[Any, ...]] = (None, [], {}, False)

# Refused by name unless the value is one of these, which ask for nothing.
UNSUPPORTED: Final[dict[str, tuple[Any, ...]]] = {
    "tools": _EMPTY,
    "tool_choice": (None, "none", "auto"),
    "functions": _EMPTY,
    "function_call": (None, "none", "auto"),
    "response_format": (None, {"type": "text"}),
    "audio": _EMPTY,
    "modalities": (None, ["text"]),
    "prediction": _EMPTY,
    "web_search_options": _EMPTY,
    "reasoning_effort": (None, "none"),
    "verbosity": (None, "medium"),
    "service_tier": (None, "auto", "default"),
    "store": _EMPTY,
    "moderation": _EMPTY,
    "suffix": (None, ""),
    "chat_template": _EMPTY,
    "documents": _EMPTY,
    "continue_final_message": _EMPTY,
    "add_generation_prompt": (None, True),
    "guided_json": _EMPTY,
    "guided_regex": _EMPTY,
    "guided_choice": _EMPTY,
    "guided_grammar": _EMPTY,
    "structured_outputs": _EMPTY,
    "use_beam_search": _EMPTY,
    "length_penalty": (None, 1, 1.0),
    "bad_words": _EMPTY,
    "allowed_token_ids": (None,),
    "logits_processors": _EMPTY,
    "include_stop_str_in_output": _EMPTY,
    "skip_special_tokens": (None, True),
    "spaces_between_special_tokens": (None, True),
    "truncate_prompt_tokens": (None,),
    "prompt_logprobs": (None,),
    "return_token_ids": _EMPTY,
    "prompt_embeds": (None,),
    "typical_p": (None, 1, 1.0),
    "xtc_probability": (None, 0, 0.0),
    "mirostat": (None, 0),
}

MESSAGE_UNSUPPORTED: Final[dict[str, tuple[Any, ...]]] = {
    "tool_calls": _EMPTY,
    "function_call": _EMPTY,
    "tool_call_id": (None,),
    "audio": _EMPTY,
    "refusal": (None, ""),
    "annotations": _EMPTY,
    "reasoning_content": (None, ""),
}

FOREIGN_PARTS: Final = frozenset({"input_audio", "audio_url", "video_url", "file", "refusal", "image", "input_image"})


def drop_neutral(data: dict[str, Any], table: dict[str, tuple[Any, ...]], served: frozenset[str], where: str = "") -> dict[str, Any]:
    """`data` without harmless fields and without refused ones whose value asks for nothing. Raises UnsupportedField."""
    kept: dict[str, Any] = {}
    for name, value in data.items():
        if name in served:
            kept[name] = value
        elif name in table:
            if not any(type(value) is type(neutral) and value == neutral for neutral in table[name]):
                raise UnsupportedField(f"`{where}{name}` is not supported by this server.", param=where + name)
        elif where or name not in HARMLESS:
            kept[name] = value
    return kept


def prepare_messages(messages: object) -> object:
    """Messages without neutral fields. Raises UnsupportedField for roles and content parts that are known and not served."""
    if not isinstance(messages, list):
        return messages
    prepared: list[object] = []
    for index, message in enumerate(messages):
        if not isinstance(message, dict):
            return messages
        where = f"messages.{index}."
        if message.get("role") in ("tool", "function"):
            raise UnsupportedField(f"`{where}role`: tool messages are not supported by this server.", param=where + "role")
        _check_parts(message.get("content"), where)
        prepared.append(drop_neutral(message, MESSAGE_UNSUPPORTED, frozenset({"role", "content", "name"}), where))
    return prepared


def _check_parts(content: object, where: str) -> None:
    for index, part in enumerate(content if isinstance(content, list) else ()):
        kind = part.get("type") if isinstance(part, dict) else None
        if isinstance(kind, str) and kind in FOREIGN_PARTS:
            param = f"{where}content.{index}.type"
            raise UnsupportedField(f"`{param}`: parts of type {kind} are not supported by this model.", param=param)


def _is_union_tag(part: object) -> bool:
    return part in ("str", "int", "float", "bool") or (isinstance(part, str) and part.startswith("list["))


def validate(schema: type[Schema], data: dict[str, Any]) -> Schema:
    """Check `data` against a schema. Raises UnknownField or InvalidRequest naming the field at fault."""
    try:
        return schema.model_validate(data)
    except ValidationError as failure:
        errors = failure.errors(include_url=False, include_input=False, include_context=False)
        raise _refusal(_telling(errors)) from None


def _telling(errors: list[Any]) -> Any:
    """The first error; where it is that a list is no string, the deepest about the same field."""
    *place, kind = errors[0]["loc"] or ("",)
    if kind != "str":
        return errors[0]
    return max((error for error in errors if list(error["loc"][: len(place)]) == place), key=lambda error: len(error["loc"]))


def _names(location: tuple[Any, ...]) -> list[str]:
    """The names and indexes of a location, without the library's marks of unions and their tags."""
    named = [str(part) for part in location if not _is_union_tag(part)]
    tagged = next((at for at, part in enumerate(location) if str(part).startswith("list[tagged-union")), None)
    if tagged is not None and len(location) > tagged + 2:
        del named[tagged + 1]
    return named


def _refusal(error: Any) -> InvalidRequest:
    param = clip(".".join(_names(error["loc"])))
    if error["type"] == "extra_forbidden":
        return UnknownField(f"`{param}` is not a field of this request.", param=param)
    if error["type"] == "missing":
        return InvalidRequest(f"`{param}` is required.", param=param)
    said = error["msg"].removeprefix("Value error, ")
    return InvalidRequest(f"`{param}`: {clip(said)}.", param=param)
