"""Keys and values land in their slots, and nowhere else."""

from __future__ import annotations

import pytest
import torch

from service.kernels import kv_store, reference


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tokens", [0, 1, 9])
@pytest.mark.parametrize("size", [8, 24])
def test_only_the_named_slots_change(tokens: int, size: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    key, value = torch.randn(tokens, 3, 16), torch.randn(tokens, 3, size)
    slots = torch.randperm(5 * 4)[:tokens]
    block_ids, offsets = slots // 4, slots % 4
    keys, values = torch.full((5, 3, 4, 16), 7.0, dtype=dtype), torch.full((5, 3, 4, size), 7.0, dtype=dtype)
    expected_keys, expected_values = keys.clone(), values.clone()
    kv_store.write_kv(key, value, keys, values, block_ids, offsets)
    reference.write_kv(key, value, expected_keys, expected_values, block_ids, offsets)
    assert torch.equal(keys, expected_keys) and torch.equal(values, expected_values)
    assert int((keys != 7.0).any(dim=-1).sum()) == tokens * 3


def test_strided_inputs_as_they_come_from_a_fused_projection() -> None:
    fused = torch.randn(6, 8, 16)
    keys, values = torch.zeros(3, 2, 4, 16), torch.zeros(3, 2, 4, 16)
    kv_store.write_kv(fused[:, 4:6], fused[:, 6:8], keys, values, torch.tensor([1, 1, 1, 1, 2, 2]), torch.tensor([0, 1, 2, 3, 0, 1]))
    assert torch.equal(keys[1].transpose(0, 1), fused[:4, 4:6]) and torch.equal(values[2, :, :2].transpose(0, 1), fused[4:, 6:8])
    assert not keys[0].any() and not keys[2, :, 2:].any()
