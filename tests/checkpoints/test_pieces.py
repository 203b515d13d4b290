from __future__ import annotations

from pathlib import Path

import pytest

from service.checkpoints.hugging_face import FAMILIES
from service.checkpoints.manifest import read_manifest
from service.checkpoints.pieces import Match, match_hugging_face, match_own, parameter_shapes
from service.checkpoints.stored_tensors import find_weight_files, read_tensors
from service.types.catalog import V2_3, Shape
from service.types.errors import CheckpointError
from service.types.model_spec import ModelSpec
from tests.tiny_models import build_tiny

Stored = dict[str, tuple[int, ...]]


def stored_of(directory: Path) -> tuple[ModelSpec, Stored]:
    tensors = read_tensors(find_weight_files(directory))
    return read_manifest(directory).spec, {name: tensor.shape for name, tensor in tensors.items()}


def covered(match: Match) -> dict[str, int]:
    rows: dict[str, int] = {}
    for piece in match.pieces:
        assert rows.get(piece.target, 0) == piece.first_row
        rows[piece.target] = piece.first_row + piece.shape[0]
    return rows


@pytest.mark.parametrize("family", FAMILIES)
def test_pieces_cover_every_row_of_every_parameter_once(tmp_path: Path, family: str) -> None:
    spec, stored = stored_of(build_tiny(tmp_path, family))
    match = match_hugging_face(spec, stored)
    assert covered(match) == {name: shape[0] for name, shape in parameter_shapes(spec).items()}
    assert sorted(piece.source for piece in match.pieces) == sorted(stored)
    assert sum(_size(shape) for shape in stored.values()) == spec.parameters


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    spec, stored = stored_of(build_tiny(tmp_path))
    del stored["model.layers.1.self_attn.k_proj.weight"]
    with pytest.raises(CheckpointError, match=r"lack model\.layers\.1\.self_attn\.k_proj\.weight\.$"):
        match_hugging_face(spec, stored)


def test_many_missing_tensors_are_counted(tmp_path: Path) -> None:
    spec, _ = stored_of(build_tiny(tmp_path))
    with pytest.raises(CheckpointError, match=r"lack model\.embed_tokens\.weight, .* and 18 more"):
        match_hugging_face(spec, {})


@pytest.mark.parametrize("name", ["model.layers.2.input_layernorm.weight", "model.layers.0.self_attn.q_proj.bias", "score.weight"])
def test_a_tensor_without_a_place_is_named(tmp_path: Path, name: str) -> None:
    spec, stored = stored_of(build_tiny(tmp_path))
    with pytest.raises(CheckpointError, match=rf"the weights have {name}, which this model has no place for"):
        match_hugging_face(spec, {**stored, name: (64,)})


def test_a_wrong_shape_is_named(tmp_path: Path) -> None:
    spec, stored = stored_of(build_tiny(tmp_path))
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight has shape \[65\] and should have \[64\]"):
        match_hugging_face(spec, {**stored, "model.norm.weight": (65,)})


def test_known_buffers_of_old_checkpoints_are_ignored(tmp_path: Path) -> None:
    spec, stored = stored_of(build_tiny(tmp_path))
    buffers: Stored = {"model.layers.0.self_attn.rotary_emb.inv_freq": (8,), "model.rotary_emb.inv_freq": (8,)}
    assert match_hugging_face(spec, {**stored, **buffers}) == match_hugging_face(spec, stored)


def test_a_tied_head_may_be_stored_twice_or_instead(tmp_path: Path) -> None:
    spec, stored = stored_of(build_tiny(tmp_path, tie_word_embeddings=True))
    assert "lm_head.weight" not in stored
    twice = match_hugging_face(spec, {**stored, "lm_head.weight": (331, 64)})
    assert twice.duplicates == (("lm_head.weight", "model.embed_tokens.weight"),)
    instead = {name: shape for name, shape in stored.items() if "embed" not in name} | {"lm_head.weight": (331, 64)}
    assert match_hugging_face(spec, instead).pieces[0].source == "lm_head.weight"
    with pytest.raises(CheckpointError, match="differ in shape"):
        match_hugging_face(spec, {**stored, "lm_head.weight": (331, 65)})


def test_names_without_the_prefix(tmp_path: Path) -> None:
    spec, stored = stored_of(build_tiny(tmp_path, tie_word_embeddings=True))
    match = match_hugging_face(spec, {name.removeprefix("model."): shape for name, shape in stored.items()})
    assert all(not piece.source.startswith("model.") for piece in match.pieces)


def test_our_own_names_match_one_to_one() -> None:
    spec = V2_3.spec(Shape(vocab_size=61, dim=24, layers=2, heads=6, kv_heads=2, mlp_hidden=40, context_tokens=64))
    shapes = parameter_shapes(spec)
    assert [(piece.source, piece.target) for piece in match_own(spec, shapes).pieces] == [(name, name) for name in shapes]
    with pytest.raises(CheckpointError, match=r"lack layers\.1\.attention\.gate\.bias"):
        match_own(spec, {name: shape for name, shape in shapes.items() if name != "layers.1.attention.gate.bias"})


def _size(shape: tuple[int, ...]) -> int:
    size = 1
    for extent in shape:
        size *= extent
    return size
