"""Calibrating int4 weights while a checkpoint is read: what layers see, the order of parameters, shared layers, texts, tokenizers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from service.checkpoints import calibration
from service.checkpoints.bundled import bundled_directory
from service.checkpoints.calibration import MODULES, TOKENS, Calibrated, Nearest, calibration_tokens
from service.checkpoints.load import Quantisation, load
from service.checkpoints.manifest import Manifest, read_manifest
from service.checkpoints.pieces import parameter_shapes
from service.inputs.tokens import TokenCodec
from service.kernels.calibrated import InputMoments
from service.kernels.quantised import QuantisedWeight, dequantise
from service.models.attention import DenseAttend
from service.models.build import build
from service.models.decoder import Decoder
from service.types.catalog import V2_3, V3_5, V4_8, V5_2
from service.types.errors import CheckpointError
from tests.tiny_models import build_tiny, build_tiny_line

LINES = [V2_3, V3_5, V4_8, V5_2]


def stored_parameters(manifest: Manifest, kind: str = "int4") -> dict[str, object]:
    found: dict[str, object] = {}
    load(manifest, "cpu", torch.float32, quantisation=Quantisation(kind, seen=found.__setitem__))
    return found


def logits(decoder: Decoder, tokens: torch.Tensor) -> torch.Tensor:
    sequences, length = tokens.shape
    with torch.inference_mode():
        positions = torch.arange(length).repeat(sequences)
        found: torch.Tensor = decoder(tokens.reshape(-1), positions, DenseAttend(sequences, length, decoder.spec.layers))
    return found


@pytest.mark.parametrize("line", LINES, ids=lambda line: line.label)
def test_parameters_come_in_order_and_only_layers_are_calibrated(line, tmp_path: Path) -> None:
    manifest = read_manifest(build_tiny_line(tmp_path / "line", line))
    found, nearest = stored_parameters(manifest), load_nearest(manifest)
    assert list(found) == list(parameter_shapes(manifest.spec))
    for name, stored in found.items():
        if isinstance(stored, QuantisedWeight):
            same = torch.equal(stored.values, nearest[name].values)
            assert (stored.kind == "int8") == same == (not name.startswith("layers."))
        else:
            assert torch.equal(stored, nearest[name])


def load_nearest(manifest: Manifest) -> dict[str, object]:
    """The parameters of a load that rounds each by itself."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("service.checkpoints.load.Calibrated", lambda decoder, tokens: Nearest("int4", decoder.spec))
        return stored_parameters(manifest)


@pytest.mark.parametrize("line", LINES, ids=lambda line: line.label)
def test_moments_are_those_of_the_inputs_in_the_whole_model(line, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Shared weights count what every layer gives them. Only the rounding of the embedding separates the two."""
    manifest = read_manifest(build_tiny_line(tmp_path / "line", line, layers=3 if line.label != "v4.8" else 4))
    monkeypatch.setattr(calibration, "MODULES", MODULES[:3])
    monkeypatch.setattr(calibration, "TOKENS", 24)
    seen: dict[str, InputMoments] = {}

    def record(self: Calibrated) -> dict[str, InputMoments]:
        moments = sound(self)
        seen.update(moments)
        return moments

    sound = Calibrated._moments
    monkeypatch.setattr(Calibrated, "_moments", record)
    stored = stored_parameters(manifest)
    plain = load(manifest, "cpu", torch.float32, serving=False)
    plain.embed.weight.data.copy_(dequantise(stored["embed.weight"], slice(None)))
    expected: dict[str, InputMoments] = {}
    for name in seen:
        module = plain.get_submodule(name.removesuffix(".weight"))
        expected[name] = InputMoments(module.weight.shape[1])
        module.register_forward_pre_hook(lambda _, inputs, name=name: expected[name].add(inputs[0]))
    logits(plain, calibration_tokens(manifest))
    assert seen and all(block.any() for moments in seen.values() for block in moments.blocks)
    for name, moments in seen.items():
        for found, wanted in zip(moments.blocks, expected[name].blocks, strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3 * float(wanted.abs().max()))


@pytest.mark.parametrize("line", [V2_3, V4_8, V5_2], ids=lambda line: line.label)
def test_a_bundled_model_in_int4_is_nearer_to_itself_than_rounded_to_the_nearest(line, monkeypatch: pytest.MonkeyPatch) -> None:
    """The divergence from its own distribution on text that calibrated nothing."""
    manifest = read_manifest(bundled_directory(line))
    text = (Path(torch.__file__).parent / "functional.py").read_text(encoding="utf-8")[:20_000]
    tokens = torch.tensor(TokenCodec.load(manifest.directory).encode(text)[:2048]).view(8, 256)
    target = logits(load(manifest, "cpu", torch.float32), tokens).log_softmax(-1)

    def divergence() -> float:
        found = logits(load(manifest, "cpu", torch.float32, quantisation=Quantisation("int4")), tokens).log_softmax(-1)
        return float((target.exp() * (target - found)).sum(-1).mean())

    ours = divergence()
    monkeypatch.setattr("service.checkpoints.load.Calibrated", lambda decoder, tokens: Nearest("int4", decoder.spec))
    assert ours < 0.9 * divergence()


def test_one_layer_is_held_and_none_afterwards(tmp_path: Path) -> None:
    manifest = read_manifest(build_tiny(tmp_path / "model", num_hidden_layers=3))
    decoder = build(manifest.spec, "meta", torch.float32)
    rounding = Calibrated(decoder, torch.zeros(1, 4, dtype=torch.int64))
    held = []
    for name, shape in parameter_shapes(manifest.spec).items():
        if name.startswith("layers.1."):
            break
        for settled, _ in rounding.offer(name, torch.ones(shape)):
            held.append(settled)
            if settled == "embed.weight":
                decoder.embed.weight = torch.nn.Parameter(torch.ones(shape))
    assert held == ["embed.weight"]
    assert [settled for settled, _ in rounding.offer(name, torch.ones(shape))] == [
        name for name in parameter_shapes(manifest.spec) if name.startswith("layers.0.")
    ]
    assert list(rounding._held) == [name]


def test_texts_are_the_beginnings_of_the_modules_in_the_models_own_tokens(tmp_path: Path) -> None:
    manifest = read_manifest(build_tiny(tmp_path / "model", max_position_embeddings=2048))
    tokens = calibration_tokens(manifest)
    assert tokens.shape == (len(MODULES), TOKENS) and len(set(map(tuple, tokens.tolist()))) == len(MODULES)
    assert TokenCodec.load(manifest.directory).decode(tokens[0].tolist()).lstrip().startswith("# Author: Steven J. Bethard")
    short = read_manifest(build_tiny(tmp_path / "short", max_position_embeddings=64))
    assert calibration_tokens(short).shape == (len(MODULES), 64)


def test_what_cannot_be_calibrated_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = read_manifest(build_tiny(tmp_path / "small", vocab_size=260))
    with pytest.raises(CheckpointError, match=r"makes ids beyond 259, the model's last, .* or set --quantize int8"):
        load(small, "cpu", torch.float32, quantisation=Quantisation("int4"))
    sound = read_manifest(build_tiny(tmp_path / "model"))
    monkeypatch.setattr(calibration, "MODULES", ("no_such_module.py",))
    with pytest.raises(CheckpointError, match=r"calibrated with no_such_module\.py, which this Python lacks"):
        load(sound, "cpu", torch.float32, quantisation=Quantisation("int4"))
    (sound.directory / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match=r"no readable tokenizer\.json"):
        load(sound, "cpu", torch.float32, quantisation=Quantisation("int4"))
