"""What is converted: a directory of ours or of Hugging Face, one weight file with its configuration, or our own one-file form.

It does not know the target. Invariant: a source's spec is fully understood and its tensors are those of the spec, or it is refused in one
sentence; nothing of it is run.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from service.checkpoints.bin_files import BinFile, read_bin
from service.checkpoints.fields import CONFIG_BYTES
from service.checkpoints.manifest import (
    MANIFEST,
    OWN_FAMILY,
    GenerationDefaults,
    find_chat_template,
    generation_defaults,
    read_description,
    read_manifest,
    verify,
)
from service.checkpoints.own_format import CONFIG, parse_own
from service.checkpoints.pieces import Match, match_hugging_face, match_own
from service.checkpoints.stored_tensors import WeightFiles, find_weight_files
from service.checkpoints.weight_readers import BinReader, SafetensorsReader
from service.types.errors import CheckpointError
from service.types.model_spec import ModelSpec

BIN_SUFFIXES = (".bin", ".pt", ".pth")
CONVERSION = "conversion.json"
_TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
_TEXTS = (
    *_TOKENIZER,
    "chat_template.jinja",
    "chat_template.json",
    "README.md",
    "LICENSE",
    "LICENSE.txt",
    "NOTICE",
    "training.json",
    "corpus.txt",
)
_SPARE_TEMPLATE = "additional_chat_templates/default.jinja"


@dataclass(frozen=True, slots=True)
class Source:
    """A model to convert. `verified`: every file was compared with the digests of its manifest; `digest` is that of a directory."""

    name: str
    spec: ModelSpec
    generation: GenerationDefaults
    weights: WeightFiles
    files: dict[str, bytes]
    digest: str | None = None
    verified: bool = False

    def reader(self) -> SafetensorsReader | BinReader:
        """A reader of its tensors, to be used as a context manager."""
        return SafetensorsReader(self.weights) if self.weights.safetensors else BinReader(self.weights)

    def match(self, reader: SafetensorsReader | BinReader) -> Match:
        """Which stored tensor fills which rows of which parameter."""
        return (match_own if self.spec.family == OWN_FAMILY else match_hugging_face)(self.spec, reader.shapes)


def open_source(path: Path, config: Path | None = None) -> Source:
    """Read what `path` is; `config` names the configuration of a weight file that has none beside it. Raises CheckpointError."""
    if not path.exists():
        raise CheckpointError(f"{path} does not exist: name a model directory or a weight file.")
    if path.is_dir():
        return _open_described(path, config or _config_in(path), find_weight_files(path))
    if path.suffix in BIN_SUFFIXES:
        content = read_bin(path)
        weights = WeightFiles((path,), False, {})
        if content.config is not None:
            return _open_own_file(path, content, weights)
        return _open_described(path, config or _config_beside(path), weights)
    if path.suffix == ".safetensors":
        return _open_described(path, config or _config_beside(path), WeightFiles((path,), True, {}))
    kinds = ", ".join((*BIN_SUFFIXES, ".safetensors"))
    raise CheckpointError(f"{path} is not a model directory and none of {kinds}: name one of these.")


def _open_described(path: Path, config: Path, weights: WeightFiles) -> Source:
    """A directory or a weight file with its configuration; a directory that is complete is verified."""
    directory = config.parent
    if path == directory and not (config.name == CONFIG and not (directory / MANIFEST).is_file()):
        manifest = read_manifest(directory)
        if manifest.is_own_format:
            verify(manifest)
        own = manifest.is_own_format
        return Source(path.name, manifest.spec, manifest.generation, weights, _files(directory), manifest.digest, verified=own)
    spec, generation = read_description(config)
    return Source(path.name, spec, generation, weights, _files(directory))


def _open_own_file(path: Path, content: BinFile, weights: WeightFiles) -> Source:
    spec, generation = parse_own(content.config or "", f"{path} ({CONFIG})")
    files = {name: text.encode() for name, text in (content.files or {}).items()}
    return Source(path.name, spec, generation_defaults(generation), weights, files)


def _config_in(directory: Path) -> Path:
    for name in (CONFIG, "config.json"):
        if (directory / name).is_file():
            return directory / name
    raise CheckpointError(f"{directory} holds no model: it has neither {CONFIG} nor config.json; name one with --config.")


def _config_beside(path: Path) -> Path:
    """The configuration of a weight file: its own name with .yaml, or that of its directory."""
    for candidate in (path.with_suffix(".yaml"), path.parent / CONFIG, path.parent / "config.json"):
        if candidate.is_file():
            return candidate
    raise CheckpointError(
        f"{path} does not say what network it holds: put {path.stem}.yaml, {CONFIG} or config.json beside it, or name one with --config."
    )


def _files(directory: Path) -> dict[str, bytes]:
    """The tokenizer's files, the chat template, card and licence of a model."""
    files = {}
    for name in _TEXTS:
        if (directory / name).is_file():
            files[name] = _bounded(directory / name)
    if not (directory / "chat_template.jinja").is_file() and (directory / _SPARE_TEMPLATE).is_file():
        files["chat_template.jinja"] = (find_chat_template(directory) or "").encode()
    return files


def _bounded(path: Path) -> bytes:
    if path.stat().st_size > CONFIG_BYTES:
        raise CheckpointError(f"{path} is larger than {CONFIG_BYTES} bytes, which no file of its kind is: is it damaged?")
    return path.read_bytes()
