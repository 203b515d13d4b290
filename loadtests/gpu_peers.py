"""Attention of other libraries over the cache that ours reads, each where it can be imported; absence is its reason in a row.

The form of these calls was looked up (FlashInfer, flash_attn 2 and its interface for Hopper, `flash_attn_interface`) and has not been run
against any of them: whoever gives another result than ours is not timed, and its row says so. It does not know clocks or rows.
Invariant: queries are the last rows of each sequence, and what a library needs beside our blocks is laid out before it is timed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

WORKSPACE_BYTES = 256 << 20
# Tokens of a page that flash_attn 2 takes: a multiple of this.
FLASH_PAGE = 256


@dataclass(frozen=True)
class Paged:
    """Queries [T, Hq, D] over blocks [N, Hkv, B, D] by tables [S, M]; every sequence has `context` tokens."""

    query: Tensor
    keys: Tensor
    values: Tensor
    tables: Tensor
    context: int
    window: int | None = None

    @property
    def rows(self) -> int:
        """Queries of a sequence."""
        return len(self.query) // len(self.tables)

    @property
    def by_sequence(self) -> Tensor:
        """Queries [S, rows, Hq, D]."""
        return self.query.unflatten(0, (len(self.tables), self.rows))

    @property
    def reach(self) -> int:
        """Tokens before its own that a row sees; −1 for all, as these libraries say it."""
        return -1 if self.window is None else self.window - 1

    @property
    def flash_window(self) -> tuple[int, int]:
        """The same for flash_attn: before and behind."""
        return (-1, -1) if self.window is None else (self.reach, 0)

    def integers(self, *numbers: int) -> Tensor:
        """int32 on the queries' device."""
        return torch.tensor(numbers, dtype=torch.int32, device=self.query.device)

    def steps(self, step: int) -> Tensor:
        """Where each sequence starts that has `step` of something, and the end."""
        return torch.arange(len(self.tables) + 1, dtype=torch.int32, device=self.query.device) * step

    def lengths(self) -> Tensor:
        """Tokens of each sequence."""
        return self.integers(self.context).repeat(len(self.tables))

    def in_order(self, blocks: Tensor) -> Tensor:
        """Keys or values [S, context, Hkv, D] in the order of their tokens."""
        return blocks[self.tables.long()].transpose(2, 3).flatten(1, 2)[:, : self.context]


def flashinfer(paged: Paged) -> Callable[[], Tensor]:
    """FlashInfer's paged decode or, for several rows, prefill: planned once, over our blocks as they lie."""
    import flashinfer as library

    workspace = torch.empty(WORKSPACE_BYTES, dtype=torch.uint8, device=paged.query.device)
    (_, kv_heads, block, size), heads, blocks = paged.keys.shape, paged.query.shape[1], -(-paged.context // paged.keys.shape[2])
    pages = paged.steps(blocks), paged.tables[:, :blocks].flatten(), (paged.lengths() - 1) % block + 1
    options = {"window_left": paged.reach, "q_data_type": paged.query.dtype, "kv_data_type": paged.keys.dtype}
    if paged.rows == 1:
        wrapper = library.BatchDecodeWithPagedKVCacheWrapper(workspace, "HND", use_tensor_cores=True)
        wrapper.plan(*pages, heads, kv_heads, size, block, **options)
    else:
        wrapper = library.BatchPrefillWithPagedKVCacheWrapper(workspace, "HND")
        wrapper.plan(paged.steps(paged.rows), *pages, heads, kv_heads, size, block, causal=True, **options)
    return partial(wrapper.run, paged.query, (paged.keys, paged.values))


def flash_attention_2(paged: Paged) -> Callable[[], Tensor]:
    """flash_attn over pages of its own size, scattered as our blocks are, or for whole prompts over tokens in order."""
    import flash_attn as library

    keys, values = paged.in_order(paged.keys), paged.in_order(paged.values)
    if paged.rows == paged.context:
        starts = paged.steps(paged.context)
        return partial(
            library.flash_attn_varlen_func, paged.query, keys.flatten(0, 1), values.flatten(0, 1), starts, starts, paged.context,
            paged.context, causal=True, window_size=paged.flash_window,
        )  # fmt: skip
    many = -(-paged.context // FLASH_PAGE)
    order = torch.randperm(len(paged.tables) * many, device=keys.device)
    pages = [_in_pages(tokens, many)[order] for tokens in (keys, values)]
    tables = order.argsort().to(torch.int32).view(len(paged.tables), many)
    options: dict[str, Any] = {"block_table": tables, "causal": True, "window_size": paged.flash_window}
    return partial(library.flash_attn_with_kvcache, paged.by_sequence, *pages, cache_seqlens=paged.lengths(), **options)


def _in_pages(tokens: Tensor, many: int) -> Tensor:
    """Tokens [S, context, Hkv, D] as `many` pages a sequence, [S · many, FLASH_PAGE, Hkv, D]; behind the last token zeros."""
    filled = torch.nn.functional.pad(tokens, (0, 0, 0, 0, 0, many * FLASH_PAGE - tokens.shape[1]))
    return filled.reshape(len(tokens) * many, FLASH_PAGE, *tokens.shape[2:])


def flash_attention_3(paged: Paged) -> Callable[[], Tensor]:
    """The interface for Hopper, whose pages have any size: over views of our blocks."""
    import flash_attn_interface as library

    blocks = paged.keys.transpose(1, 2), paged.values.transpose(1, 2)
    options: dict[str, Any] = {"page_table": paged.tables, "causal": True, "window_size": paged.flash_window}
    return partial(library.flash_attn_with_kvcache, paged.by_sequence, *blocks, cache_seqlens=paged.lengths(), **options)


LIBRARIES: dict[str, Callable[[Paged], Callable[[], Tensor]]] = {
    "flashinfer_paged": flashinfer,
    "flash_attn_2": flash_attention_2,
    "flash_attn_3_paged": flash_attention_3,
}


def agreeing(make: Callable[[Paged], Callable[[], Tensor]], paged: Paged, ours: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """What `make` gives, if it computes what ours does. Raises ValueError otherwise, and ImportError where the library is not there."""
    run = make(paged)
    expected = ours().float()
    error = (run().reshape(expected.shape).float() - expected).abs().max().item()
    if not error <= 0.02 * expected.abs().max().item():
        raise ValueError(f"gives another result than ours, off by {error:.3g}: not timed")
    return run


def library_peers(paged: Paged, ours: Callable[[], Tensor]) -> dict[str, Callable[[], Callable[[], Any]]]:
    """A peer of each library, made when it is asked for."""
    return {name: partial(agreeing, make, paged, ours) for name, make in LIBRARIES.items()}
