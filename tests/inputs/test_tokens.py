"""Encoding and incremental decoding against the library's own full decode, on vocabularies of each kind."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from service.inputs.tokens import TokenCodec
from service.types.errors import CheckpointError

TEXTS = ["héllo wörld — 日本語 😀😀", "def f(x):\n    return x\n", "Привет ✓ naïve 👩‍👩‍👧 café"]


def byte_level() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, special_tokens=["<|user|>", "<|end|>"])
    tokenizer.train_from_iterator(TEXTS * 4, trainer)
    tokenizer.add_tokens([AddedToken("<think>", special=False, normalized=False)])
    return tokenizer


def sentencepiece_style(strip: bool = True) -> Tokenizer:
    names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    names += ["▁", "▁he", "he", "l", "lo", "o", "w", "▁w", "r", "ld", "d", "é"]
    tokenizer = Tokenizer(models.BPE(vocab={name: at for at, name in enumerate(names)}, merges=[], unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if strip else steps)
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    return tokenizer


def metaspace() -> Tokenizer:
    names = ["<unk>", "▁", "▁he", "he", "l", "o", "w", "▁w", "r", "ld", "d"]
    tokenizer = Tokenizer(models.Unigram([(name, -1.0) for name in names], unk_id=0, byte_fallback=False))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    return tokenizer


LIBRARY = {
    "byte_level": byte_level(),
    "sentencepiece": sentencepiece_style(),
    "unstripped": sentencepiece_style(False),
    "metaspace": metaspace(),
}
CODECS = {name: TokenCodec(tokenizer.to_str().encode()) for name, tokenizer in LIBRARY.items()}


def incremental(codec: TokenCodec, ids: list[int], continues: bool = False) -> str:
    decoder = codec.decoder(continues=continues)
    return "".join([decoder.push(token) for token in ids]) + decoder.flush()


@pytest.mark.parametrize("name", CODECS)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_pieces_put_together_are_the_full_decode(name: str, data: st.DataObject) -> None:
    codec, library = CODECS[name], LIBRARY[name]
    text = data.draw(st.text(max_size=40)) if name != "metaspace" else data.draw(st.text(alphabet="helowrd ", max_size=40))
    ids = codec.encode(text)
    full = library.decode(ids, skip_special_tokens=True)
    assert incremental(codec, ids) == full
    assert codec.decode(ids) == full


@settings(max_examples=200, deadline=None)
@given(ids=st.lists(st.integers(0, 310), max_size=24))
def test_byte_level_equals_the_library_for_broken_bytes_too(ids: list[int]) -> None:
    assert incremental(CODECS["byte_level"], ids) == LIBRARY["byte_level"].decode(ids, skip_special_tokens=True)


@settings(max_examples=200, deadline=None)
@given(ids=st.lists(st.integers(0, 270), max_size=24))
def test_byte_fallback_keeps_every_whole_character(ids: list[int]) -> None:
    codec = CODECS["unstripped"]
    data = b"".join(b"" if token in codec.special_ids else codec.token_bytes(token) for token in ids)
    kept = incremental(codec, ids).replace("\ufffd", "")
    assert kept == data.decode("utf-8", "ignore")


@pytest.mark.parametrize("name", ["byte_level", "sentencepiece"])
def test_nothing_is_said_while_a_character_is_incomplete(name: str) -> None:
    codec = CODECS[name]
    decoder = codec.decoder()
    pieces = [decoder.push(token) for token in codec.encode("日")]
    assert [piece for piece in pieces if piece.strip()] == ["日"] == [pieces[-1].strip()]


@pytest.mark.parametrize("name", ["byte_level", "sentencepiece"])
def test_a_broken_tail_becomes_the_replacement_character_at_the_end_only(name: str) -> None:
    codec = CODECS[name]
    decoder = codec.decoder()
    said = [decoder.push(token) for token in codec.encode("日")[:-1]]
    assert "".join(said).strip() == ""
    assert set(decoder.flush()) == {"\ufffd"}
    assert decoder.flush() == ""


def test_a_continuation_keeps_its_leading_space_and_a_whole_text_does_not() -> None:
    codec = CODECS["sentencepiece"]
    prompt, rest = codec.encode("he"), [CODECS["sentencepiece"].encode("w")[0], *CODECS["sentencepiece"].encode("w")[1:]]
    assert codec.decode(prompt + rest) == codec.decode(prompt) + incremental(codec, rest, continues=True)
    assert incremental(codec, rest) == "w"


def test_special_tokens_are_skipped_or_shown() -> None:
    codec = CODECS["byte_level"]
    ids = codec.encode("a<|end|>b", parse_special=True)
    assert codec.special_ids.intersection(ids)
    assert codec.decode(ids) == "ab"
    assert codec.decode(ids, skip_special=False) == "a<|end|>b"


@pytest.mark.parametrize("name", ["byte_level", "sentencepiece"])
def test_text_that_spells_a_special_token_stays_text(name: str) -> None:
    codec = CODECS[name]
    for text in ("a <|end|> b", "</s>", "x<s>y"):
        ids = codec.encode(text)
        assert not codec.special_ids.intersection(ids)
        assert codec.decode(ids) == text


def test_protected_text_is_encoded_like_the_plain_template_text_around_it() -> None:
    codec = CODECS["byte_level"]
    whole = codec.encode("<|user|>say <|end|> now<|end|>", parse_special=True)
    safe = codec.encode_protected("<|user|>say \U000f0000 now<|end|>", {"\U000f0000": "<|end|>"})
    end = next(token for token in whole[::-1])
    assert safe[0] == whole[0] and safe[-1] == end
    assert safe.count(end) == 1 and whole.count(end) == 2
    assert codec.decode(safe) == "say <|end|> now"


@settings(max_examples=60, deadline=None)
@given(text=st.text(max_size=30))
def test_splitting_at_special_tokens_changes_no_id(text: str) -> None:
    codec = CODECS["byte_level"]
    rendered = f"<|user|>{text}<|end|>"
    assert codec.encode_protected(rendered, {"\U000f0001": "never"}) == codec.encode(rendered, add_special=False, parse_special=True)


def test_token_text_names_bytes_that_are_no_text() -> None:
    codec = CODECS["byte_level"]
    first = codec.encode("日")[0]
    assert codec.token_text(first).startswith("bytes:\\x")
    assert codec.token_bytes(first)[0] == "日".encode()[0]
    assert codec.token_bytes(10**6) == b""


def test_loading_names_what_is_missing_or_broken(tmp_path) -> None:
    with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
        TokenCodec.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
        TokenCodec.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text(LIBRARY["byte_level"].to_str())
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": {"content": "<|end|>"}, "bos_token": null}')
    assert TokenCodec.load(tmp_path).special_tokens == {"eos_token": "<|end|>"}
