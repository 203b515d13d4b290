"""Conversions of tiny models: the function stays, round trips are bit-equal, what would be lost is refused, bad input leaves nothing."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from service.checkpoints.convert import Wanted, convert
from service.checkpoints.convert_plan import Stretch
from service.checkpoints.load import load
from service.checkpoints.manifest import read_manifest, verify
from service.checkpoints.store import save
from service.models.attention import DenseAttend
from service.models.build import build, init_weights
from service.models.decoder import Decoder
from service.types.catalog import LINES, V1_0, V2_3, V4_8, Shape, VersionLine
from service.types.errors import CheckpointError
from service.types.model_spec import RopeScaling
from tests.tiny_models import build_tiny, write_tokenizer

SHAPE = Shape(vocab_size=300, dim=24, layers=2, heads=6, kv_heads=2, mlp_hidden=40, context_tokens=64, head_dim=8)
PROMPT = 40
PAIRS = [(a, b) for a in LINES for b in LINES]


def number(line: VersionLine) -> tuple[int, ...]:
    return tuple(map(int, line.number.split(".")))


def model_of(directory: Path, line: VersionLine, shape: Shape = SHAPE, dtype: str = "float32") -> Path:
    """A model of `line` with random weights, norms and gates."""
    decoder = build(line.spec(shape, (257,), 256), "cpu", torch.float32)
    init_weights(decoder, 3)
    generator = torch.Generator().manual_seed(4)
    state = {name: value + 0.3 * torch.randn(value.shape, generator=generator) for name, value in decoder.state_dict().items()}
    tokenizer = directory.parent / "tokenizer"
    tokenizer.mkdir(parents=True, exist_ok=True)
    write_tokenizer(tokenizer)
    extras = {path.name: path.read_bytes() for path in tokenizer.iterdir()}
    save(directory, decoder.spec, state, {**extras, "README.md": b"# card\n"}, dtype=dtype, generation={"temperature": 0.5})
    return directory


def logits(directory: Path, tokens: int = PROMPT) -> Tensor:
    decoder: Decoder = load(read_manifest(directory), "cpu", torch.float32, serving=False)
    ids = torch.arange(tokens) * 7 % 256
    with torch.no_grad():
        return decoder(ids, torch.arange(tokens), DenseAttend(1, tokens, decoder.spec.layers))


def converted(source: Path, line: VersionLine, **wishes: object) -> Path:
    output = source.parent / f"{source.name}-{line.number}"
    convert(source, output, Wanted(line.number, **wishes))  # type: ignore[arg-type]
    return output


@pytest.mark.parametrize(("first", "second"), PAIRS, ids=lambda line: line.label)
def test_every_pair_keeps_the_function_or_says_what_is_lost(tmp_path: Path, first: VersionLine, second: VersionLine) -> None:
    source = model_of(tmp_path / "model", first)
    try:
        target = converted(source, second)
    except CheckpointError as refusal:
        assert number(second) < number(first) and "--lossy" in str(refusal)
        target = converted(source, second, lossy=True)
        assert json.loads((target / "conversion.json").read_text())["losses"]
    else:
        assert torch.allclose(logits(source), logits(target), rtol=0, atol=1e-5)
    manifest = read_manifest(target)
    verify(manifest)
    assert (manifest.line, manifest.generation.temperature, manifest.spec.end_ids) == (second.number, 0.5, (257,))


@pytest.mark.parametrize(("first", "second"), [pair for pair in PAIRS if number(pair[0]) <= number(pair[1])], ids=lambda line: line.label)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_round_trips_are_bit_equal(tmp_path: Path, first: VersionLine, second: VersionLine, dtype: str) -> None:
    source = model_of(tmp_path / "model", first, dtype=dtype)
    back = converted(converted(source, second), first)
    assert (back / "model.safetensors").read_bytes() == (source / "model.safetensors").read_bytes()
    assert (back / "config.yaml").read_bytes() == (source / "config.yaml").read_bytes()


FAMILY_CASES = {
    "llama": {},
    "llama-tied-bf16": {"tie_word_embeddings": True, "dtype": "bfloat16"},
    "llama-biases": {"attention_bias": True, "mlp_bias": True, "rms_norm_eps": 1e-3},
    "llama-linear": {"rope": {"rope_type": "linear", "factor": 4.0}},
    "llama-bin": {"storage": "bin"},
    "llama-sharded": {"storage": "sharded"},
    "mistral-all": {"sliding_window": 256},
    "qwen2": {},
    "qwen3": {"generation": {"temperature": 0.3, "eos_token_id": [257, 1]}},
}


@pytest.mark.parametrize("line", LINES, ids=lambda line: line.label)
@pytest.mark.parametrize("case", FAMILY_CASES)
def test_families_become_lines_with_the_same_logits(tmp_path: Path, case: str, line: VersionLine) -> None:
    source = build_tiny(tmp_path / "foreign", case.partition("-")[0], **FAMILY_CASES[case])  # type: ignore[arg-type]
    target = converted(source, line)
    assert torch.allclose(logits(source), logits(target), rtol=0, atol=1e-5)
    before, after = read_manifest(source), read_manifest(target)
    assert (before.spec.end_ids, before.spec.bos_id, before.generation) == (after.spec.end_ids, after.spec.bos_id, after.generation)
    assert before.chat_template == after.chat_template is not None
    assert before.stored_dtype == after.stored_dtype


def test_gates_that_are_added_are_open_in_every_type(tmp_path: Path) -> None:
    source = build_tiny(tmp_path / "foreign", "qwen3")
    decoder = load(read_manifest(converted(source, V2_3)), "cpu", torch.float32, serving=False)
    gate = decoder.layers[0].attention.gate
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        x = torch.randn(5, 64).to(dtype)
        assert bool((torch.sigmoid(gate.to(dtype)(x)) == 1).all())


def test_windows_are_a_loss_that_is_named(tmp_path: Path) -> None:
    source = build_tiny(tmp_path / "foreign", "mistral", sliding_window=7)
    with pytest.raises(CheckpointError, match=r"a token sees .* where it saw 7.*--lossy"):
        converted(source, V2_3)
    assert not (tmp_path / "foreign-2.3").exists()
    target = converted(source, V2_3, lossy=True)
    assert torch.allclose(logits(source, 7), logits(target, 7), rtol=0, atol=1e-5)
    assert not torch.allclose(logits(source, 12), logits(target, 12), rtol=0, atol=1e-3)


@pytest.mark.parametrize("suffix", [".pt", ".bin"])
def test_one_file_and_back(tmp_path: Path, suffix: str) -> None:
    source = model_of(tmp_path / "model", V1_0)
    report = convert(source, tmp_path / f"v2.3_model{suffix}", Wanted("2.3"))
    assert report.digest is None and not list(tmp_path.glob(".*"))
    state = torch.load(report.output, weights_only=True)
    assert state["tensors"]["norm.weight"].untyped_storage().nbytes() == 24 * 4
    back = convert(report.output, tmp_path / "back", Wanted("v1.0"))
    assert (tmp_path / "back" / "model.safetensors").read_bytes() == (source / "model.safetensors").read_bytes()
    assert read_manifest(tmp_path / "back").chat_template == read_manifest(source).chat_template
    assert back.digest == read_manifest(tmp_path / "back").digest


def test_what_the_report_and_the_files_say(tmp_path: Path) -> None:
    source = build_tiny(tmp_path / "foreign", "qwen3")
    (source / "README.md").write_text("# theirs\n")
    seen: list[tuple[int, int]] = []
    report = convert(source, tmp_path / "out", Wanted("v2.3.1"), progress=lambda done, total: seen.append((done, total)))
    assert report.added == ("head gates, open (4 tensors)",) and report.losses == () and not report.source.verified
    assert seen[-1] == (report.bytes_written, report.bytes_written) and seen == sorted(seen)
    assert "version: 2.3.1" in (tmp_path / "out" / "config.yaml").read_text()
    record = json.loads((tmp_path / "out" / "conversion.json").read_text())
    assert (record["source"], record["source_version"], record["version"]) == ("foreign", "qwen3", "2.3.1")
    assert record["source_digest"] == read_manifest(source).digest
    card = (tmp_path / "out" / "README.md").read_text()
    assert card.startswith("> This model was converted") and "v2.3.1 from qwen3" in card and card.endswith("# theirs\n")
    convert(tmp_path / "out", tmp_path / "again", Wanted("1.0"))
    again = (tmp_path / "again" / "README.md").read_text()
    assert again.count("converted by") == 1 and "v1.0 from v2.3" in again


class TestSharedWeights:
    """Layers that share their weights, and lines that do not."""

    shape = replace(SHAPE, layers=6, shared_layers=3)

    def test_they_are_stored_for_each_layer_and_once_again(self, tmp_path: Path) -> None:
        light = model_of(tmp_path / "light", V4_8, self.shape)
        plain = converted(light, V2_3)
        before, after = read_manifest(light).spec, read_manifest(plain).spec
        assert after.sharing is None and after.parameters > 2 * before.parameters
        assert torch.allclose(logits(light), logits(plain), rtol=0, atol=1e-5)
        assert json.loads((plain / "conversion.json").read_text())["losses"] == []
        back = converted(plain, V4_8)
        assert (back / "model.safetensors").read_bytes() == (light / "model.safetensors").read_bytes()
        assert (back / "config.yaml").read_bytes() == (light / "config.yaml").read_bytes()

    def test_layers_that_differ_are_kept(self, tmp_path: Path) -> None:
        plain = model_of(tmp_path / "plain", V2_3, replace(SHAPE, layers=4))
        light = converted(plain, V4_8)
        assert read_manifest(light).spec.sharing is None
        assert (light / "model.safetensors").read_bytes() == (plain / "model.safetensors").read_bytes()


class TestTypes:
    """Storing in another type."""

    def test_widening_loses_nothing(self, tmp_path: Path) -> None:
        source = model_of(tmp_path / "model", V2_3, dtype="bfloat16")
        target = converted(source, V2_3, dtype="float32")
        assert read_manifest(target).stored_dtype == "float32"
        assert torch.equal(logits(source), logits(target))

    def test_rounding_is_a_loss(self, tmp_path: Path) -> None:
        source = model_of(tmp_path / "model", V2_3)
        with pytest.raises(CheckpointError, match=r"values are rounded to bfloat16, the first in embed\.weight.*--lossy"):
            converted(source, V2_3, dtype="bfloat16")
        assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "tokenizer"]
        assert read_manifest(converted(source, V2_3, dtype="bfloat16", lossy=True)).stored_dtype == "bfloat16"

    def test_narrowing_what_fits_loses_nothing(self, tmp_path: Path) -> None:
        source = model_of(tmp_path / "model", V2_3, dtype="bfloat16")
        wide = converted(source, V1_0, dtype="float32")
        assert (converted(wide, V2_3, dtype="bfloat16") / "model.safetensors").read_bytes() == (source / "model.safetensors").read_bytes()

    def test_too_large_for_halves(self, tmp_path: Path) -> None:
        source = model_of(tmp_path / "model", V2_3, replace(SHAPE, norm_eps=1e-5))
        with pytest.raises(CheckpointError, match="loses something"):
            converted(source, V2_3, dtype="float16")


class TestContext:
    """Other contexts and rotations."""

    def test_shorter_is_a_loss(self, tmp_path: Path) -> None:
        source = model_of(tmp_path / "model", V2_3)
        with pytest.raises(CheckpointError, match="more than 32 tokens are refused; the context was 64"):
            converted(source, V2_3, stretch=Stretch(32))
        target = converted(source, V2_3, stretch=Stretch(32), lossy=True)
        assert torch.equal(logits(source, 30), logits(target, 30)) and read_manifest(target).spec.context_tokens == 32

    @pytest.mark.parametrize("scaling", [RopeScaling.DEFAULT, RopeScaling.DYNAMIC, RopeScaling.LINEAR, RopeScaling.YARN])
    def test_longer(self, tmp_path: Path, scaling: RopeScaling) -> None:
        source = model_of(tmp_path / "model", V1_0)
        target = converted(source, V2_3, stretch=Stretch(256, scaling))
        spec = read_manifest(target).spec
        assert (spec.context_tokens, spec.rope.scaling) == (256, scaling)
        kept = scaling in (RopeScaling.DEFAULT, RopeScaling.DYNAMIC)
        assert torch.allclose(logits(source, 60), logits(target, 60), rtol=0, atol=1e-5) == kept
        assert logits(target, 200).isfinite().all()
        (note,) = [note for note in json.loads((target / "conversion.json").read_text())["notes"] if "grows" in note]
        assert "from 64 to 256" in note

    def test_a_scaled_rotation_is_not_scaled_again(self, tmp_path: Path) -> None:
        source = build_tiny(tmp_path / "foreign", rope={"rope_type": "linear", "factor": 2.0})
        with pytest.raises(CheckpointError, match=r"scaled already \(linear\)"):
            converted(source, V2_3, stretch=Stretch(4096, RopeScaling.YARN))

    def test_a_scaling_needs_a_longer_context(self, tmp_path: Path) -> None:
        with pytest.raises(CheckpointError, match="longer than the model's 64 tokens"):
            converted(model_of(tmp_path / "model", V2_3), V2_3, stretch=Stretch(64, RopeScaling.LINEAR))


def test_an_unknown_line(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"'9\.9' is not a version line"):
        convert(tmp_path, tmp_path / "out", Wanted("9.9"))


@pytest.mark.parametrize("fault", ["nan", "infinite"])
@pytest.mark.parametrize("output", ["out", "out.pt"])
def test_values_that_are_no_numbers_leave_nothing(tmp_path: Path, fault: str, output: str) -> None:
    source = build_tiny(tmp_path / "foreign", storage="bin")
    state = torch.load(source / "pytorch_model.bin")
    state["model.layers.1.mlp.down_proj.weight"][3, 3] = float("nan" if fault == "nan" else "inf")
    torch.save(state, source / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.down\.weight holds values that are not finite"):
        convert(source, tmp_path / output, Wanted("2.3"))
    assert [path.name for path in tmp_path.iterdir()] == ["foreign"]


def test_tied_tensors_that_differ(tmp_path: Path) -> None:
    source = build_tiny(tmp_path / "foreign", tie_word_embeddings=True, storage="bin")
    state = torch.load(source / "pytorch_model.bin")
    state["lm_head.weight"] = state["model.embed_tokens.weight"].clone()
    torch.save(state, source / "pytorch_model.bin")
    assert torch.equal(logits(converted(source, V2_3)), logits(source))
    state["lm_head.weight"][5, 5] += 1
    torch.save(state, source / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="differs from"):
        convert(source, tmp_path / "again", Wanted("2.3"))
