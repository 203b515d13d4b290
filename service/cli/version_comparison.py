"""Versions beside one another on this machine: quality, speed, memory and cost, each as it would be served, to decide by.

It does not know HTTP or how a version is made. Invariants: every version scores the same stretches of the same text, so that bits a byte
compare whatever the tokenizers; all of them are loaded together and timed in alternating rounds of one run.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from service.checkpoints.manifest import read_manifest
from service.checkpoints.names import artifact_name
from service.cli.local_engine import LocalEngine, Round, spread
from service.engine.memory import resident_bytes
from service.inputs.tokens import TokenCodec
from service.types.errors import SettingsError
from service.types.model_spec import ELEMENT_BYTES, ModelSpec
from service.types.settings import EngineSettings, ModelSource, SchedulerSettings

# Characters of a stretch, halved until the tokens of each fit the shortest context; each stretch sees only itself.
STRETCH_CHARACTERS = 2048
SMALLEST_STRETCH = 64
# Characters of a token, about: what `--text_tokens` means where tokenizers differ.
TOKEN_CHARACTERS = 4
BATCHES = (1, 8)


@dataclass(frozen=True, slots=True)
class Comparison:
    """What is asked of each version: prompts and answers in tokens, how many timed rounds, CPU threads of each engine."""

    prompt_tokens: int
    output_tokens: int
    rounds: int
    threads: int

    @property
    def tokens(self) -> int:
        """Tokens of one sequence."""
        return self.prompt_tokens + self.output_tokens


@dataclass(frozen=True, slots=True)
class _Reader:
    """A version's tokenizer, and the token before the first of a text (none where the checkpoint names none)."""

    codec: TokenCodec
    start: tuple[int, ...]

    def read(self, stretch: str) -> tuple[int, ...]:
        """The tokens of a stretch, the start before them."""
        return (*self.start, *self.codec.encode(stretch, add_special=False))

    def scored_bytes(self, stretch: str) -> int:
        """Bytes of a stretch that are scored: all of them where a start comes before."""
        first = 0 if self.start else len(self.codec.token_bytes(self.read(stretch)[0]))
        return len(stretch.encode()) - first


async def compare_versions(sources: Sequence[ModelSource], text: str, most_tokens: int, asked: Comparison) -> dict[str, Any]:
    """The row: one entry a version, by name; cost is relative to the first. Raises SettingsError, CheckpointError or StartupError."""
    specs = {source.name: read_manifest(Path(source.directory)).spec for source in sources}
    readers = {source.name: _reader(Path(source.directory), specs[source.name]) for source in sources}
    for name, spec in specs.items():
        if asked.tokens >= spec.context_tokens:
            raise SettingsError(
                f"{name} has a context of {spec.context_tokens} tokens, and a prompt and its answer take {asked.tokens}: give a smaller "
                "--prompt_tokens or --output_tokens."
            )
    stretches = _stretches(text, readers, specs, most_tokens * TOKEN_CHARACTERS)
    _check_prompts(text, readers, asked)
    async with AsyncExitStack() as stack:
        engines: dict[str, LocalEngine] = {}
        for source in sources:
            longest = max(len(readers[source.name].read(stretch)) for stretch in stretches)
            context = max(longest, asked.tokens) + 1
            settings = EngineSettings(backend="torch", threads=asked.threads, context_tokens=context, quantize_cache="none")
            engine = LocalEngine(Path(source.directory), settings, SchedulerSettings(batch_size=max(BATCHES)))
            engines[source.name] = await stack.enter_async_context(engine)
        quality = {name: await _quality(engine, readers[name], stretches) for name, engine in engines.items()}
        rounds = await _rounds(engines, readers, text, asked)
        memory = {name: _memory(engine) for name, engine in engines.items()}
        about = {name: _about(engine, name) for name, engine in engines.items()}
    first = next(iter(engines))
    return {
        "kind": "versions",
        "prompt_tokens": asked.prompt_tokens,
        "output_tokens": asked.output_tokens,
        "text": {"stretches": len(stretches), "bytes": sum(len(stretch.encode()) for stretch in stretches)},
        "baseline": first,
        "versions": {
            name: {
                **about[name],
                "quality": quality[name],
                "speed": {str(batch): _speed(rounds[name][batch]) for batch in BATCHES},
                "memory": memory[name],
                "cost": _cost(rounds[name][max(BATCHES)], rounds[first][max(BATCHES)], asked),
            }
            for name in engines
        },
    }


def _reader(directory: Path, spec: ModelSpec) -> _Reader:
    start = spec.bos_id if spec.bos_id is not None else next(iter(spec.end_ids), None)
    return _Reader(TokenCodec.load(directory), () if start is None else (start,))


def _stretches(text: str, readers: Mapping[str, _Reader], specs: Mapping[str, ModelSpec], most: int) -> list[str]:
    """Stretches of at most `most` characters in all, evenly spread over the text, whose tokens fit every context."""
    size = STRETCH_CHARACTERS
    while size >= SMALLEST_STRETCH:
        pieces = [text[start : start + size] for start in range(0, len(text) - size + 1, size)]
        count = min(len(pieces), max(1, most // size))
        chosen = [pieces[index * len(pieces) // count] for index in range(count)]
        if chosen and all(len(reader.read(piece)) < specs[name].context_tokens for name, reader in readers.items() for piece in chosen):
            return chosen
        size //= 2
    raise SettingsError(f"--text has {len(text)} characters, of which no {SMALLEST_STRETCH} can be compared: name a longer file.")


def _check_prompts(text: str, readers: Mapping[str, _Reader], asked: Comparison) -> None:
    for name, reader in readers.items():
        found = len(reader.codec.encode(text, add_special=False))
        if found <= asked.prompt_tokens:
            raise SettingsError(
                f"--text gives {found} tokens of {name}, and a prompt of {asked.prompt_tokens} needs more: name a longer file, or give a "
                "smaller --prompt_tokens."
            )


async def _quality(engine: LocalEngine, reader: _Reader, stretches: Sequence[str]) -> dict[str, Any]:
    """Loss over all stretches: nats a token of this tokenizer, and bits a byte of the text."""
    nats, tokens = 0.0, 0
    for stretch in stretches:
        scores = await engine.score(reader.read(stretch))
        nats -= sum(entry.logprob for entry in scores)
        tokens += len(scores)
    size = sum(reader.scored_bytes(stretch) for stretch in stretches)
    return {"nats_per_token": round(nats / tokens, 5), "bits_per_byte": round(nats / math.log(2) / size, 5), "tokens": tokens}


async def _rounds(
    engines: Mapping[str, LocalEngine], readers: Mapping[str, _Reader], text: str, asked: Comparison
) -> dict[str, dict[int, list[Round]]]:
    """Timed rounds by version and batch; the first of each is left out, and every second round goes through the versions backwards."""
    ids = {name: reader.codec.encode(text, add_special=False) for name, reader in readers.items()}
    found: dict[str, dict[int, list[Round]]] = {name: {batch: [] for batch in BATCHES} for name in engines}
    for number in range(asked.rounds + 1):
        for batch in BATCHES:
            for name in list(engines)[:: -1 if number % 2 else 1]:
                spent = await engines[name].generate(_prompts(ids[name], batch, asked.prompt_tokens, number), asked.output_tokens)
                if number:
                    found[name][batch].append(spent)
    return found


def _prompts(ids: Sequence[int], count: int, length: int, number: int) -> list[tuple[int, ...]]:
    """Cuts of the text, others in every round."""
    starts = [(number * count + index) * length % (len(ids) - length) for index in range(count)]
    return [tuple(ids[start : start + length]) for start in starts]


def _speed(rounds: Sequence[Round]) -> dict[str, Any]:
    return {
        "prefill_tokens_per_s": spread([entry.prefill for entry in rounds]),
        "decode_tokens_per_s": spread([entry.decode for entry in rounds]),
    }


def _memory(engine: LocalEngine) -> dict[str, int]:
    """Weights as they are kept, KV cache of a sequence of 1,024 tokens, and what the worker has in memory after the rounds."""
    info = engine.info
    return {
        "weights_bytes": dict(info.memory_bytes)["weights"],
        "kv_bytes_per_1k_tokens": info.kv_layout.sequence_bytes(1024, ELEMENT_BYTES[info.kv_cache_dtype or info.dtype]),
        "resident_bytes": resident_bytes(info.pid),
    }


def _about(engine: LocalEngine, name: str) -> dict[str, Any]:
    manifest, info = engine.manifest, engine.info
    return {
        "artifact": artifact_name(manifest, name),
        "line": manifest.line,
        "parameters": manifest.spec.parameters,
        "context_tokens": manifest.spec.context_tokens,
        "modalities": list(manifest.modalities),
        "dtype": info.dtype,
        "quantize": info.quantize,
        "device": info.device,
    }


def _cost(mine: Sequence[Round], base: Sequence[Round], asked: Comparison) -> dict[str, Any]:
    """Seconds of this machine for a million tokens of prompts and answers of this shape in the largest batch; relative by round."""
    share = asked.output_tokens / asked.tokens
    return {
        "seconds_per_million_tokens": spread([1e6 * share / entry.output for entry in mine]),
        "relative": spread([other.output / entry.output for entry, other in zip(mine, base, strict=True)]),
    }
