"""From a model directory to a Manifest: what the network is, its digest, its weight files and its defaults; no torch, in milliseconds.

It does not load weights or tokenizers. Invariant: a Manifest describes a checkpoint whose configuration is fully understood and whose
tensors (where the format lists them) are complete and of the right shapes, so that a loader may rely on it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from service.checkpoints.digests import file_digest, list_digest, sampled_digest
from service.checkpoints.fields import Fields, read_object, read_text
from service.checkpoints.hugging_face import read_config
from service.checkpoints.own_format import CONFIG, read_own, read_version
from service.checkpoints.pieces import HARMLESS, match_hugging_face, match_own
from service.checkpoints.stored_tensors import DTYPES, StoredTensor, WeightFiles, find_weight_files, read_tensors, require_float
from service.types.errors import CheckpointError
from service.types.model_spec import ELEMENT_BYTES, ModelSpec

MANIFEST = "manifest.json"
OWN_FAMILY = "deepseek-line"


@dataclass(frozen=True, slots=True)
class GenerationDefaults:
    """Sampling defaults that a checkpoint recommends; None where it says nothing."""

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    repetition_penalty: float | None = None


@dataclass(frozen=True, slots=True)
class Manifest:
    """A checkpoint that can be loaded. `digest` is 64 hex digits; `weight_bytes` the parameters in `stored_dtype`, nothing else.

    `version` is the line or a patch of it as config.yaml says (`2.3.1`), None for other families; `lock` the versions of the interpreter
    and of libraries that it was published with.
    """

    directory: Path
    spec: ModelSpec
    digest: str
    family: str
    line: str | None
    weight_files: tuple[Path, ...]
    weight_bytes: int
    stored_dtype: str
    generation: GenerationDefaults
    chat_template: str | None
    version: str | None = None
    lock: tuple[tuple[str, str], ...] = ()

    @property
    def modalities(self) -> tuple[str, ...]:
        """What a prompt may hold: text, and images where the network reads them."""
        return self.spec.modalities

    @property
    def is_own_format(self) -> bool:
        """Whether tensors have our own names."""
        return self.line is not None


def read_manifest(directory: Path) -> Manifest:
    """Read a directory in our own format (config.yaml) or Hugging Face's (config.json). Raises CheckpointError."""
    if not directory.is_dir():
        raise CheckpointError(f"{directory} is not a directory: name one that holds a model.")
    if (directory / CONFIG).is_file():
        return _read_own(directory)
    if (directory / "config.json").is_file():
        return _read_hugging_face(directory)
    raise CheckpointError(f"{directory} holds no model: it has neither {CONFIG} nor config.json.")


def read_description(config: Path) -> tuple[ModelSpec, GenerationDefaults]:
    """What a config.yaml or config.json says of its model, with what its neighbours add; no weights. Raises CheckpointError."""
    if config.suffix in (".yaml", ".yml"):
        spec, generation = read_own(config)
        return spec, generation_defaults(generation)
    return _describe_hugging_face(config)


def verify(manifest: Manifest) -> None:
    """Compare every file of a checkpoint in our own format, weights included, with its SHA-256. Raises CheckpointError."""
    if not manifest.is_own_format:
        raise CheckpointError(f"{manifest.directory} has no manifest to verify against.")
    _verify_files(manifest.directory, _listed_files(manifest.directory))


def _verify_files(directory: Path, digests: Mapping[str, str]) -> None:
    for name, digest in digests.items():
        if file_digest(directory / name) != digest:
            raise CheckpointError(f"{directory / name} is not the file that {MANIFEST} describes: copy or publish the model anew.")


def _read_own(directory: Path) -> Manifest:
    spec, generation = read_own(directory / CONFIG)
    files = _listed_files(directory)
    weights = find_weight_files(directory)
    for name in (CONFIG, *(path.name for path in weights.files)):
        if name not in files:
            raise CheckpointError(f"{directory / MANIFEST} does not list {name}: publish the model anew.")
    weight_names = {path.name for path in weights.files}
    _verify_files(directory, {name: digest for name, digest in files.items() if name not in weight_names})
    tensors = read_tensors(weights)
    match_own(spec, {name: tensor.shape for name, tensor in tensors.items()})
    stored_dtype = _stored_dtype(tensors)
    return Manifest(
        directory=directory,
        spec=spec,
        digest=list_digest(files),
        family=OWN_FAMILY,
        line=spec.line,
        weight_files=weights.files,
        weight_bytes=_weight_bytes(spec, stored_dtype),
        stored_dtype=stored_dtype,
        generation=generation_defaults(generation),
        chat_template=find_chat_template(directory),
        version=read_version(directory / CONFIG),
        lock=_lock(directory),
    )


def _lock(directory: Path) -> tuple[tuple[str, str], ...]:
    lock = Fields(read_object(directory / MANIFEST), str(directory / MANIFEST)).nested("lock")
    return tuple((name, lock.text(name)) for name in lock.values)


def _describe_hugging_face(path: Path) -> tuple[ModelSpec, GenerationDefaults]:
    directory = path.parent
    generation = Fields({}, "")
    if (directory / "generation_config.json").is_file():
        generation = Fields(read_object(directory / "generation_config.json"), str(directory / "generation_config.json"))
    spec = read_config(read_object(path), str(path))
    end_ids = generation.ids("eos_token_id", spec.vocab_size) or spec.end_ids or _tokenizer_end(directory, spec.vocab_size)
    return replace(spec, end_ids=end_ids), generation_defaults(generation)


def _read_hugging_face(directory: Path) -> Manifest:
    spec, generation = _describe_hugging_face(directory / "config.json")
    weights = find_weight_files(directory)
    stored_dtype = _check_hugging_face(spec, weights, directory)
    return Manifest(
        directory=directory,
        spec=spec,
        digest=sampled_digest(directory, weights.files),
        family=spec.family,
        line=None,
        weight_files=weights.files,
        weight_bytes=_weight_bytes(spec, stored_dtype),
        stored_dtype=stored_dtype,
        generation=generation,
        chat_template=find_chat_template(directory),
    )


def _check_hugging_face(spec: ModelSpec, weights: WeightFiles, directory: Path) -> str:
    """The stored dtype; safetensors are checked now, `.bin` files when loaded, since only torch can read them."""
    if weights.safetensors:
        tensors = read_tensors(weights)
        match_hugging_face(spec, {name: tensor.shape for name, tensor in tensors.items()})
        return _stored_dtype(tensors)
    config = read_object(directory / "config.json")
    stored = config.get("torch_dtype") or config.get("dtype")
    return stored if isinstance(stored, str) and stored in DTYPES.values() else "float32"


def _listed_files(directory: Path) -> dict[str, str]:
    """The SHA-256 that manifest.json gives for each file by name, each file being there with its size."""
    if not (directory / MANIFEST).is_file():
        raise CheckpointError(f"{directory} has {CONFIG} and no {MANIFEST}: it was not completely written.")
    listed = Fields(read_object(directory / MANIFEST), str(directory / MANIFEST)).nested("files")
    digests: dict[str, str] = {}
    for name in listed.values:
        if Path(name).name != name or name in ("", ".", ".."):
            raise CheckpointError(f"{directory / MANIFEST} lists {name[:80]!r}, which is not the name of a file beside it.")
        entry = listed.nested(name)
        if not (directory / name).is_file():
            raise CheckpointError(f"{directory / MANIFEST} lists {name}, which is not there: is the copy complete?")
        if (directory / name).stat().st_size != entry.integer("bytes", low=0, high=1 << 62):
            raise CheckpointError(f"{directory / name} has not the size that {MANIFEST} gives: copy it again.")
        digests[name] = entry.text("sha256")
    return digests


def _stored_dtype(tensors: Mapping[str, StoredTensor]) -> str:
    """The dtype of most of the stored bytes. Raises CheckpointError for types that are not served."""
    stored_bytes: Counter[str] = Counter()
    for tensor in tensors.values():
        if not HARMLESS.match(tensor.name):
            stored_bytes[require_float(tensor)] += tensor.size
    return stored_bytes.most_common(1)[0][0]


def _weight_bytes(spec: ModelSpec, stored_dtype: str) -> int:
    return spec.parameters * ELEMENT_BYTES[stored_dtype]


def generation_defaults(generation: Fields) -> GenerationDefaults:
    """The sampling defaults of a configuration. Raises CheckpointError."""
    return GenerationDefaults(
        temperature=generation.optional_number("temperature", high=100.0),
        top_p=generation.optional_number("top_p", high=1.0),
        top_k=generation.integer("top_k", low=0) if generation.has("top_k") else None,
        repetition_penalty=generation.optional_number("repetition_penalty", low=1e-3, high=100.0),
    )


def find_chat_template(directory: Path) -> str | None:
    """The default chat template: its own file first, as `transformers` reads it, then the tokenizer's configuration."""
    for name in ("chat_template.jinja", "additional_chat_templates/default.jinja"):
        if (directory / name).is_file():
            return read_text(directory / name)
    for name in ("chat_template.json", "tokenizer_config.json"):
        template = read_object(directory / name).get("chat_template") if (directory / name).is_file() else None
        if isinstance(template, str):
            return template
        if isinstance(template, list):
            found = [entry.get("template") for entry in template if isinstance(entry, dict) and entry.get("name") == "default"]
            if found and isinstance(found[0], str):
                return found[0]
    return None


def _tokenizer_end(directory: Path, vocab_size: int) -> tuple[int, ...]:
    """The id of the tokenizer's own end token, for configurations that name none."""
    path = directory / "tokenizer_config.json"
    if not path.is_file():
        return ()
    settings = read_object(path)
    token = settings.get("eos_token")
    text = token.get("content") if isinstance(token, dict) else token
    added = settings.get("added_tokens_decoder")
    for key, entry in added.items() if isinstance(added, dict) else ():
        if isinstance(entry, dict) and entry.get("content") == text and key.isdecimal() and int(key) < vocab_size:
            return (int(key),)
    if not isinstance(text, str) or not (directory / "tokenizer.json").is_file():
        return ()
    entries = read_object(directory / "tokenizer.json").get("added_tokens")
    for entry in entries if isinstance(entries, list) else ():
        if isinstance(entry, dict) and entry.get("content") == text and isinstance(entry.get("id"), int) and 0 <= entry["id"] < vocab_size:
            return (entry["id"],)
    return ()
