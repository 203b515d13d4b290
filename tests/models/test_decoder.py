from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from service.checkpoints.pieces import parameter_shapes
from service.models.attention import DenseAttend
from service.models.build import build, init_weights
from service.models.decoder import Decoder
from service.types.catalog import LINES, V1_0, V2_3, V4_8, Shape, VersionLine
from service.types.model_spec import DenseMlp, GroupedQueryAttention, LayerSpec, ModelSpec, RopeSpec

SHAPE = Shape(vocab_size=61, dim=24, layers=3, heads=6, kv_heads=2, mlp_hidden=40, context_tokens=64, head_dim=8)
LENGTH = 12
SHARED = V4_8.spec(replace(SHAPE, layers=5, shared_layers=2))


def decoder_of(spec: ModelSpec, seed: int = 0) -> Decoder:
    decoder = build(spec, "cpu", torch.float32)
    init_weights(decoder, seed)
    return decoder


def logits_of(decoder: Decoder, tokens: torch.Tensor) -> torch.Tensor:
    return decoder(tokens, torch.arange(len(tokens)), DenseAttend(1, len(tokens), decoder.spec.layers))


def mixed_spec() -> ModelSpec:
    """Three layers of which no two are alike, half of each head rotated."""
    kinds = (
        LayerSpec(GroupedQueryAttention(6, 2, 8, window=3, qkv_bias=True, qk_norm=True), DenseMlp(40)),
        LayerSpec(GroupedQueryAttention(4, 4, 10, out_bias=True, gate=True), DenseMlp(20, bias=True)),
        LayerSpec(GroupedQueryAttention(5, 1, 12, scale=0.2, softcap=4.0), DenseMlp(7)),
    )
    return ModelSpec("mixed", 61, 24, kinds, RopeSpec(10_000.0, 4, original_context=64), 64)


@pytest.mark.parametrize("line", LINES, ids=lambda line: line.label)
@pytest.mark.parametrize("shape", [0, 1])
def test_counted_parameters_are_the_specs(line: VersionLine, shape: int) -> None:
    spec = line.spec(line.shapes[shape][1])
    decoder = build(spec, "meta", torch.float32)
    assert sum(parameter.numel() for parameter in decoder.parameters()) == spec.parameters
    assert decoder.weight_bytes == 4 * spec.parameters


@pytest.mark.parametrize("spec", [mixed_spec(), V2_3.spec(SHAPE), SHARED, replace(mixed_spec(), tied_embeddings=True)])
def test_parameter_names_and_shapes_are_the_formats(spec: ModelSpec) -> None:
    decoder = build(spec, "meta", torch.float32)
    assert {name: tuple(value.shape) for name, value in decoder.state_dict().items()} == parameter_shapes(spec)
    assert sum(parameter.numel() for parameter in decoder.parameters()) == spec.parameters


@torch.no_grad()
@pytest.mark.parametrize("spec", [mixed_spec(), V2_3.spec(SHAPE)])
def test_a_token_sees_only_itself_and_what_is_before(spec: ModelSpec) -> None:
    decoder, tokens = decoder_of(spec), torch.arange(LENGTH)
    changed = tokens.clone()
    changed[5] = 60
    before, after = logits_of(decoder, tokens), logits_of(decoder, changed)
    assert torch.equal(before[:5], after[:5])
    assert all(not torch.equal(before[row], after[row]) for row in range(5, LENGTH))


@torch.no_grad()
def test_rows_select_what_is_computed() -> None:
    decoder, tokens = decoder_of(mixed_spec()), torch.arange(LENGTH)
    attend = DenseAttend(1, LENGTH, decoder.spec.layers)
    rows = torch.tensor([7, 0])
    some = decoder(tokens, torch.arange(LENGTH), attend, rows)
    assert some.shape == (2, 61)
    torch.testing.assert_close(some, logits_of(decoder, tokens)[rows])


@torch.no_grad()
def test_sequences_of_a_flat_batch_do_not_see_each_other() -> None:
    decoder = decoder_of(mixed_spec())
    first, second = torch.arange(LENGTH), torch.arange(20, 20 + LENGTH)
    both = decoder(torch.cat((first, second)), torch.arange(LENGTH).repeat(2), DenseAttend(2, LENGTH, decoder.spec.layers))
    torch.testing.assert_close(both, torch.cat((logits_of(decoder, first), logits_of(decoder, second))), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_the_gate_of_dynamic_attention_changes_the_output() -> None:
    decoder, tokens = decoder_of(V1_0.spec(SHAPE)), torch.arange(LENGTH)
    gated = logits_of(decoder, tokens)
    for layer in decoder.layers:
        layer.attention.gate = None
    assert (logits_of(decoder, tokens) - gated).abs().max() > 1e-3


@torch.no_grad()
def test_shared_layers_compute_what_unshared_ones_with_equal_weights_do() -> None:
    shared, tokens = decoder_of(SHARED), torch.arange(LENGTH)
    unshared = build(replace(SHARED, sharing=None), "cpu", torch.float32)
    state = shared.state_dict()
    owners = SHARED.sharing.owners if SHARED.sharing else ()
    for name in unshared.state_dict():
        if name not in state:
            _, index, rest = name.split(".", 2)
            state[name] = state[f"layers.{owners[int(index)]}.{rest}"]
    unshared.load_state_dict(state)
    assert torch.equal(logits_of(shared, tokens), logits_of(unshared, tokens))


def test_checkpointing_gives_the_same_loss_and_gradients_from_less_memory() -> None:
    tokens = torch.arange(LENGTH)
    plain, recomputing = decoder_of(SHARED), decoder_of(SHARED)
    recomputing.gradient_checkpointing_enable()
    kept: list[list[int]] = [[], []]
    for decoder, sizes in zip((plain, recomputing), kept, strict=True):
        with torch.autograd.graph.saved_tensors_hooks(
            lambda tensor, sizes=sizes: sizes.append(tensor.nbytes) or tensor, lambda tensor: tensor
        ):
            loss = torch.nn.functional.cross_entropy(logits_of(decoder, tokens)[:-1], tokens[1:])
        loss.backward()
    for one, two in zip(plain.parameters(), recomputing.parameters(), strict=True):
        torch.testing.assert_close(one.grad, two.grad)
    assert sum(kept[1]) < 0.7 * sum(kept[0])


def test_a_training_step_moves_every_parameter() -> None:
    decoder, tokens = decoder_of(mixed_spec()), torch.arange(LENGTH)
    torch.nn.functional.cross_entropy(logits_of(decoder, tokens)[:-1], tokens[1:]).backward()
    still = [name for name, parameter in decoder.named_parameters() if parameter.grad is None or not parameter.grad.abs().sum() > 0]
    assert still == []


def test_training_under_autocast_keeps_float32_weights_and_finite_gradients() -> None:
    decoder, tokens = decoder_of(V2_3.spec(SHAPE)), torch.arange(LENGTH)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = torch.nn.functional.cross_entropy(logits_of(decoder, tokens)[:-1].float(), tokens[1:])
    loss.backward()
    exact = torch.nn.functional.cross_entropy(logits_of(decoder, tokens)[:-1], tokens[1:])
    assert all(parameter.dtype == torch.float32 and parameter.grad.isfinite().all() for parameter in decoder.parameters())
    assert 0 < abs(loss.item() - exact.item()) < 0.05
