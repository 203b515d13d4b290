"""The far store by the compiled kernels: near blocks demoted into it, each block and K/V head read once.

It does not know layers or who owns a block. Invariant: the bytes are those of `reference_sparse.demote`, with every instruction set and
any number of threads.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from service.kernels import far_store
from service.kernels.kv_store import row_size
from service.kernels.native.binding import KEPT, STORED, functions
from service.kernels.reference_sparse import FarBlocks
from service.kernels.workspace import Workspace

_WORKSPACE = Workspace()


class FarBounds(ctypes.Structure):
    """`struct far_bounds` of native.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("blocks", "parts", "scales")),
        *((name, ctypes.c_int64 * 2) for name in ("block_strides", "scale_strides")),
        ("count", ctypes.c_int64),
    )

    @classmethod
    def of(cls, far: FarBlocks) -> FarBounds:
        """The bounds of a store that `has_plain_bounds`, which must stay where it is."""
        pointers = (tensor.data_ptr() for tensor in (far.bounds, far.part_bounds, far.bound_scales))
        strides = ((ctypes.c_int64 * 2)(*tensor.stride()[:2]) for tensor in (far.bounds, far.bound_scales))
        return cls(*pointers, *strides, far.part_bounds.shape[2])


def has_plain_bounds(far: FarBlocks) -> bool:
    """Whether bounds are contiguous within a block and head, and those of parts altogether."""
    return far.bounds.stride()[2:] == (far.bounds.shape[3], 1) and far.part_bounds.is_contiguous()


def demote(key_blocks: Tensor, value_blocks: Tensor, far: FarBlocks, near_ids: Tensor, far_ids: Tensor) -> None:
    """See `reference_sparse.demote`: near blocks in float32, bfloat16, float16 or int8, in any strides of blocks, heads and tokens.

    What has another type or layout goes to torch, which also says what does not fit.
    """
    near, target = near_ids.to(torch.int64).contiguous(), far_ids.to(torch.int64).contiguous()
    taken = near.shape == target.shape and _fits(key_blocks, value_blocks, far) and _demote(key_blocks, value_blocks, far, near, target)
    if not taken:
        far_store.demote(key_blocks, value_blocks, far, near_ids, far_ids)


def _fits(key_blocks: Tensor, value_blocks: Tensor, far: FarBlocks) -> bool:
    """Whether the kernel reads and writes such blocks: rows are contiguous in the near store, all but bounds of blocks in the far one."""
    (_, heads, tokens), size, value_size = key_blocks.shape[:3], row_size(key_blocks), row_size(value_blocks)
    quantised = far.key_scales is not None or far.value_scales is not None
    kind, blocks, parts = far.keys.dtype if quantised else key_blocks.dtype, far.keys.shape[0], far.part_bounds.shape[2]
    per_byte, rows = 2 if kind == torch.uint8 else 1, (blocks, heads, tokens)
    expected: list[tuple[Tensor | None, torch.dtype, tuple[int, ...]]] = [
        (far.keys, kind, (*rows, size // per_byte)),
        (far.values, kind, (*rows, value_size // per_byte)),
    ]
    bounds = [
        (far.bounds, torch.int8, (blocks, heads, 2, size)),
        (far.part_bounds, torch.int8, (blocks, heads, parts, 2, size)),
        (far.bound_scales, torch.float16, (blocks, heads)),
    ]
    if quantised:
        expected += [(scales, torch.float16, rows) for scales in (far.key_scales, far.value_scales)]
    return (
        key_blocks.dtype == value_blocks.dtype
        and key_blocks.dtype in KEPT
        and quantised == (kind in (torch.int8, torch.uint8))
        and key_blocks.shape[:3] == value_blocks.shape[:3]
        and key_blocks.stride(3) == value_blocks.stride(3) == 1
        and size % per_byte == value_size % per_byte == 0
        and parts > 0
        and tokens % parts == 0
        and has_plain_bounds(far)
        and all(t is not None and t.is_contiguous() for t, _, _ in expected)
        and all(t is not None and t.dtype == dtype and t.shape == shape for t, dtype, shape in (*expected, *bounds))
    )


def _demote(key_blocks: Tensor, value_blocks: Tensor, far: FarBlocks, near: Tensor, target: Tensor) -> bool:
    """Call the kernel; False where an id is none of its store's, and nothing was written."""
    (_, heads, tokens), sizes = key_blocks.shape[:3], (row_size(key_blocks), row_size(value_blocks))
    parts, threads, kind = far.part_bounds.shape[2], torch.get_num_threads(), KEPT[key_blocks.dtype]
    workspace = _WORKSPACE.take("demoting", threads * functions().native_demote_scratch(kind, tokens, parts, *sizes))
    done: int = functions().native_demote(
        *(kind, STORED[far.keys.dtype]),
        *(key_blocks.data_ptr(), *key_blocks.stride()[:3]),
        *(value_blocks.data_ptr(), *value_blocks.stride()[:3]),
        *(None if tensor is None else tensor.data_ptr() for tensor in (far.keys, far.values, far.key_scales, far.value_scales)),
        *(ctypes.byref(FarBounds.of(far)), near.data_ptr(), target.data_ptr()),
        *(len(near), key_blocks.shape[0], far.keys.shape[0]),
        *(heads, tokens, *sizes),
        *(workspace.data_ptr(), threads),
    )
    return bool(done)
