"""Train a byte-level BPE tokenizer for source code and write it as tokenizer.json and tokenizer_config.json.

It knows bytes, merges and special tokens; not models, corpora or HTTP. Newline runs and the indentation after them are tokens of their
own, so that a prompt ending in a newline continues with an indent token. Invariants: every text round-trips byte for byte, digits stand
alone, special tokens are never merged into, and the same texts in the same order give the same files.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

END, USER, ASSISTANT, SYSTEM = "<|end|>", "<|user|>", "<|assistant|>", "<|system|>"
IMAGE = "<|image|>"
ROLE_TOKENS = {"user": USER, "assistant": ASSISTANT, "system": SYSTEM}
SPECIAL_TOKENS = (
    END,
    USER,
    ASSISTANT,
    SYSTEM,
    IMAGE,
    "<|image_start|>",
    "<|image_end|>",
    *(f"<|reserved_{i}|>" for i in range(7, 16)),
)

# In order: newline runs; a line's indent; dunder names; a word with at most one sign before it; one digit; a run of signs; other spaces.
SPLIT_PATTERN = (
    r"(?:\r?\n)+"
    r"|(?<![^\n])[ \t]+"
    r"|[ .]?__\p{L}+__"
    r"|[^\s\p{L}\p{N}]?\p{L}+| \p{L}+"
    r"|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+"
    r"|\s+(?=\S)|\s+"
)

CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'system' -%}<|system|>"
    "{%- elif message['role'] == 'assistant' -%}<|assistant|>"
    "{%- elif message['role'] == 'user' -%}<|user|>"
    "{%- else -%}{{ raise_exception('roles are system, user and assistant') }}{%- endif -%}"
    "{{ message['content'] }}<|end|>"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}<|assistant|>{%- endif -%}"
)


class BpeTokenizer:
    """A trained tokenizer: ids of texts, bytes of ids, and its two files."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> BpeTokenizer:
        """Learn merges until the vocabulary (special tokens and all bytes included) has `vocab_size` entries; fewer if texts run dry."""
        tokenizer = Tokenizer(models.BPE())
        split = pre_tokenizers.Split(Regex(SPLIT_PATTERN), behavior="isolated")
        as_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, as_bytes])
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        tokenizer.train_from_iterator(texts, trainer)
        return cls(tokenizer)

    @classmethod
    def load(cls, directory: Path) -> BpeTokenizer:
        """The tokenizer whose tokenizer.json lies in `directory`."""
        return cls(Tokenizer.from_file(str(directory / "tokenizer.json")))

    @property
    def vocab_size(self) -> int:
        """Number of ids, special tokens included."""
        return int(self._tokenizer.get_vocab_size(with_added_tokens=True))

    @property
    def token_bytes(self) -> list[int]:
        """Length in bytes of the text of each id; 0 for special tokens."""
        texts = (self._tokenizer.id_to_token(index) or "" for index in range(self.vocab_size))
        return [0 if text in SPECIAL_TOKENS else len(text) for text in texts]

    @property
    def end_id(self) -> int:
        """The id of the end token."""
        return self.special_id(END)

    def special_id(self, token: str) -> int:
        """The id of a special token. Raises KeyError."""
        index = self._tokenizer.token_to_id(token)
        if index is None:
            raise KeyError(token)
        return int(index)

    def encode(self, texts: list[str]) -> list[list[int]]:
        """Ids of each text; what looks like a special token in a text is text."""
        self._tokenizer.encode_special_tokens = True
        encodings = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def encode_chat(self, question: str, answer: str = "") -> list[int]:
        """Ids of a chat of one turn as the chat template writes it, without the last end token; without `answer`, the prompt for it."""
        asked, answered = self.encode([question, answer])
        return [self.special_id(USER), *asked, self.end_id, self.special_id(ASSISTANT), *answered]

    def decode(self, ids: list[int]) -> str:
        """The text of `ids`, special tokens left out."""
        return str(self._tokenizer.decode(ids, skip_special_tokens=True))

    def files(self, context_tokens: int) -> dict[str, bytes]:
        """Contents of tokenizer.json and tokenizer_config.json by name; `context_tokens` is recorded as `model_max_length`."""
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": context_tokens,
            "eos_token": END,
            "bos_token": None,
            "add_bos_token": False,
            "clean_up_tokenization_spaces": False,
            "chat_template": CHAT_TEMPLATE,
            "additional_special_tokens": list(SPECIAL_TOKENS[1:]),
        }
        content = json.loads(self._tokenizer.to_str())
        return {
            "tokenizer.json": (json.dumps(content, ensure_ascii=False, indent=1) + "\n").encode(),
            "tokenizer_config.json": (json.dumps(config, ensure_ascii=False, indent=1) + "\n").encode(),
        }
