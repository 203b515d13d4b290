"""Paged attention by the compiled kernels: decode rows and prefill slices of one flat batch, keys and values read where they lie.

The signature is that of `reference.paged_attention`; float32, bfloat16 and float16 in any mixture of queries and blocks. It does not know
models or who owns a block. Invariants: a row's bits depend on the row and what it sees alone, never on the batch, the slice it is
computed in or the number of threads; what unused places of a block hold never reaches the output.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from service.kernels.kv_store import row_size
from service.kernels.native.binding import ELEMENTS, KEPT, functions
from service.kernels.workspace import Workspace

# Every position is behind fewer than this many others: the window of layers that have none.
NO_WINDOW = 1 << 62

_WORKSPACE = Workspace()


def paged_attention(
    query: Tensor,
    key_blocks: Tensor,
    value_blocks: Tensor,
    block_tables: Tensor,
    query_starts: Tensor,
    context_lengths: Tensor,
    *,
    scale: float,
    window: int | None,
    softcap: float | None = None,
    sink_logits: Tensor | None = None,
    plan: object = None,
) -> Tensor:
    """Causal attention of query [T, Hq, D] over block tables: [T, Hq, Dv] in the type of query, with sums in float32.

    key_blocks [N, Hkv, B, D], value_blocks [N, Hkv, B, Dv], block_tables [S, M], query_starts [S + 1], context_lengths [S] int32; on the
    CPU, in any strides. Over bfloat16 query rows and weights are rounded to it where the processor has dot products of it. Blocks of int8
    are those of `kv_store.quantise_rows`: with dot products of bytes (AVX-512) query rows, and weights block by block, are rounded to 8
    bits too, elsewhere keys and values are widened. What arguments mean is said at `reference.paged_attention`; `plan` is not needed.
    Raises ValueError for shapes or types that do not fit each other.
    """
    del plan
    call = prepare(query, key_blocks, value_blocks, (block_tables, query_starts, context_lengths), scale, window, softcap, sink_logits)
    compute(functions().native_paged_attention, *call.arguments)
    return call.out


class Call(NamedTuple):
    """The output of a call, the arguments that both kinds of attention take, and the tensors that must live as long as these."""

    out: Tensor
    arguments: tuple[object, ...]
    kept: tuple[Tensor | None, ...]


def prepare(
    query: Tensor,
    key_blocks: Tensor,
    value_blocks: Tensor,
    indices: tuple[Tensor, Tensor, Tensor],
    scale: float,
    window: int | None,
    softcap: float | None,
    sink_logits: Tensor | None,
) -> Call:
    """Check and lay out what `paged_attention` is given; `indices` are tables, starts and lengths."""
    tables, starts, contexts = (t.contiguous() for t in indices)
    _check(query, key_blocks, value_blocks, (tables, starts, contexts))
    query, key_blocks, value_blocks = (t if t.stride(-1) == 1 else t.contiguous() for t in (query, key_blocks, value_blocks))
    heads, kv_heads, value_size = query.shape[1], key_blocks.shape[1], row_size(value_blocks)
    out = query.new_empty(query.shape[0], heads, value_size)
    sinks = None if sink_logits is None else sink_logits.float().contiguous()
    arguments = (
        *(ELEMENTS[query.dtype], query.data_ptr(), *query.stride()[:2]),
        *(KEPT[key_blocks.dtype], key_blocks.data_ptr(), *key_blocks.stride()[:3]),
        *(value_blocks.data_ptr(), *value_blocks.stride()[:3]),
        *(tables.data_ptr(), tables.shape[1], starts.data_ptr(), contexts.data_ptr(), contexts.shape[0]),
        *(kv_heads, heads // kv_heads, query.shape[2], value_size, key_blocks.shape[2]),
        *(scale, NO_WINDOW if window is None else window, softcap or 0.0, None if sinks is None else sinks.data_ptr()),
        out.data_ptr(),
    )
    return Call(out, arguments, (query, key_blocks, value_blocks, tables, starts, contexts, sinks))


def compute(attend: Callable[..., int], *arguments: object) -> None:
    """Call with all the workspace there is, and again with what was then asked for."""
    threads = torch.get_num_threads()
    workspace = _WORKSPACE.take("attention", _WORKSPACE.bytes // 4)
    needed = attend(*arguments, workspace.data_ptr(), workspace.nbytes, threads)
    if needed > workspace.nbytes:
        workspace = _WORKSPACE.take("attention", needed // 4 + 64)
        attend(*arguments, workspace.data_ptr(), workspace.nbytes, threads)


def _check(query: Tensor, key_blocks: Tensor, value_blocks: Tensor, indices: tuple[Tensor, Tensor, Tensor]) -> None:
    tables, starts, contexts = indices
    shapes = f"queries {tuple(query.shape)}, keys {tuple(key_blocks.shape)}, values {tuple(value_blocks.shape)}"
    if query.shape[2] != row_size(key_blocks) or query.shape[1] % key_blocks.shape[1] or key_blocks.shape[:3] != value_blocks.shape[:3]:
        raise ValueError(f"{shapes} do not fit each other")
    if key_blocks.dtype != value_blocks.dtype or any(index.dtype != torch.int32 for index in indices):
        raise ValueError("keys and values must have one type, and tables, starts and lengths must be int32")
    if tables.shape[0] != contexts.shape[0] or starts.shape[0] != contexts.shape[0] + 1:
        raise ValueError(f"{tables.shape[0]} tables and {starts.shape[0]} starts do not fit {contexts.shape[0]} lengths")
