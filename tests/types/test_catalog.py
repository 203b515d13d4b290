"""The version lines: names, what distinguishes them, and the networks that they describe."""

from __future__ import annotations

from dataclasses import replace

import pytest

from service.types.catalog import LINES, V1_0, V2_3, V3_5, V4_8, V5_2, Shape, find_line
from service.types.kv_layout import FarSpec


@pytest.mark.parametrize(("text", "line"), [("v1.0", V1_0), ("1.0", V1_0), ("v2.3", V2_3), ("2.3.7", V2_3), ("v2.3.1", V2_3)])
def test_lines_are_found_by_name_and_patch(text: str, line: object) -> None:
    assert find_line(text) is line


@pytest.mark.parametrize("text", ["", "v", "2", "v2", "2.30", "v2.33", "vv2.3", "stable"])
def test_other_names_are_no_lines(text: str) -> None:
    assert find_line(text) is None


def test_lines_are_in_order_and_distinct() -> None:
    numbers = [tuple(map(int, line.number.split("."))) for line in LINES]
    assert numbers == sorted(set(numbers))
    assert [line.label for line in LINES] == ["v1.0", "v2.3", "v3.5", "v4.8", "v5.2"]


def test_the_second_line_differs_from_the_first_in_precision_alone() -> None:
    for (name, first), (other, second) in zip(V1_0.shapes, V2_3.shapes, strict=True):
        assert (name, first) == (other, second)
        one, two = V1_0.spec(first), V2_3.spec(second)
        assert one.layers == two.layers and one.rope == two.rope and one.parameters == two.parameters
        assert one.precision != two.precision
    assert V1_0.precision.compute == "float32" and V2_3.precision.loss_scaling


@pytest.mark.parametrize("line", LINES, ids=lambda line: line.label)
def test_every_shape_is_a_consistent_network(line: object) -> None:
    for _, shape in line.shapes:  # type: ignore[attr-defined]
        spec = line.spec(shape, end_ids=(3,), bos_id=1)  # type: ignore[attr-defined]
        attention = spec.layers[0].attention
        assert attention.heads % attention.kv_heads == 0 and attention.heads * attention.head_dim == (
            shape.head_dim * shape.heads or spec.dim
        )
        assert (spec.line, spec.end_ids, spec.bos_id, len(spec.layers)) == (line.number, (3,), 1, shape.layers)  # type: ignore[attr-defined]
        assert attention.gate == line.gated_heads  # type: ignore[attr-defined]


def test_the_third_line_is_the_second_with_eyes() -> None:
    for (name, second), (other, third) in zip(V2_3.shapes, V3_5.shapes, strict=True):
        assert (name, second) == (other, replace(third, vision=None))
        blind, seeing = V2_3.spec(second), V3_5.spec(third, image_id=4)
        assert replace(seeing, line="2.3", vision=None, fusion=None, image_id=None) == blind
        assert seeing.fusion is not None and 0 < seeing.fusion.after_layers < len(seeing.layers)
        assert V2_3.spec(third, image_id=4) == blind  # a line that does not read images has no encoder


def test_the_light_line_saves_its_share_by_sharing() -> None:
    for _, shape in V4_8.shapes:
        light, unshared = V4_8.spec(shape), V4_8.spec(replace(shape, shared_layers=1))
        assert light.sharing is not None and unshared.sharing is None and light.layers == unshared.layers
        assert light.parameters <= (1 - 0.58) * unshared.parameters
        assert light.matmul_parameters == unshared.matmul_parameters  # shared weights still are multiplied with in every layer
    assert V2_3.spec(dict(V4_8.shapes)["nano"]).sharing is None  # a line that does not share has weights for every layer


def test_a_head_dimension_of_its_own() -> None:
    spec = V1_0.spec(Shape(vocab_size=8, dim=64, layers=1, heads=4, kv_heads=2, mlp_hidden=8, context_tokens=16, head_dim=24))
    assert spec.layers[0].attention.head_dim == spec.rope.rotary_dim == 24


def test_the_bundled_shape_fits_its_bound() -> None:
    nano = dict(V2_3.shapes)["nano"]
    assert V2_3.spec(nano).parameters * 2 <= 16 << 20


def test_the_flagship_reads_far_blocks_in_all_but_its_dense_layers() -> None:
    shapes = dict(V5_2.shapes)
    nano, reference = V5_2.spec(shapes["nano"], image_id=4), V5_2.spec(shapes["reference"], image_id=4)
    assert [layer.attention.window for layer in nano.layers] == [None, 2048, 2048, 2048]
    assert [layer.attention.far is None for layer in nano.layers] == [True, False, False, False]
    assert (reference.dim, len(reference.layers), reference.layers[0].attention.heads, reference.context_tokens) == (1024, 24, 16, 16384)
    assert reference.fusion is not None and reference.fusion.after_layers == 12 and nano.fusion is not None
    plain = V3_5.spec(shapes["reference"], image_id=4)
    assert all(layer.attention.window is None for layer in plain.layers) and plain.parameters == reference.parameters
    shorter = V5_2.spec(replace(shapes["reference"], window=512, far=FarSpec(blocks=8)))
    assert {(layer.attention.window, layer.attention.far) for layer in shorter.layers} == {(512, FarSpec(blocks=8))}
