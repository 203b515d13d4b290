"""Quantised weights and their products: torch and compiled against the float64 reference, at every tile's edge."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from service.kernels import reference
from service.kernels.calibrated import InputMoments, calibrated_int4
from service.kernels.dispatch import force, resolve
from service.kernels.native import binding
from service.kernels.native.quantised import NativeQuantisedLinear, unsupported
from service.kernels.quantised import (
    GROUP,
    QuantisedWeight,
    ReferenceQuantisedLinear,
    TorchQuantisedLinear,
    dequantise,
    quantise_rows,
    quantise_weight,
    stored_layout,
    unpack_int4,
)
from tests.house.source import ROOT
from tests.kernels.conftest import needs_native

KINDS = ("int8", "int4")
FORMS = (
    pytest.param(NativeQuantisedLinear, marks=pytest.mark.skipif(unsupported() is not None, reason="no compiled integer products here")),
    TorchQuantisedLinear,
    ReferenceQuantisedLinear,
)
# (outputs, inputs): whole strips and groups, one short of and one past each, tiny, and long enough to overflow 24 bits of a sum.
SHAPES = ((64, 64), (1, 5), (15, 31), (17, 33), (50, 100), (203, 320), (48, 3456))
# Every tile of the compiled kernels and the seams between them.
ROWS = (1, 2, 3, 4, 5, 6, 7, 8, 9, 13, 15, 16, 17, 33, 50)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def expected(x: Tensor, weight: QuantisedWeight, bias: Tensor | None = None) -> Tensor:
    """The product in float64 of the rows as float32 quantises them."""
    steps, scales = quantise_rows(x)
    product = (steps * scales).double() @ dequantise(weight, slice(None)).double().t()
    return product if bias is None else product + bias


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("form", FORMS)
def test_products_of_every_shape(form: type[TorchQuantisedLinear], shape: tuple[int, int], kind: str) -> None:
    weight = quantise_weight(drawn(*shape) * shape[1] ** -0.5, kind)
    linear, bias = form(weight), drawn(shape[0], seed=1)
    for rows in ROWS:
        x = drawn(rows, shape[1], seed=rows) * 3
        for offset in (None, bias):
            wanted = expected(x, weight, offset)
            found = linear.apply(x, offset)
            assert found.shape == (rows, shape[0]) and found.dtype == torch.float32
            assert (found - wanted).abs().max() <= 2e-5 * wanted.abs().max(), (rows, offset is None)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", FORMS)
def test_a_row_is_the_same_alone_and_among_others(form: type[TorchQuantisedLinear], kind: str) -> None:
    linear, x = form(quantise_weight(drawn(80, 96), kind)), drawn(37, 96, seed=1)
    together = linear.apply(x)
    for row in (0, 7, 36):
        assert (linear.apply(x[row : row + 1])[0] - together[row]).abs().max() <= 1e-6 * together.abs().max()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", FORMS)
def test_a_row_that_is_not_finite_stays_so_and_disturbs_no_other(form: type[TorchQuantisedLinear], kind: str) -> None:
    linear, x = form(quantise_weight(drawn(20, 40), kind)), drawn(4, 40)
    sound = linear.apply(x)
    for bad in (float("nan"), float("inf"), float("-inf")):
        spoiled = x.clone()
        spoiled[2, 3] = bad
        found = linear.apply(spoiled)
        assert not found[2].isfinite().any()
        assert torch.equal(found[[0, 1, 3]], sound[[0, 1, 3]])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", FORMS)
def test_rows_of_zeros_and_of_any_magnitude(form: type[TorchQuantisedLinear], kind: str) -> None:
    weight = quantise_weight(drawn(33, 64), kind)
    x = torch.stack((torch.zeros(64), torch.full((64,), 1e-30), drawn(64) * 1e20, drawn(64)))
    found, wanted = form(weight).apply(x), expected(x, weight)
    assert torch.equal(found[0], torch.zeros(33))
    assert ((found - wanted).abs().amax(1) <= 2e-5 * wanted.abs().amax(1)).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", SHAPES)
def test_rows_of_the_weight_can_be_read(shape: tuple[int, int], form: type[TorchQuantisedLinear], kind: str) -> None:
    weight = quantise_weight(drawn(*shape), kind)
    ids = torch.tensor([0, shape[0] - 1, shape[0] // 2, 0])
    assert torch.equal(form(weight).rows(ids, torch.float32), dequantise(weight, slice(None))[ids])
    assert form(weight).rows(ids, torch.bfloat16).dtype == torch.bfloat16
    with pytest.raises(IndexError):
        form(weight).rows(torch.tensor([0, shape[0]]), torch.float32)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_activations_come_back_as_they_came(form: type[TorchQuantisedLinear], kind: str, dtype: torch.dtype) -> None:
    linear, x, bias = form(quantise_weight(drawn(40, 64), kind)), drawn(5, 64, seed=3).to(dtype), drawn(40).to(dtype)
    found = linear.apply(x, bias)
    assert found.dtype == dtype
    assert torch.allclose(found.float(), linear.apply(x.float(), bias.float()).to(dtype).float(), rtol=1e-2)


def test_int8_errs_by_half_a_step_and_keeps_zero_rows() -> None:
    weight = drawn(7, 50)
    weight[3] = 0.0
    quantised = quantise_weight(weight, "int8")
    assert ((dequantise(quantised, slice(None)) - weight).abs().amax(1) <= weight.abs().amax(1) / 127 * 0.5001).all()
    assert quantised.values.abs().max() == 127 and not quantised.values[3].any()


def test_int4_is_as_good_as_the_best_plain_scale() -> None:
    weight = drawn(64, 256)
    groups = weight.view(64, -1, GROUP)
    plain = groups.abs().amax(2, keepdim=True) / 7
    error = (((groups / plain).round() * plain - groups) ** 2).mean()
    found = ((dequantise(quantise_weight(weight, "int4"), slice(None)) - weight) ** 2).mean()
    assert found < 0.95 * error
    assert not dequantise(quantise_weight(torch.zeros(3, 40), "int4"), slice(None)).any()


@pytest.mark.parametrize("kind", KINDS)
def test_weights_are_stored_as_the_layout_says(kind: str) -> None:
    weight = quantise_weight(drawn(20, 70), kind)
    assert ((weight.values.dtype, tuple(weight.values.shape)), (weight.scales.dtype, tuple(weight.scales.shape))) == stored_layout(
        kind, 20, 70
    )


def test_a_wrong_step_or_scale_is_seen() -> None:
    """The comparisons above have teeth: one step of one weight, or a scale off by 2 %, shows."""
    x, weight = drawn(3, 64), quantise_weight(drawn(16, 64), "int4")
    wanted = expected(x, weight)
    tolerance = 2e-5 * wanted.abs().max()
    values, scales = weight.values.clone(), weight.scales.clone()
    values[2, 5] ^= 1
    scales[4, 1] *= 1.02
    for spoiled in (QuantisedWeight("int4", 64, values, weight.scales), QuantisedWeight("int4", 64, weight.values, scales)):
        assert (TorchQuantisedLinear(spoiled).apply(x) - wanted).abs().max() > tolerance


def test_the_reference_in_double_precision() -> None:
    x, weight = drawn(3, 64).double(), quantise_weight(drawn(8, 64), "int4")
    found = reference.quantised_linear(x, unpack_int4(weight.values), weight.scales)
    assert found.dtype == torch.float64
    assert (found - expected(x.float(), weight)).abs().max() < 1e-4


def test_what_cannot_be_quantised_is_refused() -> None:
    for inputs, kind in ((8, "int3"), (1 << 17, "int8")):
        with pytest.raises(ValueError, match="cannot be quantised"):
            quantise_weight(torch.empty(1, inputs, device="meta"), kind)
    with pytest.raises(ValueError, match="65568 inputs cannot be quantised to 'int4'"):
        calibrated_int4(torch.empty(1, 65_568, device="meta"), InputMoments(32))


@pytest.mark.skipif(unsupported() is not None, reason="no compiled integer products here")
def test_a_product_of_other_sizes_is_refused() -> None:
    with pytest.raises(ValueError, match="does not fit"):
        NativeQuantisedLinear(quantise_weight(drawn(8, 64), "int8")).apply(drawn(2, 63))


def test_the_best_form_is_chosen_and_any_can_be_forced() -> None:
    weight = quantise_weight(drawn(8, 64), "int8")
    best = TorchQuantisedLinear if unsupported() is not None else NativeQuantisedLinear
    assert type(resolve("pack_quantised", "cpu", torch.float32)(weight)) is best
    try:
        force("pack_quantised", "reference")
        assert type(resolve("pack_quantised", "cpu", torch.float32)(weight)) is ReferenceQuantisedLinear
    finally:
        force("pack_quantised", None)


@needs_native
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_every_instruction_set_gives_the_same_bits(shape: tuple[int, int], kind: str, instructions: str) -> None:
    if not binding.functions().native_has_quantised():
        pytest.skip("no products of bytes")
    linear, bias = NativeQuantisedLinear(quantise_weight(drawn(*shape), kind)), drawn(shape[0], seed=1)
    found, inputs = [], [drawn(rows, shape[1], seed=rows) * 3 for rows in ROWS]
    for x in inputs:
        x[-1, 0] = torch.nan if len(x) == 4 else x[-1, 0]
        found += [linear.apply(x, offset) for offset in (None, bias)]
    library = binding.compiled()
    assert isinstance(library, binding.Library)
    library.choose(binding.LEVELS[-1])
    wanted = [linear.apply(x, offset) for x in inputs for offset in (None, bias)]
    assert all(torch.equal(one.nan_to_num(7.0), other.nan_to_num(7.0)) for one, other in zip(found, wanted, strict=True))
    assert sum(bool(one.isnan().any()) for one in found) == 2


@needs_native
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("rows", ROWS[:5])
def test_the_largest_products_do_not_saturate(rows: int, sign: int, instructions: str) -> None:
    """Two products of 127 and 127 exceed 16 bits where 128 was added to one of them, and of int4 sixteen of -8 and 127 are near them."""
    if not binding.functions().native_has_quantised():
        pytest.skip("no products of bytes")
    x = torch.full((rows, 64), float(sign))
    for kind, least in (("int8", -1.0), ("int4", -8.0)):
        for value in (1.0, -1.0):
            weight = torch.full((40, 64), value)
            weight[:, ::2] *= least if kind == "int4" else 1.0
            quantised = quantise_weight(weight, kind)
            wanted = expected(x, quantised)
            assert (NativeQuantisedLinear(quantised).apply(x) - wanted).abs().max() <= 1e-6 * wanted.abs().max(), (kind, value)


def test_torch_computes_exactly_where_its_own_product_of_bytes_does_not() -> None:
    """In a process whose oneDNN has AVX2 alone, as on processors without dot products of bytes."""
    program = """
import torch
from service.kernels import quantised
weight = quantised.quantise_weight(torch.ones(48, 96), "int8")
x = torch.ones(9, 96)
found = quantised.TorchQuantisedLinear(weight).apply(x)
print(quantised.exact_integer_products(), (found - 96).abs().max().item() < 1e-4)
"""
    environment = {**os.environ, "ONEDNN_MAX_CPU_ISA": "AVX2"}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, env=environment, cwd=ROOT)
    assert done.stdout.split()[1] == "True"
    if platform.machine() == "x86_64":
        assert done.stdout.split()[0] == "False", "this oneDNN is exact with AVX2: the way around it is needed no longer"


@pytest.mark.skipif(unsupported() is not None, reason="no compiled integer products here")
@pytest.mark.parametrize("kind", KINDS)
def test_the_same_bits_with_any_number_of_threads(kind: str) -> None:
    linear, x = NativeQuantisedLinear(quantise_weight(drawn(1000, 256), kind)), drawn(19, 256)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(linear.apply(x))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


# Inputs in whole tiles; outputs in whole strips and one past them; rows that leave tiles, pairs of them and chunks unfinished.
@pytest.mark.skipif("amx" not in binding.describe(), reason="no matrix units here")
@pytest.mark.parametrize("shape", [(16, 64), (65, 128), (200, 1280), (97, 3456)])
def test_matrix_units_give_the_bits_of_dot_products(shape: tuple[int, int]) -> None:
    library, linear = binding.compiled(), NativeQuantisedLinear(quantise_weight(drawn(*shape), "int8"))
    assert isinstance(library, binding.Library)
    for rows in (8, 15, 16, 17, 31, 32, 33, 47, 48, 49, 64, 270):
        x, bias = drawn(rows, shape[1], seed=rows) * 3, drawn(shape[0], seed=1)
        x[rows // 2] = torch.nan
        for offset in (None, bias):
            found = linear.apply(x, offset)
            library.choose("avx512")
            wanted = linear.apply(x, offset)
            library.choose(binding.LEVELS[-1])
            assert torch.equal(found.nan_to_num(7.0), wanted.nan_to_num(7.0)), (rows, offset is None)
            assert found[rows // 2].isnan().all() and found.isnan().sum() == shape[0]
