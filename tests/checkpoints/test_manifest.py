from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from service.checkpoints.hugging_face import FAMILIES
from service.checkpoints.manifest import GenerationDefaults, read_manifest
from service.types.errors import CheckpointError
from tests.tiny_models import CHAT_TEMPLATE, END_ID, build_tiny, write_safetensors, write_tokenizer


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("storage", ["single", "sharded", "bin"])
def test_what_a_directory_holds(tmp_path: Path, family: str, storage: str) -> None:
    manifest = read_manifest(build_tiny(tmp_path, family, dtype="bfloat16", storage=storage))
    assert (manifest.family, manifest.line, manifest.is_own_format, manifest.modalities) == (family, None, False, ("text",))
    assert manifest.stored_dtype == "bfloat16"
    assert manifest.weight_bytes == 2 * manifest.spec.parameters
    assert len(manifest.weight_files) == (2 if storage == "sharded" else 1)
    assert all(path.is_file() for path in manifest.weight_files)
    assert manifest.chat_template == CHAT_TEMPLATE
    assert manifest.generation == GenerationDefaults()


def test_reading_needs_no_torch_numpy_or_tokenizers(tmp_path: Path) -> None:
    build_tiny(tmp_path, "qwen3")
    code = (
        "import sys; from pathlib import Path; from service.checkpoints.manifest import read_manifest\n"
        f"assert read_manifest(Path({str(tmp_path)!r})).family == 'qwen3'\n"
        "print([name for name in ('torch', 'numpy', 'tokenizers', 'safetensors', 'jinja2') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_generation_config_gives_defaults_and_end_tokens(tmp_path: Path) -> None:
    generation = {"temperature": 0.6, "top_p": 0.95, "top_k": 20, "repetition_penalty": 1.1, "eos_token_id": [5, 7], "do_sample": True}
    manifest = read_manifest(build_tiny(tmp_path, generation=generation))
    assert manifest.generation == GenerationDefaults(0.6, 0.95, 20, 1.1)
    assert manifest.spec.end_ids == (5, 7)


def test_end_tokens_fall_back_to_the_config_and_then_the_tokenizer(tmp_path: Path) -> None:
    assert read_manifest(build_tiny(tmp_path / "a", generation={"temperature": 1.0})).spec.end_ids == (END_ID,)
    assert read_manifest(build_tiny(tmp_path / "b", "qwen2", eos_token_id=None)).spec.end_ids == (END_ID,)
    directory = build_tiny(tmp_path / "c", "qwen2", eos_token_id=None)
    decoder = {"7": {"content": "<|stop|>"}, "x": {"content": "<|stop|>"}}
    edit(directory / "tokenizer_config.json", eos_token={"content": "<|stop|>"}, added_tokens_decoder=decoder)
    assert read_manifest(directory).spec.end_ids == (7,)


@pytest.mark.parametrize(
    ("field", "value"),
    [("temperature", -1), ("temperature", "hot"), ("top_p", 1.5), ("top_k", 0.5), ("repetition_penalty", 0), ("eos_token_id", [331])],
)
def test_senseless_generation_defaults_are_refused_by_name(tmp_path: Path, field: str, value: Any) -> None:
    with pytest.raises(CheckpointError, match=rf"generation_config\.json: {field}\b"):
        read_manifest(build_tiny(tmp_path, generation={field: value}))


def test_chat_templates_in_every_place(tmp_path: Path) -> None:
    directory = build_tiny(tmp_path)
    write_tokenizer(directory, None)
    assert read_manifest(directory).chat_template is None
    edit(directory / "tokenizer_config.json", chat_template=[{"name": "tool", "template": "t"}, {"name": "default", "template": "listed"}])
    assert read_manifest(directory).chat_template == "listed"
    (directory / "chat_template.json").write_text('{"chat_template": "json"}')
    assert read_manifest(directory).chat_template == "json"
    (directory / "additional_chat_templates").mkdir()
    (directory / "additional_chat_templates" / "default.jinja").write_text("additional")
    assert read_manifest(directory).chat_template == "additional"
    (directory / "chat_template.jinja").write_text("file")
    assert read_manifest(directory).chat_template == "file"


def test_the_digest_tells_checkpoints_apart(tmp_path: Path) -> None:
    first, same, other = (read_manifest(build_tiny(tmp_path / str(index), seed=seed)).digest for index, seed in enumerate((0, 0, 1)))
    assert first == same != other
    assert len(first) == 64


def test_incomplete_weights_are_refused_before_any_loading(tmp_path: Path) -> None:
    directory = build_tiny(tmp_path, num_hidden_layers=2)
    edit(directory / "config.json", num_hidden_layers=3)
    with pytest.raises(CheckpointError, match=r"lack model\.layers\.2\.input_layernorm\.weight"):
        read_manifest(directory)


def test_weights_of_types_not_served_are_refused_by_name(tmp_path: Path) -> None:
    directory = build_tiny(tmp_path)
    content = (directory / "model.safetensors").read_bytes()
    position = content.index(b'"F32"')
    (directory / "model.safetensors").write_bytes(content[:position] + b'"I32"' + content[position + 5 :])
    with pytest.raises(CheckpointError, match=r"model\.embed_tokens\.weight is stored as I32, and only F32, BF16, F16 are served"):
        read_manifest(directory)


@pytest.mark.parametrize(("make", "says"), [
    (lambda path: None, "is not a directory"),
    (lambda path: path.write_text("x"), "is not a directory"),
    (lambda path: path.mkdir(), r"holds no model: it has neither config\.yaml nor config\.json"),
    (lambda path: (path.mkdir(), (path / "config.json").write_text("{}")), "model_type is missing"),
    (lambda path: (path.mkdir(), (path / "config.json").mkdir()), "holds no model"),
    (lambda path: (build_tiny(path) / "model.safetensors").unlink(), "has no weights"),
    (lambda path: (build_tiny(path) / "generation_config.json").write_text("{"), "not valid JSON"),
    (lambda path: (build_tiny(path) / "tokenizer_config.json").write_text("[]"), "must hold a JSON object"),
    (lambda path: write_safetensors(build_tiny(path) / "model.safetensors", {"a": np.zeros(1, np.float32)}), "lack"),
    (lambda path: (build_tiny(path) / "model.safetensors").write_bytes(b""), "is damaged"),
])  # fmt: skip
def test_every_bad_directory_gets_one_sentence(tmp_path: Path, make: Any, says: str) -> None:
    make(tmp_path / "model")
    with pytest.raises(CheckpointError, match=says) as refused:
        read_manifest(tmp_path / "model")
    assert "\n" not in str(refused.value)
    assert str(refused.value).endswith(".")
