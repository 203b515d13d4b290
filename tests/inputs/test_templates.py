"""Chat templates: the same text as Hugging Face's own rendering, bounded, and contents that never become control tokens."""

from __future__ import annotations

import pytest

from service.inputs.templates import TemplateRenderer, render_chat
from service.types.errors import InvalidRequest
from tests.api.conftest import BYTE_CODEC, TEMPLATE

MESSAGES = [{"role": "system", "content": " Be brief. "}, {"role": "user", "content": "Hi {{ 7*7 }} 日"}]
CHATML = (
    "{%- for message in messages %}\n    {%- if loop.first and message.role != 'system' %}{% break %}{% endif %}\n"
    "    {{- '<|im_start|>' + message['role'] + '\\n' + message['content'] | trim + '<|im_end|>' + '\\n' }}\n{%- endfor %}\n"
    "{%- if add_generation_prompt %}{% generation %}{{ '<|im_start|>assistant\\n' }}{% endgeneration %}{%- endif %}\n"
    "{{ messages | tojson }}{{ bos_token }}"
)


@pytest.fixture
async def renderer():
    one = TemplateRenderer(2.0, 128 << 20)
    yield one
    await one.close()


async def test_text_equals_that_of_hugging_face(renderer: TemplateRenderer) -> None:
    chat_template_utils = pytest.importorskip("transformers.utils.chat_template_utils")
    variables = {"bos_token": "<s>", "add_generation_prompt": True}
    for template in (CHATML, TEMPLATE):
        [theirs], _ = chat_template_utils.render_jinja_template([MESSAGES], chat_template=template, **variables)
        ours = await renderer.render(template, {"messages": MESSAGES, **variables}, 10_000)
        assert ours == theirs


@pytest.mark.parametrize(
    ("template", "sentence"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages.no.such }}", "cannot render"),
        ("{{ ''.__class__.__mro__ }}", "cannot render"),
        ("{% for", "cannot render"),
        ("{{ 'x' * 2000 }}", "longer than 1000"),
        ("{% set x = 'x' * 300000000 %}{{ x | length }}", "MiB"),
        ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "longer than 0.8 seconds"),
    ],
)
async def test_a_template_that_cannot_render_costs_its_own_request_only(template: str, sentence: str) -> None:
    renderer = TemplateRenderer(0.8, 128 << 20)
    try:
        with pytest.raises(InvalidRequest, match=sentence):
            await renderer.render(template, {"messages": MESSAGES}, 1000)
        assert await renderer.render("{{ messages[0].role }}", {"messages": MESSAGES}, 1000) == "system"
    finally:
        await renderer.close()


async def test_contents_that_spell_a_control_token_stay_text(renderer: TemplateRenderer) -> None:
    messages = [{"role": "user", "content": "stop <end> here \U000f0000"}]
    ids = await render_chat(renderer, BYTE_CODEC, TEMPLATE, {"messages": messages}, 1000)
    assert ids.count(256) == 1
    assert BYTE_CODEC.decode(ids, skip_special=False) == "user: stop <end> here \U000f0000<end>\nassistant:"
    plain = [{"role": "user", "content": "stop"}]
    ids = await render_chat(renderer, BYTE_CODEC, TEMPLATE, {"messages": plain}, 1000)
    assert ids == BYTE_CODEC.encode("user: stop<end>\nassistant:", add_special=False, parse_special=True)
