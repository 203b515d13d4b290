"""The template child: renders chat templates in a sandbox, with memory bounded by the kernel and time by its parent's patience.

It is configured as Hugging Face's `apply_chat_template` is, so that templates written for it give the same text. It knows nothing of the
server. Invariant: whatever a template does, the worst is the end of this process.
"""

from __future__ import annotations

import functools
import json
import time
from typing import Any, NoReturn

from jinja2 import Template, TemplateError, nodes
from jinja2.ext import Extension
from jinja2.ext import loopcontrols as loop_controls
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from service.inputs.child_memory import limit_memory
from service.inputs.template_messages import Ready, Refused, Render, Rendered, Reply, Request, Warm
from service.processes import ChannelClosed, ChildChannel


class RefusedByTemplate(Exception):
    """The template called `raise_exception`."""


class GenerationTag(Extension):
    """`{% generation %} … {% endgeneration %}` marks training targets; for rendering it is its content."""

    tags = {"generation"}  # noqa: RUF012 (the library's own declaration)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        """Give the body between the tags."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _refuse(message: str) -> NoReturn:
    raise RefusedByTemplate(message)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _now(form: str) -> str:
    return time.strftime(form)


def build_environment() -> ImmutableSandboxedEnvironment:
    """The sandbox, with the names that chat templates expect."""
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[GenerationTag, loop_controls])
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = _now
    return environment


@functools.lru_cache(maxsize=16)
def _compiled(template: str) -> Template:
    return build_environment().from_string(template)


def render(request: Render) -> Reply:
    """Render one template; failures of any kind become a Refused."""
    try:
        pieces: list[str] = []
        length = 0
        for piece in _compiled(request.template).generate(**request.variables):
            length += len(piece)
            if length > request.characters:
                return Refused("too_long")
            pieces.append(piece)
        return Rendered("".join(pieces))
    except RefusedByTemplate as refusal:
        return Refused("message", str(refusal)[:1000])
    except MemoryError:
        return Refused("memory")
    except (TemplateError, ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError):
        return Refused("failed")


def main() -> None:
    """Answer until the parent is gone."""
    channel = ChildChannel.open(Request)
    try:
        while True:
            message = channel.receive()
            if isinstance(message, Warm):
                limit_memory(message.memory_bytes)
                channel.send(Ready())
            else:
                channel.send(render(message))
    except ChannelClosed:
        return


if __name__ == "__main__":
    main()
