"""What a network costs, counted here by hand: parameters, cache bytes by group, FLOPs and bytes read."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from service.types.kv_layout import KvGroup, KvLayout
from service.types.model_spec import DenseMlp, GroupedQueryAttention, LayerSpec, ModelSpec, RopeSpec, SharingSpec

ATTENTION = GroupedQueryAttention(heads=4, kv_heads=2, head_dim=8)
MLP = DenseMlp(48)


def spec_of(*attentions: GroupedQueryAttention, tied: bool = False, mlp: DenseMlp = MLP) -> ModelSpec:
    layers = tuple(LayerSpec(attention, mlp) for attention in attentions)
    return ModelSpec("llama", 100, 32, layers, RopeSpec(theta=1e4, rotary_dim=8, original_context=256), 256, tied_embeddings=tied)


MATRICES = 32 * (32 + 2 * 16) + 32 * 32 + 3 * 32 * 48


def test_parameters_counted_by_hand() -> None:
    assert spec_of(ATTENTION).parameters == 2 * 100 * 32 + 32 + MATRICES + 2 * 32
    assert spec_of(ATTENTION, tied=True).parameters == spec_of(ATTENTION).parameters - 100 * 32
    everything = replace(ATTENTION, qkv_bias=True, out_bias=True, qk_norm=True, gate=True)
    vectors = (32 + 32) + 32 + 2 * 8 + (32 * 4 + 4)
    assert spec_of(everything).parameters == spec_of(ATTENTION).parameters + vectors
    assert spec_of(ATTENTION, mlp=DenseMlp(48, bias=True)).parameters == spec_of(ATTENTION).parameters + 2 * 48 + 32


def test_shared_weights_are_stored_and_read_once_and_computed_with_each_time() -> None:
    shared = replace(spec_of(*[ATTENTION] * 5), sharing=SharingSpec.runs(5, 2))
    assert shared.sharing.owners == (0, 0, 2, 2, 4) and [shared.owner(index) for index in range(5)] == [0, 0, 2, 2, 4]
    assert shared.parameters == 2 * 100 * 32 + 32 + 3 * MATRICES + 5 * 2 * 32
    assert shared.matmul_parameters == 100 * 32 + 5 * MATRICES and shared.matmul_parameters_read == 100 * 32 + 3 * MATRICES
    assert shared.bytes_read(1, 0, weight_bytes=4, kv_bytes=2) == 4 * (100 * 32 + 3 * MATRICES)
    assert shared.kv_layout().groups[0].layers == (0, 1, 2, 3, 4)  # every layer keeps a cache of its own


def test_matmul_parameters_leave_out_the_embedding() -> None:
    assert spec_of(ATTENTION, ATTENTION).matmul_parameters == 100 * 32 + 2 * MATRICES
    assert spec_of(ATTENTION).matmul_parameters == spec_of(ATTENTION, tied=True).matmul_parameters


def test_layers_of_one_cache_shape_and_window_share_a_group() -> None:
    window = replace(ATTENTION, window=64)
    wide = replace(ATTENTION, kv_heads=4)
    layout = spec_of(ATTENTION, window, ATTENTION, wide, window).kv_layout()
    assert [(group.name, group.layers, group.window) for group in layout.groups] == [
        ("full", (0, 2), None), ("window64", (1, 4), 64), ("full_2", (3,), None)
    ]  # fmt: skip


@given(
    st.lists(
        st.sampled_from([ATTENTION, replace(ATTENTION, window=16), replace(ATTENTION, kv_heads=1), replace(ATTENTION, window=8)]),
        min_size=1,
    )
)
def test_every_layer_is_in_exactly_one_group(attentions: list[GroupedQueryAttention]) -> None:
    layout = spec_of(*attentions).kv_layout()
    assert sorted(layer for group in layout.groups for layer in group.layers) == list(range(len(attentions)))
    assert len({group.name for group in layout.groups}) == len(layout.groups)


def test_a_window_costs_its_window() -> None:
    full, window = KvGroup("full", (0, 1), 2, 8, 8), KvGroup("w", (2,), 2, 8, 8, 64)
    layout = KvLayout((full, window), block_tokens=32)
    assert (layout.blocks_for(full, 1000), layout.blocks_for(window, 1000), layout.blocks_for(window, 40)) == (32, 3, 2)
    assert layout.block_bytes(full, 4) == 32 * 2 * 2 * 16 * 4 and layout.block_bytes(window, 2) == 32 * 2 * 16 * 2
    assert layout.sequence_bytes(1000, 4) == 32 * layout.block_bytes(full, 4) + 3 * layout.block_bytes(window, 4)


def test_flops_by_hand() -> None:
    spec = spec_of(ATTENTION)
    head = 100 * 32
    assert spec.flops(10, 0, sampled=1) == 2 * 10 * MATRICES + 2 * head
    assert spec.flops(10, 0) == 2 * 10 * (MATRICES + head)
    assert spec.flops(10, 50) - spec.flops(10, 0) == 4 * 10 * 4 * 8 * 50
    windowed = spec_of(replace(ATTENTION, window=20))
    assert windowed.flops(1, 50) - windowed.flops(1, 0) == 4 * 4 * 8 * 20


def test_bytes_read_by_hand() -> None:
    spec = spec_of(ATTENTION, replace(ATTENTION, window=20))
    visible = (50 + 20) * 2 * 2 * 8
    assert spec.bytes_read(3, 50, weight_bytes=4, kv_bytes=2) == 4 * spec.matmul_parameters + 3 * visible * 2
