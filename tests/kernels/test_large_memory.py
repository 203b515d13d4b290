"""Weights' memory: aligned, apart from each other, freed with its tensors, usable in and out of inference mode."""

from __future__ import annotations

import torch

from service.kernels.large_memory import PIECE_BYTES, LargeMemory


def test_tensors_are_aligned_and_do_not_overlap() -> None:
    memory, taken = LargeMemory(), []
    for number, shape in enumerate([(3, 5), (1,), (0, 4), (7, 64), (2, 2, 2)]):
        dtype = (torch.uint8, torch.float32, torch.int64)[number % 3]
        tensor = memory.take(shape, dtype).fill_(number)
        assert tensor.shape == shape and tensor.dtype == dtype and tensor.is_contiguous()
        assert tensor.data_ptr() % 64 == 0
        taken.append(tensor)
    assert all((tensor == number).all() for number, tensor in enumerate(taken))


def test_pieces_follow_each_other_and_what_is_larger_has_its_own() -> None:
    memory = LargeMemory()
    first = memory.take((PIECE_BYTES - 100,), torch.uint8)
    assert first.data_ptr() % (2 << 20) == 0
    second = memory.take((64,), torch.uint8)
    assert second.data_ptr() == first.data_ptr() + PIECE_BYTES - 64
    third = memory.take((65,), torch.uint8)
    assert third.untyped_storage().data_ptr() != first.untyped_storage().data_ptr()
    large = memory.take((PIECE_BYTES + 1,), torch.uint8)
    large[0] = large[-1] = 1
    assert memory.take((64,), torch.uint8).data_ptr() == third.data_ptr() + 128


def test_a_copy_is_kept_and_can_be_written_outside_inference_mode() -> None:
    memory, original = LargeMemory(), torch.arange(12).view(3, 4)
    with torch.inference_mode():
        kept = memory.keep(original.t())
    assert torch.equal(kept, original.t()) and kept.is_contiguous() and kept.data_ptr() != original.data_ptr()
    kept.add_(1)
    assert torch.equal(original, torch.arange(12).view(3, 4))
