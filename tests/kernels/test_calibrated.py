"""int4 weights rounded for their inputs: the method by its definition, less error on such inputs, and what cannot be calibrated."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from service.kernels import calibrated
from service.kernels.calibrated import DAMPING, InputMoments, calibrated_int4
from service.kernels.quantised import GROUP, dequantise, quantise_weight, stored_layout, unpack_int4

SHAPES = [(40, 64), (33, 70), (8, 32), (6, 31), (50, 300)]


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def correlated(tokens: int, inputs: int) -> torch.Tensor:
    """Inputs of which some are large and all depend on a few."""
    return (drawn(tokens, 12, seed=1) @ drawn(12, inputs, seed=2) + 0.3 * drawn(tokens, inputs, seed=3)) * drawn(inputs, seed=4).exp()


def seen(x: torch.Tensor) -> InputMoments:
    moments = InputMoments(x.shape[1])
    moments.add(x)
    return moments


def error(x: torch.Tensor, weight: torch.Tensor, quantised: torch.Tensor) -> float:
    return float((x @ (weight - quantised).t()).square().mean())


@pytest.mark.parametrize("shape", SHAPES)
def test_the_error_on_such_inputs_is_smaller(shape: tuple[int, int]) -> None:
    weight, x = drawn(*shape), correlated(500, shape[1])
    found = calibrated_int4(weight, seen(x))
    assert (found.kind, found.inputs) == ("int4", shape[1])
    assert [(t.dtype, tuple(t.shape)) for t in (found.values, found.scales)] == list(stored_layout("int4", *shape))
    nearest = dequantise(quantise_weight(weight, "int4"), slice(None))
    assert error(x, weight, dequantise(found, slice(None))) < 0.6 * error(x, weight, nearest)


def test_it_is_the_method_as_defined() -> None:
    """Input by input with the inverse itself, of which the row and column of what is settled are eliminated, in float64."""
    weight, x = drawn(20, 96), correlated(400, 96)
    found = calibrated_int4(weight, seen(x))
    moments = (x.t() @ x).double().numpy()
    inverse = np.linalg.inv(moments + np.eye(96) * DAMPING * moments.diagonal().mean())
    left, scales = weight.double().numpy().copy(), found.scales.double().numpy()
    steps = np.empty_like(left)
    for at in range(96):
        scale = scales[:, at // GROUP]
        steps[:, at] = np.clip(np.round(left[:, at] / scale), -8, 7)
        left -= np.outer((left[:, at] - steps[:, at] * scale) / inverse[at, at], inverse[at])
        inverse -= np.outer(inverse[:, at], inverse[at]) / inverse[at, at]
    assert (unpack_int4(found.values).numpy() == steps).mean() > 0.999


def test_blocks_and_pieces_change_nothing_but_who_shares_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, x = drawn(50, 300), correlated(500, 300)
    whole = calibrated_int4(weight, seen(x))
    monkeypatch.setattr(calibrated, "OUTPUTS", 7)
    pieces = calibrated_int4(weight, seen(x))
    # Sums in another order round some input the other way, and those after it make that good.
    assert (pieces.values == whole.values).float().mean() > 0.9
    nearest = error(x, weight, dequantise(quantise_weight(weight, "int4"), slice(None)))
    assert error(x, weight, dequantise(pieces, slice(None))) < 0.6 * nearest
    monkeypatch.setattr(calibrated, "BLOCK", 128)
    blocks = calibrated_int4(weight, seen(x))
    assert [len(block) for block in seen(x).blocks] == [128, 128, 64]
    alone = calibrated_int4(weight[:, 128:256], seen(x[:, 128:256]))
    assert torch.equal(blocks.values[:, 64:128], alone.values) and torch.equal(blocks.scales[:, 4:8], alone.scales)


def test_inputs_are_counted_in_any_portions_and_types() -> None:
    x = correlated(40, 50)
    moments = InputMoments(50)
    moments.add(x[:7])
    moments.add(x[7:].to(torch.float16))
    torch.testing.assert_close(moments.blocks[0][:50, :50], x.t() @ x, rtol=2e-3, atol=2e-1)
    assert len(moments.blocks[0]) == 64 and not moments.blocks[0][50:].any()


@pytest.mark.parametrize("spoiled", [float("nan"), float("inf")])
def test_what_overflows_is_rounded_to_the_nearest(spoiled: float) -> None:
    weight, x = drawn(20, 64), correlated(50, 64)
    x[3, 5] = spoiled
    found, expected = calibrated_int4(weight, seen(x)), quantise_weight(weight, "int4")
    assert torch.equal(found.values, expected.values) and torch.equal(found.scales, expected.scales)


def test_inputs_never_seen_and_weights_of_zeros_are_no_harm() -> None:
    weight = drawn(20, 64)
    nothing = dequantise(calibrated_int4(weight, InputMoments(64)), slice(None))
    nearest = dequantise(quantise_weight(weight, "int4"), slice(None))
    assert (nothing - weight).square().mean() < 1.1 * (nearest - weight).square().mean()
    assert not dequantise(calibrated_int4(torch.zeros(3, 40), seen(correlated(20, 40))), slice(None)).any()
