"""The far store by the compiled kernels: near blocks demoted into it, each block and K/V head read once.

It does not know layers or who owns a block. Invariant: the bytes are those of `reference_sparse.demote`, with every instruction set and
any number of threads.
"""

from __future__ import annotations

import torch
from torch import Tensor

from service.kernels import far_store
from service.kernels.kv_store import row_size
from service.kernels.native.binding import KEPT, STORED, functions
from service.kernels.reference_sparse import FarBlocks
from service.kernels.workspace import Workspace

_WORKSPACE = Workspace()


def demote(key_blocks: Tensor, value_blocks: Tensor, far: FarBlocks, near_ids: Tensor, far_ids: Tensor) -> None:
    """See `reference_sparse.demote`: near blocks in float32, bfloat16, float16 or int8, in any strides of blocks, heads and tokens.

    What has another type or layout goes to torch, which also says what does not fit.
    """
    near, target = near_ids.to(torch.int64).contiguous(), far_ids.to(torch.int64).contiguous()
    taken = near.shape == target.shape and _fits(key_blocks, value_blocks, far) and _demote(key_blocks, value_blocks, far, near, target)
    if not taken:
        far_store.demote(key_blocks, value_blocks, far, near_ids, far_ids)


def _fits(key_blocks: Tensor, value_blocks: Tensor, far: FarBlocks) -> bool:
    """Whether the kernel reads and writes such blocks: rows are contiguous in the near store, everything is in the far one."""
    (_, heads, tokens), size, value_size = key_blocks.shape[:3], row_size(key_blocks), row_size(value_blocks)
    quantised = far.key_scales is not None or far.value_scales is not None
    kind, blocks, parts = far.keys.dtype if quantised else key_blocks.dtype, far.keys.shape[0], far.bounds.shape[2] - 1
    per_byte, rows = 2 if kind == torch.uint8 else 1, (blocks, heads, tokens)
    expected: list[tuple[Tensor | None, torch.dtype, tuple[int, ...]]] = [
        (far.keys, kind, (*rows, size // per_byte)),
        (far.values, kind, (*rows, value_size // per_byte)),
        (far.bounds, torch.int8, (blocks, heads, 1 + parts, 2, size)),
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
        and all(t is not None and t.dtype == dtype and t.shape == shape and t.is_contiguous() for t, dtype, shape in expected)
    )


def _demote(key_blocks: Tensor, value_blocks: Tensor, far: FarBlocks, near: Tensor, target: Tensor) -> bool:
    """Call the kernel; False where an id is none of its store's, and nothing was written."""
    (_, heads, tokens), sizes = key_blocks.shape[:3], (row_size(key_blocks), row_size(value_blocks))
    parts, threads, kind = far.bounds.shape[2] - 1, torch.get_num_threads(), KEPT[key_blocks.dtype]
    workspace = _WORKSPACE.take("demoting", threads * functions().native_demote_scratch(kind, tokens, parts, *sizes))
    done: int = functions().native_demote(
        *(kind, STORED[far.keys.dtype]),
        *(key_blocks.data_ptr(), *key_blocks.stride()[:3]),
        *(value_blocks.data_ptr(), *value_blocks.stride()[:3]),
        *(None if tensor is None else tensor.data_ptr() for tensor in (far.keys, far.values, far.key_scales, far.value_scales)),
        *(far.bounds.data_ptr(), far.bound_scales.data_ptr(), near.data_ptr(), target.data_ptr()),
        *(len(near), key_blocks.shape[0], far.keys.shape[0]),
        *(heads, tokens, parts, *sizes),
        *(workspace.data_ptr(), threads),
    )
    return bool(done)
