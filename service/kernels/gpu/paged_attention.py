"""Dense paged attention on a GPU: which rows go where, how wide tiles are, and the launches.

Sequences with one query row are decoded in splits of a fixed number of tokens; all others are computed in tiles of packed (token, head)
rows. Both sum in the same order (see `online_softmax`). It does not know models, layers or who owns a block.
Invariant: with a plan no call waits for the device; without one the lengths are read back first.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from service.kernels.gpu.dense_rows import decode_kernel, reduce_kernel
from service.kernels.gpu.dense_tiles import prefill_kernel
from service.kernels.gpu.online_softmax import LOG2_E

# Tokens of a split: part of the arithmetic, so a constant and never a tuning parameter.
SPLIT_TOKENS = 512
BLOCK_SIZES = (16, 32, 64, 128)
TYPES = (torch.bfloat16, torch.float16, torch.float32)
# Registers a thread may have: left to itself the assembler stops at 128 or 168 in small kernels and spills.
REGISTERS = 255
# Decode programs kept on one multiprocessor at once; each loops over the work that is left.
PROGRAMS_PER_PROCESSOR = 4


class Tile(NamedTuple):
    """How wide a prefill tile is: packed rows, warps, and stages of the software pipeline."""

    rows: int
    warps: int
    stages: int


@dataclass(frozen=True, slots=True)
class AttentionPlan:
    """Where the work of one step lies, the same for all layers with one window and group size.

    tile_ends, split_ends [S] int32 on the device: running totals of prefill tiles and of decode splits over the sequences. `tiles` and
    `splits` bound their last entries from above; a launch sees no more than that.
    """

    tile_ends: Tensor
    split_ends: Tensor
    tiles: int
    splits: int


def tile_of(dtype: torch.dtype, head_dim: int, capability: int) -> Tile:
    """The prefill tile for queries of a type and head size on sm_`capability`: the widest that the compile gate finds free of spills.

    Two accumulators are kept (see `prefill_kernel`), so 128 rows of 128 values would need 128 registers a thread for them alone.
    """
    if dtype == torch.float32:
        return Tile(16, 8, 1)
    if capability < 90:
        return Tile(16, 8, 1) if head_dim > 128 else Tile(32, 8 if head_dim > 64 else 4, 3)
    if head_dim > 128:
        return Tile(32, 8, 1)
    return Tile(64, 8, 3) if head_dim > 64 else Tile(128, 8, 3)


def decode_tile(dtype: torch.dtype, head_dim: int, group: int) -> Tile:
    """The tile of one decode row's query heads: tensor cores take 16 rows at least."""
    rows = max(16, triton.next_power_of_2(group))
    return Tile(rows, 8, 2) if head_dim > 128 or dtype == torch.float32 else Tile(rows, 4, 3)


def plan_attention(
    query_starts: Tensor,
    context_lengths: Tensor,
    *,
    window: int | None,
    group: int,
    tile: Tile,
    device: torch.device | str,
) -> AttentionPlan:
    """Count each sequence's tiles and splits. The lengths are CPU tensors, so that nothing waits for the device.

    `group` is the number of query heads a K/V head. Raises ValueError when a tile does not hold one token's heads.
    """
    if group > tile.rows:
        raise ValueError(f"{group} query heads a K/V head do not fit a tile of {tile.rows} rows: use at most {tile.rows}")
    contexts = context_lengths.to(torch.int64)
    counts = query_starts[1:].to(torch.int64) - query_starts[:-1]
    tokens = tile.rows // group
    tiles = torch.where(counts > 1, (counts + tokens - 1) // tokens, 0).cumsum(0)
    first = torch.zeros_like(contexts) if window is None else (contexts - window).clamp_(min=0) // SPLIT_TOKENS
    splits = torch.where(counts == 1, ((contexts - 1).clamp_(min=0) // SPLIT_TOKENS - first + 1), 0).cumsum(0)
    ends = torch.stack((tiles, splits)).to(torch.int32).to(device, non_blocking=True)
    return AttentionPlan(ends[0], ends[1], int(tiles[-1]), int(splits[-1]))


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
    plan: AttentionPlan | None = None,
) -> Tensor:
    """Causal attention of query [T, Hq, D] over block tables: [T, Hq, Dv] in the type of query, sums in float32.

    key_blocks [N, Hkv, B, D], value_blocks [N, Hkv, B, Dv] of query's type, each head's rows contiguous, B of 16, 32, 64, 128;
    block_tables [S, M] int32, query_starts [S + 1] int32, context_lengths [S] int32. Every query row belongs to a sequence; else as
    `reference.paged_attention`. Reads 2 · Hkv · D elements for each token seen by a sequence; 4 · Hq · D FLOPs for each (row, token) pair.
    Raises ValueError for other types, sizes or strides.
    """
    check_attention(query, key_blocks, value_blocks, block_tables)
    tile = tile_of(query.dtype, max(query.shape[2], value_blocks.shape[3]), capability(query.device))
    if plan is None:
        group = query.shape[1] // key_blocks.shape[1]
        starts, lengths = query_starts.cpu(), context_lengths.cpu()
        plan = plan_attention(starts, lengths, window=window, group=group, tile=tile, device=query.device)
    out = query.new_empty(query.shape[0], query.shape[1], value_blocks.shape[3])
    options = attention_options(query, key_blocks, value_blocks, context_lengths.shape[0], (window, softcap, sink_logits))
    sequences = context_lengths.shape[0]
    numbers = (sequences, scale * LOG2_E, 1.0) if softcap is None else (sequences, scale / softcap, softcap * LOG2_E)
    strides = (*query.stride()[:2], *out.stride()[:2], block_tables.stride(0), *key_blocks.stride()[:3], *value_blocks.stride()[:3])
    tensors = (query, key_blocks, value_blocks, out, block_tables, query_starts, context_lengths)
    if plan.tiles:
        grid = (plan.tiles, key_blocks.shape[1])
        prefill_kernel[grid](
            *tensors, plan.tile_ends, sink_logits, *numbers, *strides,
            ROWS=tile.rows, num_warps=tile.warps, num_stages=tile.stages, maxnreg=REGISTERS, **options,
        )  # fmt: skip
    if plan.splits:
        _decode(tensors, plan, sink_logits, numbers, strides, options)
    return out


def _decode(
    tensors: tuple[Tensor, ...],
    plan: AttentionPlan,
    sink_logits: Tensor | None,
    numbers: tuple[int, float, float],
    strides: tuple[int, ...],
    options: dict[str, Any],
) -> None:
    query, keys, _, out, _, query_starts, _ = tensors
    heads, kv_heads = query.shape[1], keys.shape[1]
    peaks, sums = query.new_empty((2, plan.splits, heads), dtype=torch.float32)
    parts = query.new_empty((plan.splits, heads, out.shape[2]), dtype=torch.float32)
    tile = decode_tile(query.dtype, max(query.shape[2], out.shape[2]), heads // kv_heads)
    grid = (min(plan.splits, -(-programs(query.device) // kv_heads)), kv_heads)
    decode_kernel[grid](
        *tensors, plan.split_ends, sink_logits, peaks, sums, parts, *numbers, *strides,
        ROWS=tile.rows, num_warps=tile.warps, num_stages=tile.stages, maxnreg=REGISTERS, **options,
    )  # fmt: skip
    if plan.splits > 1:
        reduce_kernel[(numbers[0], heads)](
            out, query_starts, plan.split_ends, sink_logits, peaks, sums, parts, *out.stride()[:2],
            VALUE_DIM=options["VALUE_DIM"], BLOCK_VALUE=options["BLOCK_VALUE"], SINKS=options["SINKS"], num_warps=1, num_stages=3,
        )  # fmt: skip


def attention_options(
    query: Tensor, keys: Tensor, values: Tensor, sequences: int, scoring: tuple[int | None, float | None, Tensor | None]
) -> dict[str, Any]:
    """The constants that a launch is compiled for; `scoring` are the window, the cap on scores and the learned sinks."""
    window, softcap, sinks = scoring
    return {
        "SEQUENCES": max(16, triton.next_power_of_2(sequences)),
        "GROUP": query.shape[1] // keys.shape[1],
        "KEY_DIM": query.shape[2],
        "VALUE_DIM": values.shape[3],
        "BLOCK_KEY": max(16, triton.next_power_of_2(query.shape[2])),
        "BLOCK_VALUE": max(16, triton.next_power_of_2(values.shape[3])),
        "BLOCK_TOKENS": keys.shape[2],
        "SPLIT_BLOCKS": SPLIT_TOKENS // keys.shape[2],
        "WINDOW": window or 0,
        "CAPPED": softcap is not None,
        "SINKS": sinks is not None,
        "PRECISION": "ieee" if query.dtype == torch.float32 else "tf32",
    }


@cache
def programs(device: torch.device) -> int:
    """Programs that a looping kernel starts with on a device; on none, where kernels are interpreted, few."""
    if device.type != "cuda":
        return PROGRAMS_PER_PROCESSOR
    return PROGRAMS_PER_PROCESSOR * torch.cuda.get_device_properties(device).multi_processor_count


@cache
def capability(device: torch.device) -> int:
    """90 for sm_90 and the like; where kernels are interpreted, that of the newest chip that tiles are chosen for."""
    if device.type != "cuda":
        return 90
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def check_attention(query: Tensor, keys: Tensor, values: Tensor, tables: Tensor) -> None:
    """Raise ValueError, with what is wrong, for tensors that the attention kernels do not take."""
    if query.dtype not in TYPES or keys.dtype != query.dtype or values.dtype != query.dtype:
        raise ValueError(f"query, keys and values must share one of {TYPES}, not {query.dtype}, {keys.dtype}, {values.dtype}")
    if keys.shape[2] not in BLOCK_SIZES or keys.shape[:3] != values.shape[:3]:
        raise ValueError(f"blocks of keys {tuple(keys.shape)} and values {tuple(values.shape)} must agree and hold {BLOCK_SIZES} tokens")
    if query.shape[1] % keys.shape[1] or query.shape[2] != keys.shape[3]:
        raise ValueError(f"query {tuple(query.shape)} does not divide over the heads of keys {tuple(keys.shape)}")
    if any(tensor.stride(-1) != 1 for tensor in (query, keys, values, tables)):
        raise ValueError("the last dimension of query, keys, values and tables must be contiguous")
