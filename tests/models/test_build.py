from __future__ import annotations

import torch

from service.models.build import build, init_weights
from service.types.catalog import V2_3, V3_5, Shape

SHAPE = Shape(vocab_size=500, dim=64, layers=8, heads=4, kv_heads=2, mlp_hidden=96, context_tokens=64)


def test_the_seed_decides_the_weights() -> None:
    first, same, other = (build(V2_3.spec(SHAPE), "cpu", torch.float32) for _ in range(3))
    for decoder, seed in ((first, 1), (same, 1), (other, 2)):
        init_weights(decoder, seed)
    pairs = zip(first.state_dict().items(), same.state_dict().values(), other.state_dict().values(), strict=True)
    for (name, left), equal, different in pairs:
        assert torch.equal(left, equal), name
        assert name.endswith(("norm.weight", ".bias")) or not torch.equal(left, different), name


def test_every_weight_is_filled_with_its_scale() -> None:
    decoder = build(V2_3.spec(SHAPE), "cpu", torch.float32)
    for parameter in decoder.parameters():
        parameter.data.fill_(float("nan"))
    init_weights(decoder, 0)
    state = decoder.state_dict()
    assert all(value.isfinite().all() for value in state.values())
    assert abs(state["layers.3.mlp.gate_up.weight"].std().item() * 64**0.5 - 1) < 0.05
    assert abs(state["layers.3.mlp.down.weight"].std().item() * 96**0.5 * 4 - 1) < 0.05
    assert abs(state["embed.weight"].std().item() / 0.02 - 1) < 0.05
    assert torch.equal(state["layers.0.mlp_norm.weight"], torch.ones(64))


def test_sixteen_bit_weights_are_the_same_draw_rounded() -> None:
    wide, narrow = (build(V2_3.spec(SHAPE), "cpu", dtype) for dtype in (torch.float32, torch.bfloat16))
    init_weights(wide, 5)
    init_weights(narrow, 5)
    pairs = zip(wide.state_dict().values(), narrow.state_dict().values(), strict=True)
    assert all(torch.equal(left.to(torch.bfloat16), right) for left, right in pairs)


def test_on_meta_nothing_is_allocated() -> None:
    shape = Shape(vocab_size=1 << 20, dim=1 << 13, layers=64, heads=64, kv_heads=8, mlp_hidden=1 << 15, context_tokens=1 << 17)
    decoder = build(V2_3.spec(shape), "meta", torch.float32)
    assert all(parameter.is_meta for parameter in decoder.parameters())


def test_image_tokens_begin_as_large_as_text() -> None:
    decoder = build(V3_5.spec(dict(V3_5.shapes)["nano"], image_id=4), "cpu", torch.float32)
    init_weights(decoder, 0)
    pixels = torch.randint(0, 256, (2, 16, 16, 3), dtype=torch.uint8)
    with torch.no_grad():
        size = decoder.vision(pixels, decoder.vision.spec.grid(16, 16)).std() / decoder.embed.weight.std()
    assert 0.2 < size < 2
