"""What a user may ask of a model's attention: what comes of it, and every refusal with its reason."""

from __future__ import annotations

from dataclasses import replace

import pytest

from service.checkpoints.long_context import adapt, dense_by_choice
from service.types.catalog import V5_2
from service.types.errors import SettingsError
from service.types.kv_layout import FarSpec, FarStore
from service.types.model_spec import ModelSpec, RopeScaling, RopeSpec
from service.types.settings import AttentionSettings
from tests.types.test_model_spec import ATTENTION, spec_of

DENSE = spec_of(ATTENTION, ATTENTION, ATTENTION)
MIXED = spec_of(ATTENTION, replace(ATTENTION, window=100))
FLAGSHIP = V5_2.spec(dict(V5_2.shapes)["nano"])


def windows(spec: ModelSpec) -> list[tuple[int | None, FarSpec | None]]:
    return [(layer.attention.window, layer.attention.far) for layer in spec.layers]


def test_nothing_asked_changes_nothing() -> None:
    for spec in (DENSE, MIXED, FLAGSHIP):
        assert adapt(spec, AttentionSettings()) == spec


def test_a_window_for_layers_that_read_everything() -> None:
    assert windows(adapt(DENSE, AttentionSettings(attention_window=128))) == [(128, FarSpec())] * 3
    assert windows(adapt(MIXED, AttentionSettings(attention_window=128))) == [(128, FarSpec()), (100, None)]


def test_every_choice_is_obeyed() -> None:
    asked = AttentionSettings(attention_window=64, far_blocks=5, far_refresh=16, kv_far="int4", prefill="dense", dense_layers=(2, 0))
    far = FarSpec(blocks=5, store=FarStore.INT4, refresh=16, dense_prompts=True)
    assert windows(adapt(DENSE, asked)) == [(None, None), (64, far), (None, None)]
    stores = {name: windows(adapt(DENSE, AttentionSettings(64, kv_far=name)))[0][1] for name in ("int8", "bf16", "evict")}
    assert [far.store.value for far in stores.values() if far] == ["int8", "native", "evict"]


def test_the_flagship_keeps_what_is_not_asked() -> None:
    far = FLAGSHIP.layers[1].attention.far
    assert far is not None
    assert windows(adapt(FLAGSHIP, AttentionSettings(far_blocks=4)))[1] == (2048, replace(far, blocks=4))
    assert windows(adapt(FLAGSHIP, AttentionSettings(attention_window=256))) == [(None, None)] + [(256, far)] * 3
    assert adapt(FLAGSHIP, AttentionSettings(attention_window=2048)) == FLAGSHIP


def test_named_dense_layers_take_the_place_of_the_flagship_s_own() -> None:
    far = (2048, FLAGSHIP.layers[1].attention.far)
    assert windows(adapt(FLAGSHIP, AttentionSettings(dense_layers=(2,)))) == [far, far, (None, None), far]
    assert windows(adapt(FLAGSHIP, AttentionSettings(dense_layers=()))) == [far] * 4
    narrow = adapt(FLAGSHIP, AttentionSettings(attention_window=256, kv_far="int4", dense_layers=(0, 1)))
    assert windows(narrow) == [(None, None)] * 2 + [(256, FarSpec(store=FarStore.INT4))] * 2
    assert dense_by_choice(FLAGSHIP) == (0,) and dense_by_choice(DENSE) == dense_by_choice(MIXED) == ()


@pytest.mark.parametrize(
    ("spec", "asked", "words"),
    [
        (DENSE, {"far_blocks": 3}, "need --attention_window"),
        (DENSE, {"kv_far": "int8"}, "need --attention_window"),
        (DENSE, {"prefill": "dense"}, "need --attention_window"),
        (DENSE, {"attention_window": 63}, "at least 64 tokens"),
        (DENSE, {"attention_window": 64, "far_refresh": 3}, "must divide the block size"),
        (DENSE, {"attention_window": 64, "kv_far": "evict", "far_blocks": 3}, "evict keeps no far blocks"),
        (DENSE, {"attention_window": 64, "kv_far": "evict", "prefill": "dense"}, "evict keeps no far blocks"),
        (DENSE, {"attention_window": 64, "dense_layers": (3,)}, "names layer 3, and the model has the layers 0 … 2"),
        (DENSE, {"attention_window": 64, "dense_layers": (0, 1, 2)}, "leaves no layer .*or serve without --attention_window"),
        (FLAGSHIP, {"dense_layers": (0, 1, 2, 3)}, "leaves no layer .*or set --attention_window 16384 instead"),
        (DENSE, {"dense_layers": ()}, "need --attention_window"),
        (MIXED, {"attention_window": 64, "dense_layers": (1,)}, "layer 1, which was trained with a window"),
        (replace(MIXED, layers=MIXED.layers[1:]), {"attention_window": 64}, "every layer of this model has a window"),
        (DENSE, {"max_position_embeddings": 257}, "say with --rope_scaling"),
        (DENSE, {"rope_scaling": "yarn"}, "set --max_position_embeddings"),
        (
            replace(DENSE, rope=replace(DENSE.rope, scaling=RopeScaling.LINEAR)),
            {"max_position_embeddings": 512, "rope_scaling": "yarn"},
            "scaled already",
        ),
    ],
)
def test_refusals(spec: ModelSpec, asked: dict[str, object], words: str) -> None:
    with pytest.raises(SettingsError, match=words):
        adapt(spec, AttentionSettings(**asked))  # type: ignore[arg-type]


def test_longer_and_shorter_contexts() -> None:
    assert adapt(DENSE, AttentionSettings(max_position_embeddings=100)).context_tokens == 100
    kept = adapt(DENSE, AttentionSettings(max_position_embeddings=1024, rope_scaling="keep"))
    assert (kept.context_tokens, kept.rope) == (1024, DENSE.rope)
    scaled = adapt(DENSE, AttentionSettings(max_position_embeddings=1024, rope_scaling="yarn"))
    assert scaled.rope == RopeSpec(1e4, 8, RopeScaling.YARN, 4.0, 256) and scaled.context_tokens == 1024
