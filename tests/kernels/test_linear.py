"""Linear layers: every path against float64, at every row count, from plain and packed weights."""

from __future__ import annotations

import pytest
import torch

from service.kernels import linear, reference

SHAPES = ((1, 1), (3, 5), (40, 33), (130, 64), (257, 96))
ROWS = (0, 1, 2, 5, 16, 33, 300)

needs_onednn = pytest.mark.skipif(not linear.onednn_available(), reason="this torch has no oneDNN linear")


def check(actual: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
    expected = reference.linear(x.double(), weight.double(), None if bias is None else bias.double())
    size = reference.linear(x.double().abs(), weight.double().abs(), None if bias is None else bias.double().abs())
    unit = torch.finfo(x.dtype).eps
    assert actual.dtype == x.dtype and actual.shape == expected.shape
    assert ((actual.double() - expected).abs() <= 1e-6 * size + (unit * expected.abs() if unit > 1e-5 else 0.0)).all()


@needs_onednn
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_onednn_plain_and_packed(shape: tuple[int, int], bias: bool) -> None:
    torch.manual_seed(0)
    weight, offset = torch.randn(shape), torch.randn(shape[0]) if bias else None
    packed = linear.PackedLinear(weight)
    for rows in ROWS:
        x = torch.randn(rows, shape[1])
        check(packed.apply(x, offset), x, weight, offset)
        check(linear.onednn_linear(x, weight, offset), x, weight, offset)


@needs_onednn
def test_strided_rows_and_weights() -> None:
    weight, wide = torch.randn(24, 40), torch.randn(9, 80)
    x = wide[:, ::2]
    check(linear.PackedLinear(weight).apply(x), x, weight, None)
    check(linear.onednn_linear(x, weight), x, weight, None)
    turned = torch.randn(40, 24).t()
    check(linear.PackedLinear(turned).apply(x), x, turned, None)


@needs_onednn
def test_packed_weight_is_a_copy_of_the_plain_size() -> None:
    weight = torch.randn(128, 96)
    expected = weight.clone()
    packed = linear.PackedLinear(weight)
    weight.zero_()
    x = torch.randn(4, 96)
    check(packed.apply(x), x, expected, None)
    assert packed.bytes == expected.nbytes


@needs_onednn
def test_works_inside_and_outside_inference_mode_on_parameters() -> None:
    weight = torch.nn.Parameter(torch.randn(12, 8))
    x = torch.randn(3, 8)
    packed = linear.PackedLinear(weight)
    with torch.inference_mode():
        check(packed.apply(x), x, weight, None)
    assert not packed.apply(x).requires_grad and not linear.onednn_linear(x, weight).requires_grad


def test_only_float32_on_a_cpu_is_packed() -> None:
    with pytest.raises(ValueError, match="float32"):
        linear.PackedLinear(torch.zeros(4, 4, dtype=torch.bfloat16))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
def test_plain_linear_in_every_type(shape: tuple[int, int], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    weight = torch.randn(shape).to(dtype)
    plain = linear.PlainLinear(weight)
    assert plain.bytes == weight.nbytes
    for rows in ROWS:
        x = torch.randn(rows, shape[1]).to(dtype)
        check(plain.apply(x), x, weight, None)
        check(linear.torch_linear(x, weight), x, weight, None)


@needs_onednn
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_widened_linear_in_pieces(dtype: torch.dtype, bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "WIDENED_OUTPUTS", 100)
    torch.manual_seed(0)
    weight, offset = torch.randn(257, 96).to(dtype), torch.randn(257).to(dtype) if bias else None
    widened = linear.WidenedLinear(weight)
    assert widened.bytes == weight.nbytes
    for rows in ROWS:
        x = torch.randn(rows, 96).to(dtype)
        check(widened.apply(x, offset), x, weight, offset)


def test_a_wrong_weight_is_noticed() -> None:
    weight, x = torch.randn(40, 33), torch.randn(5, 33)
    with pytest.raises(AssertionError):
        check(linear.torch_linear(x, weight * 1.02), x, weight, None)


def test_absent_private_ops_are_reported_and_not_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(*arguments: object) -> torch.Tensor:
        raise AttributeError("no such op")

    monkeypatch.setattr(linear, "_product", absent)
    assert not linear.onednn_available()


def test_wrong_results_count_as_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "_product", lambda x, weight, bias: torch.zeros(2, 3))
    assert not linear.onednn_available()
