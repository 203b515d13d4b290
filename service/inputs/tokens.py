"""Text to token ids and back for one checkpoint: `TokenCodec`, and `IncrementalDecoder` for text that grows token by token.

It does not know chat templates, prompts' limits or where tokens come from; it is the only file that imports `tokenizers`.
Byte-level and byte-fallback (SentencePiece style) vocabularies are decoded here from a table of each token's bytes, which costs a
fraction of a microsecond a token and emits a character as soon as it is complete; other kinds go through a bounded window of the
library's own decoder. Invariant: text spelled by a user becomes a control token only where the caller asked for it (`parse_special`).
"""

from __future__ import annotations

import codecs
import re
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import msgspec
from tokenizers import Tokenizer

from service.types.errors import CheckpointError

REPLACEMENT = "\ufffd"
WINDOW_TOKENS = 8
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class IncrementalDecoder(Protocol):
    """Text of a growing token sequence: the concatenation of all `push` and one `flush` is the decoded text."""

    def push(self, token: int) -> str:
        """Text that became certain with this token; empty while a character is incomplete."""

    def flush(self) -> str:
        """What is left at the end: U+FFFD for an incomplete character, else empty."""


def _byte_level_alphabet() -> dict[str, int]:
    """The reversible byte-to-character map of byte-level BPE (Radford et al. 2019)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    alphabet = {chr(byte): byte for byte in printable}
    hidden = (byte for byte in range(256) if byte not in set(printable))
    alphabet.update({chr(256 + index): byte for index, byte in enumerate(hidden)})
    return alphabet


_ALPHABET = _byte_level_alphabet()


@dataclass(frozen=True, slots=True)
class _Scheme:
    """How tokens become bytes: `kind` is byte_level, byte_fallback or window; `strip` leading spaces go at the start of a whole text."""

    kind: str
    strip: int = 0


def _scheme_of(decoder: Any) -> _Scheme:
    kind = decoder.get("type") if isinstance(decoder, dict) else None
    if kind == "ByteLevel":
        return _Scheme("byte_level")
    if kind != "Sequence":
        return _Scheme("window")
    steps = decoder["decoders"]
    names = [step["type"] for step in steps]
    if names == ["ByteLevel"]:
        return _Scheme("byte_level")
    if names[:3] != ["Replace", "ByteFallback", "Fuse"] or names[3:] not in ([], ["Strip"]):
        return _Scheme("window")
    replace, strip = steps[0], steps[3] if len(steps) > 3 else None
    plain = replace.get("pattern") == {"String": "▁"} and replace.get("content") == " "
    if not plain or (strip is not None and (strip["content"] != " " or strip["stop"] != 0)):
        return _Scheme("window")
    return _Scheme("byte_fallback", strip["start"] if strip is not None else 0)


class _TokenizerFile(msgspec.Struct):
    decoder: Any = None


class TokenCodec:
    """Encoder and decoder of one vocabulary. Safe to use from several threads."""

    def __init__(self, data: bytes, special_tokens: Mapping[str, str] | None = None) -> None:
        self._data = data
        self._tokenizer = _read_tokenizer(data)
        self._literal: Tokenizer | None = None
        self._literal_lock = threading.Lock()
        self._scheme = _scheme_of(msgspec.json.decode(data, type=_TokenizerFile).decoder)
        added = self._tokenizer.get_added_tokens_decoder()
        self._special = {token.content: ident for ident, token in added.items() if token.special}
        self._normalized = any(token.special and token.normalized for token in added.values())
        longest_first = sorted((text for text in self._special if text), key=len, reverse=True)
        self._spelled = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")
        self._entries: dict[int, str | bytes] = {}
        self.special_tokens = dict(special_tokens or {})
        self.special_ids = frozenset(self._special.values())
        self.vocab_size: int = self._tokenizer.get_vocab_size(with_added_tokens=True)

    @classmethod
    def load(cls, directory: Path) -> TokenCodec:
        """Read `tokenizer.json` and the names of special tokens in `tokenizer_config.json`. Raises CheckpointError."""
        path = directory / "tokenizer.json"
        try:
            data = path.read_bytes()
        except OSError:
            raise CheckpointError(f"{directory} has no readable tokenizer.json; a model directory needs one.") from None
        return cls(data, _named_specials(directory / "tokenizer_config.json"))

    def encode(self, text: str, *, add_special: bool = True, parse_special: bool = False) -> list[int]:
        """Token ids of `text`.

        `add_special` adds what the vocabulary's post-processor adds (a start token). Unless `parse_special`, text that spells a special
        token is encoded as the text it is.
        """
        plain = parse_special or not (self._normalized or self._spelled.search(text))
        tokenizer = self._tokenizer if plain else self._literal_tokenizer()
        return list(tokenizer.encode(text, add_special_tokens=add_special).ids)

    def spells_special(self, text: str) -> bool:
        """Whether encoding `text` with `parse_special` could give a control token."""
        return self._normalized or self._spelled.search(text) is not None

    def split_special(self, text: str) -> list[tuple[str, bool]]:
        """`text` in pieces: (piece, whether it spells a special token), none empty."""
        pieces: list[tuple[str, bool]] = []
        end = 0
        for match in self._spelled.finditer(text):
            if match.start() > end:
                pieces.append((text[end : match.start()], False))
            pieces.append((match[0], True))
            end = match.end()
        if end < len(text):
            pieces.append((text[end:], False))
        return pieces

    def encode_protected(self, text: str, protected: Mapping[str, str]) -> list[int]:
        """Token ids of rendered template text in which each key of `protected` (one character) stands for a value that is only text.

        Special tokens spelled by `text` itself are control tokens; what the values spell is not.
        """
        if not protected and not self._normalized:
            return self.encode(text, add_special=False, parse_special=True)
        table = str.maketrans(dict(protected))
        literal = self._literal_tokenizer()
        ids: list[int] = []
        for piece, special in self.split_special(text):
            if special:
                ids.append(self._special[piece])
            else:
                ids.extend(literal.encode(piece.translate(table), add_special_tokens=False).ids)
        return ids

    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
        """The whole text of `ids`; ids outside the vocabulary give nothing."""
        if self._scheme.kind == "window":
            return str(self._tokenizer.decode(list(ids), skip_special_tokens=skip_special))
        decoder = self.decoder(skip_special, continues=False)
        return "".join([decoder.push(token) for token in ids]) + decoder.flush()

    def decoder(self, skip_special: bool = True, *, continues: bool = True) -> IncrementalDecoder:
        """A decoder for tokens that arrive one by one. `continues`: they follow a prompt, so that a leading space is kept."""
        if self._scheme.kind == "window":
            return _WindowDecoder(self._tokenizer, skip_special)
        strip = 0 if continues else self._scheme.strip
        skipped = self.special_ids if skip_special else frozenset()
        if self._scheme.kind == "byte_level":
            return _Utf8Decoder(self, skipped)
        return _FallbackDecoder(self, skipped, strip)

    def token_bytes(self, token: int) -> bytes:
        """The bytes that a token adds to a text; empty for an id outside the vocabulary."""
        entry = self.entry(token)
        return entry if isinstance(entry, bytes) else entry.encode()

    def token_text(self, token: int) -> str:
        """A token for a reader: its text, or `bytes:\\xe2\\x80` when its bytes alone are no text."""
        entry = self.entry(token)
        if isinstance(entry, str):
            return entry
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in entry)

    def entry(self, token: int) -> str | bytes:
        """Text of a token, or its bytes when they are not whole characters."""
        known = self._entries.get(token)
        if known is None:
            known = self._entries[token] = self._compute_entry(token)
        return known

    def _compute_entry(self, token: int) -> str | bytes:
        text = self._tokenizer.id_to_token(token) if 0 <= token < 1 << 32 else None
        if text is None:
            return ""
        if self._scheme.kind == "window":
            return str(self._tokenizer.decode([token], skip_special_tokens=False))
        if self._scheme.kind == "byte_fallback":
            match = _BYTE_TOKEN.fullmatch(text)
            return bytes([int(match[1], 16)]) if match else text.replace("▁", " ")
        if any(character not in _ALPHABET for character in text):
            return str(text)
        data = bytes(_ALPHABET[character] for character in text)
        try:
            return data.decode()
        except UnicodeDecodeError:
            return data

    def _literal_tokenizer(self) -> Tokenizer:
        """A second instance that never parses special tokens; made when a text first needs it, as the switch is not per call."""
        with self._literal_lock:
            if self._literal is None:
                literal = _read_tokenizer(self._data)
                literal.encode_special_tokens = True
                self._literal = literal
            return self._literal


@dataclass(slots=True)
class _Utf8Decoder:
    """Byte-level vocabularies: bytes of all tokens form one UTF-8 text."""

    codec: TokenCodec
    skipped: frozenset[int]
    pending: codecs.IncrementalDecoder | None = None

    def push(self, token: int) -> str:
        if token in self.skipped:
            return ""
        entry = self.codec.entry(token)
        if self.pending is None:
            if isinstance(entry, str):
                return entry
            self.pending = codecs.getincrementaldecoder("utf-8")("replace")
        text = self.pending.decode(entry if isinstance(entry, bytes) else entry.encode())
        if not self.pending.getstate()[0]:
            self.pending = None
        return text

    def flush(self) -> str:
        pending, self.pending = self.pending, None
        return pending.decode(b"", final=True) if pending is not None else ""


@dataclass(slots=True)
class _FallbackDecoder:
    """Text tokens and single-byte tokens: each byte that does not become part of a character gives one U+FFFD."""

    codec: TokenCodec
    skipped: frozenset[int]
    strip: int
    pending: bytes = b""

    def push(self, token: int) -> str:
        if token in self.skipped:
            return ""
        entry = self.codec.entry(token)
        if isinstance(entry, bytes):
            return self._strip(self._take(entry))
        broken = REPLACEMENT * len(self.pending)
        self.pending = b""
        return self._strip(broken + entry)

    def flush(self) -> str:
        broken = REPLACEMENT * len(self.pending)
        self.pending = b""
        return broken

    def _take(self, data: bytes) -> str:
        rest, text = self.pending + data, ""
        while rest:
            try:
                text, rest = text + rest.decode(), b""
            except UnicodeDecodeError as error:
                text += rest[: error.start].decode()
                rest = rest[error.start :]
                if error.reason == "unexpected end of data":
                    break
                width = error.end - error.start
                text, rest = text + REPLACEMENT * width, rest[width:]
        self.pending = rest
        return text

    def _strip(self, text: str) -> str:
        if not self.strip or not text:
            return text
        spaces = min(self.strip, len(text) - len(text.lstrip(" ")))
        self.strip = self.strip - spaces if spaces == len(text) else 0
        return text[spaces:]


@dataclass(slots=True)
class _WindowDecoder:
    """Any vocabulary: decode a window that starts before the last emitted text, and emit what it grew by."""

    tokenizer: Tokenizer
    skip_special: bool
    window: list[int] = field(default_factory=list)
    emitted: int = 0

    def push(self, token: int) -> str:
        before = self._text(self.window[: self.emitted])
        self.window.append(token)
        text = self._text(self.window)
        uncertain = text.endswith(REPLACEMENT) or not text.startswith(before)
        if uncertain and len(self.window) - self.emitted < WINDOW_TOKENS:
            return ""
        grown = text[len(before) :]
        if grown:
            self.window = self.window[max(0, self.emitted - WINDOW_TOKENS // 2) :]
        self.emitted = len(self.window)
        return grown

    def flush(self) -> str:
        rest = self._text(self.window)[len(self._text(self.window[: self.emitted])) :]
        self.emitted = len(self.window)
        return rest

    def _text(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=self.skip_special))


def _read_tokenizer(data: bytes) -> Tokenizer:
    try:
        tokenizer = Tokenizer.from_buffer(data)
    except Exception:  # the library raises nothing narrower
        raise CheckpointError("tokenizer.json is not a readable tokenizer; it may be cut off or made by a newer library.") from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _named_specials(path: Path) -> dict[str, str]:
    """`bos_token`, `eos_token` … of a tokenizer_config.json; empty when there is none."""
    try:
        config = msgspec.json.decode(path.read_bytes())
    except (OSError, msgspec.DecodeError):
        return {}
    named: dict[str, str] = {}
    for name in ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"):
        value = config.get(name) if isinstance(config, dict) else None
        text = value.get("content") if isinstance(value, dict) else value
        if isinstance(text, str):
            named[name] = text
    return named
