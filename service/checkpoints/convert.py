"""Converting a model into one of a version line, chunk by chunk: a directory in our own format or one `.pt` file, whole or not at all.

It does not know flags or terminals. Invariants: without the caller's consent to losses every value that the target keeps is stored exactly,
what is added changes nothing and what is left out held nothing; at most one chunk is in memory at a time.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, fields
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from service import __version__
from service.checkpoints.bin_files import write_bin
from service.checkpoints.convert_plan import SHARED_PARTS, ConversionPlan, Stretch, neutral_of, plan_conversion
from service.checkpoints.convert_source import BIN_SUFFIXES, CONVERSION, Source, open_source
from service.checkpoints.manifest import read_manifest
from service.checkpoints.own_format import own_config
from service.checkpoints.pieces import Piece, parameter_shapes
from service.checkpoints.stage import partial_directory
from service.checkpoints.store import Content, publish
from service.checkpoints.stored_tensors import find_weight_files, read_tensors
from service.checkpoints.tensor_writer import Entry
from service.checkpoints.weight_readers import CHUNK_BYTES, BinReader, SafetensorsReader
from service.types.catalog import find_line
from service.types.errors import CheckpointError

Progress = Callable[[int, int], None]
_NOT_TEXT = "it cannot be kept in one file: write a directory instead"
CARD = "README.md"
_CARD_MARK = "> This model was converted by deepseek-convert to"


@dataclass(frozen=True, slots=True)
class Wanted:
    """What to make: `version` is a line or a patch of it (`5.2`, `v5.2.1`), `dtype` the stored type of all weights ("" keeps each one's).

    `lossy` consents to what the plan says is lost. `dense_layers` read everything in a line with far blocks (None: as in the source).
    """

    version: str
    stretch: Stretch = field(default_factory=Stretch)
    dtype: str = ""
    lossy: bool = False
    dense_layers: tuple[int, ...] | None = None


@dataclass(frozen=True, slots=True)
class Report:
    """What was done, in words and numbers. `digest` is that of the directory written, None for a single file."""

    source: Source
    plan: ConversionPlan
    output: Path
    version: str
    losses: tuple[str, ...]
    added: tuple[str, ...]
    left_out: tuple[str, ...]
    bytes_written: int
    digest: str | None


def convert(input_model: Path, output_model: Path, wanted: Wanted, config: Path | None = None, progress: Progress | None = None) -> Report:
    """Convert and publish. `progress(done, total)` hears of bytes written. Raises CheckpointError, and then leaves nothing behind."""
    line = find_line(wanted.version)
    if line is None:
        raise CheckpointError(f"{wanted.version[:40]!r} is not a version line: --target_version takes a number such as 2.3.")
    source = open_source(input_model, config)
    with source.reader() as reader:
        equal = equal_layers(source, reader) if line.shares_weights and source.spec.sharing is None else 1
        plan = plan_conversion(source.spec, line, wanted.stretch, equal, wanted.dense_layers)
        work = _Work(source, plan, reader, wanted, progress)
        work.compare_duplicates()
        work.losses += [*plan.losses, *work.lost_parameters()]
        work.refuse_losses()
        digest = _write(work.content(), output_model)
    version = wanted.version.removeprefix("v")
    return Report(source, plan, output_model, version, tuple(work.losses), work.added, work.left_out, work.total_bytes, digest)


def _write(content: Content, output: Path) -> str | None:
    """Publish as what the name says; the digest of a directory."""
    if output.suffix not in BIN_SUFFIXES:
        publish(output, content)
        return read_manifest(output).digest
    with partial_directory(output) as workshop:
        publish(workshop / "model", content)
        _write_one_file(workshop / "model", output)
    return None


def _write_one_file(directory: Path, path: Path) -> None:
    weights = find_weight_files(directory)
    texts = {}
    for file in sorted(directory.iterdir()):
        if file not in weights.files and file.name not in ("manifest.json", "config.yaml"):
            try:
                texts[file.name] = file.read_bytes().decode()
            except UnicodeDecodeError:
                raise CheckpointError(f"{file.name} is no text, so {_NOT_TEXT}.") from None
    write_bin(path, (directory / "config.yaml").read_text("utf-8"), texts, read_tensors(weights))


class _Work:
    """One conversion under way. Every value passes through `_chunks`, which counts, and notices what the stored type rounds."""

    def __init__(
        self,
        source: Source,
        plan: ConversionPlan,
        reader: SafetensorsReader | BinReader,
        wanted: Wanted,
        progress: Progress | None,
    ) -> None:
        self._source, self._plan, self._reader, self._wanted, self._progress = source, plan, reader, wanted, progress
        self._match = source.match(reader)
        self._pieces: dict[str, list[Piece]] = defaultdict(list)
        for piece in self._match.pieces:
            self._pieces[piece.target].append(piece)
        self._rounded: Counter[str] = Counter()
        self.losses: list[str] = []
        self._done_bytes = 0
        self._entries = [Entry(name, self._dtype(name), shape) for name, shape in parameter_shapes(plan.target).items()]
        self.total_bytes = sum(_bytes(entry) for entry in self._entries)

    @property
    def added(self) -> tuple[str, ...]:
        """`head gates, open (8 tensors)`."""
        counts = Counter(neutral.what for neutral in self._plan.filled.values())
        return tuple(f"{what} ({count} tensors)" for what, count in counts.items())

    @property
    def left_out(self) -> tuple[str, ...]:
        """The same for what the target has no place for."""
        neutrals = [neutral_of(name) for name in self._plan.dropped]
        counts = Counter(neutral.what if neutral else "other weights" for neutral in neutrals)
        return tuple(f"{what} ({count} tensors)" for what, count in counts.items())

    def compare_duplicates(self) -> None:
        """Tied tensors that are stored twice must be equal. Raises CheckpointError."""
        for copy, original in self._match.duplicates:
            with self._source.reader() as other:
                for (_, one), (_, two) in zip(self._reader.chunks(copy), other.chunks(original), strict=True):
                    if not torch.equal(one, two):
                        raise CheckpointError(f"{copy} differs from {original}, and the configuration ties them: one of the two is wrong.")

    def lost_parameters(self) -> list[str]:
        """What the parameters without a place did, in words: those at their neutral value did nothing."""
        lost: Counter[str] = Counter()
        for name in self._plan.dropped:
            neutral = neutral_of(name)
            if neutral is None:
                lost[name.split(".", 1)[0]] += 1
            elif not all(bool((chunk == neutral.value).all()) for chunk in _stored(self._reader, self._pieces[name])):
                lost[neutral.what.partition(",")[0]] += 1
        return [f"{what} that the model learned ({count} tensors)" for what, count in lost.items()]

    def content(self) -> Content:
        """The directory to write."""
        common = Counter[str]()
        for entry in self._entries:
            common[entry.dtype] += _bytes(entry)
        generation = {entry.name: getattr(self._source.generation, entry.name) for entry in fields(self._source.generation)}
        config = own_config(
            self._plan.target, {name: value for name, value in generation.items() if value is not None}, self._wanted.version
        )
        files = {**self._source.files, CONVERSION: self._provenance()}
        if CARD in files:
            files[CARD] = self._card(files[CARD])
        return Content(self._plan.target, config, files, common.most_common(1)[0][0], self._entries, self._chunks)

    def refuse_losses(self) -> None:
        """Raises CheckpointError for losses that were not consented to."""
        if self.losses and not self._wanted.lossy:
            raise CheckpointError(
                f"converting to v{self._plan.target.line} loses something: {'; '.join(self.losses)}. Give --lossy to do it all the same."
            )

    def _card(self, card: bytes) -> bytes:
        """The card of the source, with a line before it that says what this model is."""
        spec, mark = self._source.spec, _CARD_MARK.encode()
        before = f"v{spec.line}" if spec.line else spec.family
        text = card.partition(b"\n\n")[2] if card.startswith(mark) else card
        return (
            f"{_CARD_MARK} v{self._wanted.version.removeprefix('v')} from {before}. What follows is the original's card.\n\n".encode()
            + text
        )

    def _provenance(self) -> bytes:
        source, plan = self._source, self._plan
        record: dict[str, Any] = {
            "program": __version__,
            "source": source.name,
            "source_version": source.spec.line or source.spec.family,
            "source_digest": source.digest,
            "version": self._wanted.version.removeprefix("v"),
            "added": self.added,
            "left_out": self.left_out,
            "losses": self.losses,
            "notes": plan.notes,
        }
        return json.dumps(record, indent=1).encode() + b"\n"

    def _dtype(self, name: str) -> str:
        """What to store a parameter as: the type asked for, else its own; the pieces of one matrix that differ become float32."""
        if self._wanted.dtype:
            return self._wanted.dtype
        stored = {self._reader.dtype(piece.source) for piece in self._pieces_of(name) or self._match.pieces[:1]}
        return stored.pop() if len(stored) == 1 else "float32"

    def _pieces_of(self, name: str) -> list[Piece]:
        """The stored pieces of a parameter of the target; none for what is filled in."""
        return self._pieces[self._plan.copied[name]] if name in self._plan.copied else []

    def _chunks(self, entry: Entry) -> Iterator[Tensor]:
        neutral = self._plan.filled.get(entry.name)
        for chunk in _stored(self._reader, self._pieces_of(entry.name)) if neutral is None else _constant(entry, neutral.value):
            yield chunk
            self._notice_rounding(entry, chunk)
            self._done_bytes += chunk.numel() * getattr(torch, entry.dtype).itemsize
            if self._progress is not None:
                self._progress(self._done_bytes, self.total_bytes)
        if entry is self._entries[-1] and self._rounded:
            first, count = next(iter(self._rounded)), self._rounded.total()
            self.losses.append(f"{count} values are rounded to {self._wanted.dtype}, the first in {first}")
            self.refuse_losses()

    def _notice_rounding(self, entry: Entry, chunk: Tensor) -> None:
        dtype = getattr(torch, entry.dtype)
        if dtype not in (chunk.dtype, torch.float32) and (differing := int((chunk.to(dtype).to(chunk.dtype) != chunk).sum())):
            self._rounded[entry.name] += differing


def equal_layers(source: Source, reader: SafetensorsReader | BinReader) -> int:
    """The longest run length such that within every run of layers all have the weights of its first, bit for bit."""
    digests: list[dict[str, str]] = [{} for _ in source.spec.layers]
    for target, pieces in groupby(source.match(reader).pieces, key=lambda piece: piece.target):
        part, _, rest = target.partition(".")
        index, _, leaf = rest.partition(".")
        if part == "layers" and leaf.startswith(SHARED_PARTS):
            digest = hashlib.sha256()
            for chunk in _stored(reader, pieces):
                digest.update(chunk.contiguous().view(torch.uint8).numpy().data)
            digests[int(index)][leaf] = digest.hexdigest()
    count = len(digests)
    return next(run for run in range(count, 0, -1) if all(digests[index] == digests[index // run * run] for index in range(count)))


def _stored(reader: SafetensorsReader | BinReader, pieces: Iterable[Piece]) -> Iterator[Tensor]:
    for piece in pieces:
        for _, chunk in reader.chunks(piece.source):
            yield chunk


def _constant(entry: Entry, value: float) -> Iterator[Tensor]:
    left = _count(entry.shape)
    step = CHUNK_BYTES // 4
    while left > 0:
        yield torch.full((min(left, step),), value)
        left -= step


def _bytes(entry: Entry) -> int:
    return int(_count(entry.shape) * getattr(torch, entry.dtype).itemsize)


def _count(shape: tuple[int, ...]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count
