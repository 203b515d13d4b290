"""Versions beside one another: the same text for all, alternating rounds, through real engines of tiny models."""

from __future__ import annotations

import asyncio
import math
from pathlib import Path
from typing import Any

import pytest

from service.checkpoints.manifest import read_manifest
from service.cli import version_comparison
from service.cli.local_engine import Round
from service.cli.version_comparison import BATCHES, Comparison, compare_versions
from service.inputs.tokens import TokenCodec
from service.types.catalog import V2_3, V3_5
from service.types.errors import SettingsError
from service.types.request import TokenLogprob
from service.types.settings import ModelSource
from tests.tiny_models import build_tiny, build_tiny_line

TEXT = "The quick brown fox jumps over the lazy dog: größer. " * 40
ASKED = Comparison(prompt_tokens=12, output_tokens=5, rounds=2, threads=1)


def compare(sources: dict[str, Path], text: str = TEXT, tokens: int = 120, asked: Comparison = ASKED) -> dict[str, Any]:
    return asyncio.run(compare_versions([ModelSource(name, str(path)) for name, path in sources.items()], text, tokens, asked))


def test_two_lines_in_one_row(tmp_path: Path) -> None:
    sources = {"small": build_tiny_line(tmp_path / "small", V2_3), "seeing": build_tiny_line(tmp_path / "seeing", V3_5, layers=6)}
    row = compare(sources)
    assert (row["baseline"], list(row["versions"])) == ("small", ["small", "seeing"])
    small, seeing = row["versions"]["small"], row["versions"]["seeing"]
    assert (small["line"], seeing["line"], seeing["modalities"]) == ("2.3", "3.5", ["text", "image"])
    assert set(small["speed"]) == {str(batch) for batch in BATCHES}
    for entry in (small, seeing):
        assert all(rate["rounds"] == 2 and rate["min"] > 0 for speed in entry["speed"].values() for rate in speed.values())
        # One tokenizer and a start before each stretch: both score every byte, and the two measures say the same.
        quality = entry["quality"]
        assert quality["tokens"] == small["quality"]["tokens"]
        expected = quality["nats_per_token"] * quality["tokens"] / math.log(2) / row["text"]["bytes"]
        assert quality["bits_per_byte"] == pytest.approx(expected, rel=1e-4)
    assert small["cost"]["relative"] == {"median": 1.0, "min": 1.0, "max": 1.0, "rounds": 2}
    assert small["memory"]["weights_bytes"] < seeing["memory"]["weights_bytes"]
    assert seeing["memory"]["kv_bytes_per_1k_tokens"] == 1.5 * small["memory"]["kv_bytes_per_1k_tokens"]
    assert small["memory"]["resident_bytes"] > small["memory"]["weights_bytes"]


class Scripted:
    """An engine whose tokens cost a nat each, and that notes its rounds."""

    def __init__(self, name: str, rates: list[float], log: list[tuple[str, int]]) -> None:
        self.name, self.rates, self.log = name, rates, log

    async def score(self, prompt: tuple[int, ...]) -> tuple[TokenLogprob, ...]:
        return tuple(TokenLogprob(token, -1.0, ()) for token in prompt[1:])

    async def generate(self, prompts: list[tuple[int, ...]], tokens: int) -> Round:
        self.log.append((self.name, len(prompts)))
        assert all(len(prompt) == ASKED.prompt_tokens for prompt in prompts) and tokens == ASKED.output_tokens
        return Round(1.0, 1.0, self.rates.pop(0))


def reader(tmp_path: Path, *start: int) -> version_comparison._Reader:
    return version_comparison._Reader(TokenCodec.load(build_tiny(tmp_path)), start)


def test_without_a_start_the_first_token_is_not_scored_and_its_bytes_do_not_count(tmp_path: Path) -> None:
    engine: Any = Scripted("a", [], [])
    for start, tokens, size in (((256,), 3, 4), ((), 2, 3)):
        # "ü" is two bytes and two tokens of this vocabulary, and "er" is one token.
        found = asyncio.run(version_comparison._quality(engine, reader(tmp_path, *start), ["üer"]))
        assert found == {"nats_per_token": 1.0, "bits_per_byte": round(tokens / math.log(2) / size, 5), "tokens": tokens}


def test_rounds_alternate_and_the_first_does_not_count(tmp_path: Path) -> None:
    log: list[tuple[str, int]] = []
    engines: Any = {name: Scripted(name, [99.0, 99.0, 1.0, 2.0, 3.0, 4.0], log) for name in "ab"}
    readers = dict.fromkeys("ab", reader(tmp_path, 256))
    rounds = asyncio.run(version_comparison._rounds(engines, readers, TEXT, ASKED))
    assert [name for name, _ in log] == list("ababbabaabab")
    assert [count for _, count in log] == [1, 1, 8, 8] * 3
    assert [entry.output for entry in rounds["a"][1]] == [1.0, 3.0] and [entry.output for entry in rounds["b"][8]] == [2.0, 4.0]


def test_cost_is_relative_round_by_round() -> None:
    mine, base = [Round(1, 1, 50.0), Round(1, 1, 25.0)], [Round(1, 1, 100.0), Round(1, 1, 25.0)]
    cost = version_comparison._cost(mine, base, Comparison(75, 25, 2, 1))
    # A quarter of the tokens are output: 50 output tokens/s are 200 tokens/s.
    assert (cost["seconds_per_million_tokens"]["min"], cost["seconds_per_million_tokens"]["max"]) == (5000.0, 10000.0)
    assert (cost["relative"]["min"], cost["relative"]["max"]) == (1.0, 2.0)


def test_stretches_are_spread_over_the_text_and_fit_the_shortest_context(tmp_path: Path) -> None:
    one = reader(tmp_path / "one", 256)
    short = read_manifest(build_tiny(tmp_path / "short", max_position_embeddings=128)).spec
    text = "".join(f"{index:08d}" for index in range(800))
    found = version_comparison._stretches(text, {"m": one}, {"m": short}, 320)
    assert [(text.index(piece), len(piece)) for piece in found] == [(place, 64) for place in (0, 1280, 2560, 3840, 5120)]


@pytest.mark.parametrize(
    ("text", "asked", "words"),
    [
        ("short", ASKED, "--text has 5 characters"),
        (TEXT, Comparison(500, 100, 1, 1), "tiny has a context of 256 tokens, and a prompt and its answer take 600"),
        ("word " * 20, Comparison(150, 5, 1, 1), "--text gives [0-9]+ tokens of tiny"),
    ],
)
def test_what_cannot_be_compared_is_refused_before_anything_is_loaded(tmp_path: Path, text: str, asked: Comparison, words: str) -> None:
    with pytest.raises(SettingsError, match=words):
        compare({"tiny": build_tiny(tmp_path)}, text, asked=asked)
