"""Keys and values land in their places through the GPU's kernel, and nowhere else."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from service.kernels import reference
from service.kernels.gpu import kv_store
from tests.kernels.gpu.conftest import DEVICE, DTYPES


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


def test_blocks_far_past_int32_elements() -> None:
    storage = torch.empty(32770 * 65536, dtype=torch.float16, device=DEVICE)
    far = torch.as_strided(storage, (32770, 1, 4, 16), (65536, 64, 16, 1))
    key = torch.randn(1, 1, 16, device=DEVICE)
    kv_store.write_kv(key, key, far, far, torch.tensor([32769], device=DEVICE), torch.tensor([2], device=DEVICE))
    assert torch.equal(far[32769, 0, 2], key[0, 0].half())


def test_other_strides_are_refused() -> None:
    key, blocks = torch.zeros(1, 1, 16), torch.zeros(2, 1, 4, 16)
    at = torch.zeros(1, dtype=torch.int64)
    with pytest.raises(ValueError, match="contiguous"):
        kv_store.write_kv(torch.zeros(1, 1, 32)[..., ::2], key, blocks, blocks, at, at)
