"""The trained tokenizer: every text round-trips, indentation and digits are tokens of their own, training is deterministic."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.inputs.bpe import ASSISTANT, END, SPECIAL_TOKENS, USER, BpeTokenizer
from service.inputs.tokens import TokenCodec

TEXTS = [
    'class Stack:\n    """A stack."""\n\n    def push(self, item):\n        self.items.append(item)\n        return len(self.items)\n',
    "def push(self, item):\n\tif item is None:\n\t\traise ValueError(f'{item!r} is 1234')\n\n\nimport os\n",
] * 20


@pytest.fixture(scope="module")
def tokenizer() -> BpeTokenizer:
    return BpeTokenizer.train(TEXTS, 320)


def pieces(tokenizer: BpeTokenizer, text: str) -> list[str]:
    return [tokenizer.decode([index]) for index in tokenizer.encode([text])[0]]


@given(text=st.text())
@settings(max_examples=200, deadline=None)
def test_every_text_round_trips(tokenizer: BpeTokenizer, text: str) -> None:
    ids = tokenizer.encode([text])[0]
    assert tokenizer.decode(ids) == text
    assert sum(tokenizer.token_bytes[index] for index in ids) == len(text.encode())


@given(
    lines=st.lists(
        st.tuples(st.integers(0, 12), st.sampled_from(["if x:", "return", "# ñ", "", "x = 12"]), st.sampled_from(["\n", "\r\n", "\n\n"]))
    )
)
def test_python_with_indentation_round_trips(tokenizer: BpeTokenizer, lines: list[tuple[int, str, str]]) -> None:
    text = "".join(" " * indent + code + end for indent, code, end in lines)
    assert tokenizer.decode(tokenizer.encode([text])[0]) == text


def test_newlines_and_indents_are_tokens_of_their_own(tokenizer: BpeTokenizer) -> None:
    assert pieces(tokenizer, "self:\n        self\n\n    def") == ["self", ":", "\n", "        ", "self", "\n\n", "    ", "def"]
    whole, prompt = tokenizer.encode(["def push(self):\n    return", "def push(self):\n"])
    assert whole[: len(prompt)] == prompt


def test_digits_stand_alone(tokenizer: BpeTokenizer) -> None:
    assert pieces(tokenizer, "1234") == ["1", "2", "3", "4"]


def test_special_tokens_come_first_and_are_only_text_when_spelled(tokenizer: BpeTokenizer) -> None:
    assert [tokenizer.special_id(token) for token in SPECIAL_TOKENS] == list(range(len(SPECIAL_TOKENS)))
    assert tokenizer.end_id == 0
    ids = tokenizer.encode(["a<|end|>b"])[0]
    assert tokenizer.end_id not in ids and tokenizer.decode(ids) == "a<|end|>b"
    with pytest.raises(KeyError):
        tokenizer.special_id("<|nothing|>")


def test_the_vocabulary_is_as_asked(tokenizer: BpeTokenizer) -> None:
    assert tokenizer.vocab_size == 320 == len(tokenizer.token_bytes)
    assert tokenizer.token_bytes[: len(SPECIAL_TOKENS)] == [0] * len(SPECIAL_TOKENS)
    assert min(tokenizer.token_bytes[len(SPECIAL_TOKENS) :]) == 1


def test_training_is_deterministic(tokenizer: BpeTokenizer) -> None:
    assert BpeTokenizer.train(iter(TEXTS), 320).files(128) == tokenizer.files(128)


def test_the_files_load_as_a_codec(tokenizer: BpeTokenizer, tmp_path: Path) -> None:
    for name, content in tokenizer.files(128).items():
        (tmp_path / name).write_bytes(content)
    codec = TokenCodec.load(tmp_path)
    text = TEXTS[0] + "<|end|>é"
    assert list(codec.encode(text)) == tokenizer.encode([text])[0]
    assert codec.decode(codec.encode(text)) == text
    assert BpeTokenizer.load(tmp_path).files(128) == tokenizer.files(128)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert config["eos_token"] == END and config["model_max_length"] == 128


def test_chats_are_encoded_as_the_template_writes_them(tokenizer: BpeTokenizer, tmp_path: Path) -> None:
    import jinja2

    for name, content in tokenizer.files(128).items():
        (tmp_path / name).write_bytes(content)
    template = jinja2.Template(json.loads((tmp_path / "tokenizer_config.json").read_text())["chat_template"])
    messages = [{"role": "user", "content": "push?"}]
    codec = TokenCodec.load(tmp_path)
    prompt = template.render(messages=messages, add_generation_prompt=True)
    assert prompt == f"{USER}push?{END}{ASSISTANT}"
    assert list(codec.encode(prompt, parse_special=True)) == tokenizer.encode_chat("push?")
    messages.append({"role": "assistant", "content": "item"})
    whole = template.render(messages=messages, add_generation_prompt=False)
    assert list(codec.encode(whole, parse_special=True)) == [*tokenizer.encode_chat("push?", "item"), tokenizer.end_id]
