"""Keys and values land in their places through the GPU's kernel, and nowhere else."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from service.kernels import reference
from service.kernels.gpu import elementwise, kv_store
from service.kernels.gpu.paged_attention import FP8
from tests.kernels.gpu.conftest import COMPILED, DEVICE, DTYPES, FAR_BLOCK, FarApart, check_error, needs_e4m3


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [0, 1, 9])
@pytest.mark.parametrize("size", [8, 24])
def test_only_the_named_places_change(tokens: int, size: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    fused = torch.randn(tokens, 6, 24)
    key, value = fused[:, :3, :16], fused[:, 3:, :size]
    places = torch.randperm(5 * 4)[:tokens]
    keys, values = torch.full((5, 3, 4, 16), 7.0, dtype=dtype), torch.full((5, 3, 4, size), 7.0, dtype=dtype)
    expected_keys, expected_values = keys.clone(), values.clone()
    reference.write_kv(key, value, expected_keys, expected_values, places // 4, places % 4)
    keys, values = keys.to(DEVICE), values.to(DEVICE)
    kv_store.write_kv(*(tensor.to(DEVICE) for tensor in (key, value, keys, values, places // 4, places % 4)))
    assert torch.equal(keys.cpu(), expected_keys) and torch.equal(values.cpu(), expected_values)
    assert int((keys != 7.0).any(dim=-1).sum()) == tokens * 3


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [0, 1, 7])
@pytest.mark.parametrize(("size", "half", "value_size"), [(16, 8, 16), (24, 8, 8), (80, 40, 80), (24, 5, 24)])
def test_rotating_on_the_way_gives_the_bits_of_two_calls(tokens: int, size: int, half: int, value_size: int, dtype: torch.dtype) -> None:
    """Whole and partial rotations, heads in one matrix with the values, poison wherever nothing is named."""
    torch.manual_seed(tokens)
    wide = torch.randn(tokens, 8, size).to(dtype).to(DEVICE)
    heads, value = wide[:, :6], wide[:, 6:, :value_size]
    phase = torch.rand(tokens, half, device=DEVICE) * 6
    cos, sin = phase.cos(), phase.sin()
    places = torch.randperm(5 * 4, device=DEVICE)[:tokens]
    where = places // 4, places % 4
    shapes = (5, 2, 4, size), (5, 2, 4, value_size)
    found, apart = ([torch.full(shape, float("nan"), dtype=dtype, device=DEVICE) for shape in shapes] for _ in range(2))
    query = kv_store.rotate_write(heads, value, cos, sin, *found, *where)
    turned = elementwise.rotate(heads, cos, sin)
    kv_store.write_kv(turned[:, 4:], value, *apart, *where)
    assert query.is_contiguous() and torch.equal(query, turned[:, :4])
    for one, other in zip(found, apart, strict=True):
        assert torch.equal(one.nan_to_num(9.0), other.nan_to_num(9.0))
        assert int((~one.isnan()).any(dim=-1).sum()) == tokens * 2
    check_turned((query, *found), (heads, value, cos, sin), where)


def check_turned(found: tuple[Tensor, ...], arguments: tuple[Tensor, ...], where: tuple[Tensor, Tensor]) -> None:
    """Query heads, and keys and values at their places, by the error rule."""
    (query, keys, values), (heads, value, cos, sin) = (tuple(tensor.cpu() for tensor in part) for part in (found, arguments))
    (ids, offsets), count, dtype = (tensor.cpu() for tensor in where), query.shape[1], heads.dtype
    exact = reference.rotate(heads.double(), cos.double(), sin.double())
    plain = reference.rotate(heads, cos.to(dtype), sin.to(dtype))
    check_error(query, exact[:, :count], plain[:, :count], dtype)
    check_error(keys[ids, :, offsets], exact[:, count:], plain[:, count:], dtype)
    assert torch.equal(values[ids, :, offsets], value)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("fault", ["query", "key", "value", "angle", "place"])
def test_planted_faults_are_seen(fault: str, dtype: torch.dtype) -> None:
    """One element of another sign, the cosine of one pair 2 % off (bfloat16: 10 %), two tokens at each other's places."""
    torch.manual_seed(5)
    heads, value = torch.randn(5, 4, 16).to(dtype).to(DEVICE), torch.randn(5, 2, 16).to(dtype).to(DEVICE)
    phase, ids = torch.rand(5, 8, device=DEVICE), torch.arange(5, device=DEVICE)
    phase[3, 2] = 0
    heads[3, 0, 2] = 2.0
    sound = heads, value, phase.cos(), phase.sin()
    broken = [tensor.clone() for tensor in sound]
    if fault == "angle":
        broken[2][3, 2] *= 1.1 if dtype == torch.bfloat16 else 1.02
    elif fault != "place":
        at = {"query": (0, 3, 0, 2), "key": (0, 3, 3, 2), "value": (1, 3, 1, 2)}[fault]
        broken[at[0]][at[1:]] *= -1
    for arguments, places in ((sound, ids), (broken, ids.flip(0) if fault == "place" else ids)):
        blocks = [torch.zeros(5, 2, 1, 16, dtype=dtype, device=DEVICE) for _ in range(2)]
        found = kv_store.rotate_write(*arguments, *blocks, places, torch.zeros_like(ids)), *blocks
        if arguments is sound:
            check_turned(found, sound, (ids, torch.zeros_like(ids)))
    with pytest.raises(AssertionError):
        check_turned(found, sound, (ids, torch.zeros_like(ids)))


def widened(blocks: torch.Tensor) -> torch.Tensor:
    return blocks.float().nan_to_num(9.0)


@needs_e4m3
@pytest.mark.parametrize("dtype", DTYPES)
def test_eight_bits_hold_the_nearest_value_and_the_largest_for_all_beyond(dtype: torch.dtype) -> None:
    """Every finite value of the type between -70000 and 70000 in steps, halves, tiny ones, infinities and NaN."""
    odd = torch.tensor([0.0, -0.0, 7e4, -7e4, float("inf"), float("nan")])
    some = torch.cat((torch.linspace(-600, 600, 400), torch.randn(80) * 0.01, odd))
    if not COMPILED:  # the interpreter turns to 8 bits wrongly (127.8 to 64, NaN to 384): what needs no rounding, and what lies beyond
        some = torch.where(some.abs() <= 448, some.to(FP8).float(), some).nan_to_num(500.0)
    key = some[:480].view(10, 2, 24).to(dtype).to(DEVICE)
    value = some[-480:].view(10, 2, 24).to(dtype).to(DEVICE)
    places = torch.randperm(12, device=DEVICE)[:10]
    where = places // 4, places % 4
    keys, values = (torch.zeros(3, 2, 4, 24, device=DEVICE).to(FP8) for _ in range(2))
    kv_store.write_kv(key, value, keys, values, *where)
    for stored, given in ((keys, key), (values, value)):
        expected = given.float().clamp(-448, 448).to(FP8)
        found = stored.view(torch.uint8)[where[0], :, where[1]]
        assert torch.equal(widened(found.view(FP8)), widened(expected))
        assert found.view(FP8).float().isnan().equal(given.isnan())
    angles = torch.ones(10, 12, device=DEVICE), torch.zeros(10, 12, device=DEVICE)
    turned = [torch.zeros(3, 2, 4, 24, device=DEVICE).to(FP8) for _ in range(2)]
    kv_store.rotate_write(torch.cat((key, key), dim=1), value, *angles, *turned, *where)
    finite = ~keys.float().isnan() & (keys.float().abs() < 448)
    assert torch.equal(widened(turned[0])[finite], widened(keys)[finite]) and torch.equal(widened(turned[1]), widened(values))


def test_blocks_far_past_int32_elements(far_apart: FarApart) -> None:
    keys, values, turned, copied = (far_apart.place(torch.zeros(2, 1, 4, 16, dtype=torch.float16)) for _ in range(4))
    key, value = (torch.randn(1, 1, 16, device=DEVICE) for _ in range(2))
    where = torch.tensor([FAR_BLOCK + 1], device=DEVICE), torch.tensor([2], device=DEVICE)
    kv_store.write_kv(key, value, keys, values, *where)
    angles = torch.ones(1, 8, device=DEVICE), torch.zeros(1, 8, device=DEVICE)
    kv_store.rotate_write(torch.cat((key, key), dim=1), value, *angles, turned, copied, *where)
    for found, expected in ((keys, key), (values, value), (turned, key), (copied, value)):
        assert torch.equal(found[where[0], 0, 2], expected[0].half())


def test_other_strides_are_refused() -> None:
    key, blocks = torch.zeros(1, 1, 16), torch.zeros(2, 1, 4, 16)
    at = torch.zeros(1, dtype=torch.int64)
    with pytest.raises(ValueError, match="contiguous"):
        kv_store.write_kv(torch.zeros(1, 1, 32)[..., ::2], key, blocks, blocks, at, at)
    heads, angles = torch.zeros(1, 2, 16), torch.zeros(1, 8)
    with pytest.raises(ValueError, match="contiguous"):
        kv_store.rotate_write(heads.repeat(1, 1, 2)[..., ::2], key, angles, angles, blocks, blocks, at, at)
