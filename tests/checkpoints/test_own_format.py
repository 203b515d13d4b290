from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from service.checkpoints.own_format import own_config, read_own, shape_of
from service.types.catalog import LINES, V2_3, V3_5, V4_8, V5_2, Shape, VersionLine
from service.types.errors import CheckpointError
from service.types.kv_layout import FarSpec, FarStore
from service.types.model_spec import RopeScaling, RopeSpec
from service.types.vision import VisionSpec

SHAPE = Shape(vocab_size=61, dim=24, layers=3, heads=6, kv_heads=2, mlp_hidden=40, context_tokens=64, rope_theta=500.0, head_dim=8)
EYES = VisionSpec(patch=2, merge=2, dim=8, layers=1, heads=2, mlp_hidden=12, least_tokens=2, most_tokens=9, side_tokens=6)
GOOD = 'version: "2.3"\nvocab_size: 61\ndim: 24\nlayers: 3\nheads: 6\nkv_heads: 2\nmlp_hidden: 40\ncontext_tokens: 64\n'


def written(tmp_path: Path, text: str) -> Path:
    (tmp_path / "config.yaml").write_text(text)
    return tmp_path / "config.yaml"


@pytest.mark.parametrize("line", LINES, ids=lambda line: line.label)
def test_round_trip(tmp_path: Path, line: VersionLine) -> None:
    spec = line.spec(SHAPE, (1, 5), 0)
    read, generation = read_own(written(tmp_path, own_config(spec, {"temperature": 0.7})))
    assert read == spec
    assert generation.number("temperature") == 0.7


CHOICES = {
    "norm_eps": 1e-5,
    "tied_embeddings": False,
    "qk_norm": False,
    "qkv_bias": True,
    "out_bias": True,
    "mlp_bias": True,
    "rope": RopeSpec(500.0, 8, RopeScaling.YARN, 4.0, 16, beta_fast=16.0, mscale=0.7, truncate=False),
}


@pytest.mark.parametrize("line", LINES, ids=lambda line: line.label)
@pytest.mark.parametrize("choice", CHOICES)
def test_what_a_checkpoint_may_choose_comes_back(tmp_path: Path, line: VersionLine, choice: str) -> None:
    shape = replace(SHAPE, **{choice: CHOICES[choice]})
    spec = line.spec(shape)
    assert spec != line.spec(SHAPE) and shape_of(spec) == shape
    text = own_config(spec)
    assert f"{choice}:" in text and f"{choice}:" not in own_config(line.spec(SHAPE))
    assert read_own(written(tmp_path, text))[0] == spec


@pytest.mark.parametrize("kind", list(RopeScaling), ids=lambda kind: kind.value)
def test_every_rotation_comes_back(tmp_path: Path, kind: RopeScaling) -> None:
    spec = V2_3.spec(replace(SHAPE, rope=RopeSpec(500.0, 8, kind, 2.0, 32)))
    assert read_own(written(tmp_path, own_config(spec)))[0] == spec


def test_shared_layers_come_back_and_belong_to_their_line(tmp_path: Path) -> None:
    spec = V4_8.spec(replace(SHAPE, shared_layers=2))
    text = own_config(spec)
    assert "shared_layers: 2" in text and read_own(written(tmp_path, text))[0] == spec
    with pytest.raises(CheckpointError, match=r"config\.yaml.*shared_layers.*v2\.3 does not"):
        read_own(written(tmp_path, GOOD + "shared_layers: 2\n"))


def test_a_patch_of_the_line_is_written(tmp_path: Path) -> None:
    text = own_config(V2_3.spec(SHAPE), version="v2.3.1")
    assert "version: 2.3.1" in text and read_own(written(tmp_path, text))[0] == V2_3.spec(SHAPE)
    with pytest.raises(CheckpointError):
        own_config(V2_3.spec(SHAPE), version="1.0")


@pytest.mark.parametrize(
    ("rope", "name"),
    [
        ("{scaling: bent}", "scaling"),
        ("{factor: 2}", "scaling"),
        ("{scaling: linear, factor: 0}", "factor"),
        ("{scaling: linear, theta: 3}", "theta"),
        ("{scaling: llama3, low_freq_factor: 4, high_freq_factor: 4}", "high_freq_factor"),
        ("{scaling: dynamic, original_context: 0}", "original_context"),
        ("3", "rope"),
    ],
)
def test_rotations_are_refused_by_name(tmp_path: Path, rope: str, name: str) -> None:
    with pytest.raises(CheckpointError, match=rf"config\.yaml.*\b{name}\b"):
        read_own(written(tmp_path, GOOD + f"rope: {rope}\n"))


@pytest.mark.parametrize("line", LINES, ids=lambda line: line.label)
def test_the_version_decides_the_line(tmp_path: Path, line: VersionLine) -> None:
    spec, _ = read_own(written(tmp_path, GOOD.replace("2.3", line.number + ".4")))
    assert (spec.line, spec.precision) == (line.number, line.precision)


def test_round_trip_of_a_line_that_reads_images(tmp_path: Path) -> None:
    spec = V3_5.spec(replace(SHAPE, vision=EYES), (1,), None, 4)
    text = own_config(spec)
    assert read_own(written(tmp_path, text))[0] == spec and spec.vision == EYES
    assert "vision" not in own_config(V3_5.spec(SHAPE))


@pytest.mark.parametrize(
    ("old", "new", "name"),
    [
        ("version: '3.5'", "version: '2.3'", "vision"),
        ("image_id: 4\n", "", "image_id"),
        ("image_id: 4", "image_id: 61", "image_id"),
        ("patch: 2", "patch: 0", "patch"),
        ("merge: 2", "marge: 2", "marge"),
        ("  heads: 2", "  heads: 3", "heads"),
        ("most_tokens: 9", "most_tokens: 1", "most_tokens"),
        ("most_tokens: 9", "most_tokens: 99", "most_tokens"),
    ],
)
def test_a_wrong_patch_encoder_is_refused_by_name(tmp_path: Path, old: str, new: str, name: str) -> None:
    text = own_config(V3_5.spec(replace(SHAPE, vision=EYES), image_id=4))
    assert old in text
    with pytest.raises(CheckpointError, match=rf"config\.yaml.*\b{name}\b"):
        read_own(written(tmp_path, text.replace(old, new, 1)))


def test_a_spec_that_no_line_gives_is_not_written() -> None:
    spec = LINES[0].spec(SHAPE)
    window = replace(spec.layers[0], attention=replace(spec.layers[0].attention, softcap=30.0))
    for other in (replace(spec, layers=(spec.layers[0], spec.layers[1], window)), replace(spec, family="llama"), replace(spec, line=None)):
        with pytest.raises(CheckpointError, match="version line"):
            own_config(other)


@pytest.mark.parametrize(
    ("old", "new", "name"),
    [
        ('version: "2.3"', "version: 2.3", "version"),
        ("2.3", "9.9", "version"),
        ("dim: 24", "dim: -1", "dim"),
        ("dim: 24", "dims: 24", "dims"),
        ("heads: 6\nkv", "heads: 5\nkv", "kv_heads"),
        ("dim: 24", "dim: 18", "head_dim"),
        ("layers: 3", "layers: 1000000", "layers"),
        ("context_tokens: 64\n", "", "context_tokens"),
        ("context_tokens: 64\n", "context_tokens: 64\nqk_norm: 1\n", "qk_norm"),
        ("context_tokens: 64\n", "context_tokens: 64\nnorm_eps: -1\n", "norm_eps"),
        ("dim: 24", "dim: !!python/object/apply:os.getcwd []", "YAML"),
        ("dim: 24", "dim: [", "YAML"),
    ],
)
def test_refused_by_name(tmp_path: Path, old: str, new: str, name: str) -> None:
    assert old in GOOD
    with pytest.raises(CheckpointError, match=rf"config\.yaml.*\b{name}\b"):
        read_own(written(tmp_path, GOOD.replace(old, new, 1)))


@pytest.mark.parametrize("text", ["", "- a", "3"])
def test_not_a_mapping(tmp_path: Path, text: str) -> None:
    with pytest.raises(CheckpointError, match="mapping"):
        read_own(written(tmp_path, text))


LONG = {"window": 128, "far": FarSpec(blocks=3, store=FarStore.INT4, refresh=4, sink_blocks=2, dense_prompts=True), "dense_layers": (0, 2)}


@pytest.mark.parametrize("choice", LONG)
def test_windows_and_far_blocks_come_back_and_belong_to_their_line(tmp_path: Path, choice: str) -> None:
    shape = replace(SHAPE, **{choice: LONG[choice]})
    spec = V5_2.spec(shape)
    assert spec != V5_2.spec(SHAPE) and shape_of(spec) == shape
    text = own_config(spec)
    assert read_own(written(tmp_path, text))[0] == spec and f"{choice}:" not in own_config(V5_2.spec(SHAPE))
    with pytest.raises(CheckpointError, match=rf"{choice} .*belongs to a line that reads long contexts"):
        read_own(written(tmp_path, text.replace("'5.2'", "'2.3'")))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("far: {store: int2}", "store .*must be one of int8, int4, native, evict"),
        ("far: {refresh: 3}", "refresh .*must divide a block of 64 tokens"),
        ("far: {sub_block_tokens: 24}", "sub_block_tokens .*must divide"),
        ("far: {speed: 3}", "speed is not a field of far blocks"),
        ("far: {blocks: -1}", "blocks .*must be a whole number"),
        ("dense_layers: [3]", "dense_layers .*must list layers from 0 to 2"),
        ("dense_layers: [true]", "dense_layers .*must list layers"),
        ("dense_layers: [0, 1, 2]", "dense_layers .*leaves no layer"),
        ("window: -5", "window .*must be a whole number"),
    ],
)
def test_senseless_far_blocks_are_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        read_own(written(tmp_path, GOOD.replace("2.3", "5.2") + text + "\n"))
