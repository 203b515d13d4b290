from __future__ import annotations

import pytest
import torch

from service.kernels import dispatch, reference
from service.kernels.linear import PackedLinear, PlainLinear, onednn_available
from service.kernels.native import linear as native_linear
from service.models.layers import DIFFERENTIABLE, Kernels, Linear, RmsNorm, SwigluMlp
from service.types.model_spec import DenseMlp


def filled(module: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator))
    return module


@pytest.mark.parametrize(("inputs", "outputs"), [(24, 40), (512, 1024)], ids=["small", "large"])
def test_packing_keeps_the_function_and_drops_the_weight(inputs: int, outputs: int) -> None:
    linear = filled(Linear(inputs, outputs, True, "cpu", torch.float32))
    x = torch.randn(5, inputs, generator=torch.Generator().manual_seed(1))
    before = linear(x)
    linear.pack()
    linear.pack()
    torch.testing.assert_close(linear(x), before, rtol=1e-4, atol=1e-4)
    assert linear.weight is None
    assert [name for name, _ in linear.named_parameters()] == ["bias"]
    assert linear.packed is not None
    assert linear.packed.bytes == inputs * outputs * 4


def test_only_large_matrices_are_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where one order of sums is not the faster one."""
    monkeypatch.setattr(native_linear, "slower", lambda dtype: "as on another machine")
    dispatch.require_steady(False)
    small, large = Linear(24, 40, False, "cpu", torch.float32), Linear(512, 1024, False, "cpu", torch.float32)
    for linear in (small, large):
        filled(linear).pack()
    assert type(small.packed) is PlainLinear
    assert type(large.packed) is (PackedLinear if onednn_available() else PlainLinear)
    dispatch.require_steady(False)


def test_sixteen_bit_linears_pack_too() -> None:
    linear = filled(Linear(16, 8, False, "cpu", torch.bfloat16))
    x = torch.ones(2, 16, dtype=torch.bfloat16)
    before = linear(x)
    linear.pack()
    assert torch.equal(linear(x), before)
    assert linear(x).dtype == torch.bfloat16


def test_layers_equal_the_reference_in_float64() -> None:
    generator = torch.Generator().manual_seed(3)
    x, residual = torch.randn(4, 16, generator=generator), torch.randn(4, 16, generator=generator)
    norm = filled(RmsNorm(16, 1e-5, "cpu", torch.float32))
    normed, total = norm.add(x, residual)
    wide, wide_total = reference.add_rms_norm(x.double(), residual.double(), norm.weight.double(), 1e-5)
    torch.testing.assert_close(normed.double(), wide, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(total.double(), wide_total)
    mlp = filled(SwigluMlp(DenseMlp(12, bias=True), 16, "cpu", torch.float32))
    gate, up = (mlp.gate_up.weight @ x.T).T.add(mlp.gate_up.bias).chunk(2, -1)
    expected = (gate * gate.sigmoid() * up) @ mlp.down.weight.T + mlp.down.bias
    torch.testing.assert_close(mlp(x), expected, rtol=1e-4, atol=1e-4)


def test_default_kernels_are_differentiable_and_serving_ones_agree() -> None:
    mlp = filled(SwigluMlp(DenseMlp(12), 16, "cpu", torch.float32))
    assert mlp.kernels is DIFFERENTIABLE
    x = torch.randn(3, 16, generator=torch.Generator().manual_seed(5)).requires_grad_()
    trained = mlp(x)
    trained.sum().backward()
    assert x.grad is not None
    assert all(parameter.grad is not None for parameter in mlp.parameters())
    for module in (mlp, mlp.gate_up, mlp.down):
        module.kernels = Kernels.resolve("cpu", torch.float32)
    torch.testing.assert_close(mlp(x.detach()), trained.detach())
