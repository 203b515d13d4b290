"""Dense paged attention on a GPU: which rows go where, how wide tiles are, and the launches.

Sequences with one query row are decoded in splits of a fixed number of tokens; all others are computed in tiles of packed (token, head)
rows. Both sum in the same order (see `online_softmax`). It does not know models, layers or who owns a block.
Invariant: with a plan no call waits for the device; without one the lengths are read back first.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from service.kernels.gpu.dense_rows import decode_kernel, reduce_kernel
from service.kernels.gpu.dense_tiles import prefill_kernel
from service.kernels.gpu.online_softmax import LOG2_E
from service.kernels.splits import SPLIT_TOKENS

BLOCK_SIZES = (16, 32, 64, 128)
TYPES = (torch.bfloat16, torch.float16, torch.float32)
# What keys and values may be besides the type of the queries: widened in registers.
FP8 = torch.float8_e4m3fn
# Registers a thread may have: left to itself the assembler stops at 128 or 168 in small kernels and spills.
REGISTERS = 255
# Warps with that many that a multiprocessor has registers for.
WARPS_PER_PROCESSOR = 8


class Tile(NamedTuple):
    """How wide a prefill tile is: packed rows, warps, and stages of the software pipeline."""

    rows: int
    warps: int
    stages: int


def tile_of(dtype: torch.dtype, head_dim: int, capability: int) -> Tile:
    """The prefill tile for queries of a type and head size on sm_`capability`: the widest that the compile gate finds free of spills.

    128 rows are 64 for each of two warp groups, so each owns its rows. Two accumulators are kept (see `prefill_kernel`): 128 rows of 256
    values would take all registers.
    """
    if dtype == torch.float32:
        return Tile(16, 8, 1)
    if head_dim > 128:
        return Tile(64 if capability >= 90 else 32, 8, 2)
    return Tile(64 if head_dim > 64 and capability < 90 else 128, 8, 3)


def decode_tile(dtype: torch.dtype, head_dim: int, group: int) -> Tile:
    """The tile of one decode row's query heads: tensor cores take 16 rows at least."""
    rows = max(16, triton.next_power_of_2(group))
    return Tile(rows, 8, 2) if head_dim > 128 or dtype == torch.float32 else Tile(rows, 4, 3)


class Work(NamedTuple):
    """Where the work of one step lies: running totals over its sequences of prefill tiles and of decode splits, tile_ends and split_ends
    [S] int32 on the device. A launch has `tiles` or `splits` items, the last totals.
    """

    tile_ends: Tensor
    split_ends: Tensor
    tiles: int
    splits: int


class AttentionPlan:
    """The lengths of one step, kept on the host, and the work found from them: once for each shape of tiles that a layer asks for.

    `tiled`: sequences with one row are computed in tiles too, so that a row goes through one kernel whichever slice it is in.
    """

    def __init__(
        self, query_starts: Tensor, context_lengths: Tensor, device: torch.device, window: int | None, *, tiled: bool = False
    ) -> None:
        self._alone = 0 if tiled else 1
        self._contexts = context_lengths.cpu().to(torch.int64)
        self._counts = query_starts.cpu().to(torch.int64).diff()
        self._device = device
        self._window = window
        self._found: dict[tuple[int, ...], Work] = {}

    def dense(self, group: int, tile: Tile) -> Work:
        """Tiles and splits of dense attention with `group` query heads a K/V head. Raises ValueError when no token fits a tile."""
        if group > tile.rows:
            raise ValueError(f"{group} query heads a K/V head do not fit a tile of {tile.rows} rows: use at most {tile.rows}")
        tokens = tile.rows // group
        if (tokens,) not in self._found:
            first = torch.zeros_like(self._contexts)
            if self._window is not None:
                first = (self._contexts - self._window).clamp_(min=0) // SPLIT_TOKENS
            splits = (self._contexts - 1).clamp_(min=0) // SPLIT_TOKENS - first + 1
            self._found[tokens,] = self._work((self._counts + tokens - 1) // tokens, splits)
        return self._found[tokens,]

    def sparse(self, tokens: int, splits: int) -> Work:
        """Runs of `tokens` aligned positions, and the same number of splits for every decoding row."""
        if (tokens, splits) not in self._found:
            shift = (self._contexts - self._counts).clamp_(min=0)
            runs = torch.where(self._contexts > shift, (self._contexts - 1).clamp_(min=0) // tokens - shift // tokens + 1, 0)
            self._found[tokens, splits] = self._work(runs, torch.full_like(runs, splits))
        return self._found[tokens, splits]

    def _work(self, tiles: Tensor, splits: Tensor) -> Work:
        in_tiles, in_splits = self._counts > self._alone, (self._counts == 1) & (self._alone == 1)
        totals = torch.stack((torch.where(in_tiles, tiles, 0).cumsum(0), torch.where(in_splits, splits, 0).cumsum(0)))
        ends = totals.to(torch.int32)
        if self._device.type == "cuda":  # Only from pinned memory is a copy not waited for.
            ends = ends.pin_memory().to(self._device, non_blocking=True)
        return Work(ends[0], ends[1], int(totals[0, -1]), int(totals[1, -1]))


def plan_attention(
    block_tables: Tensor, query_starts: Tensor, context_lengths: Tensor, *, block_tokens: int, window: int | None
) -> AttentionPlan:
    """The plan of one step for layers with this window. Lengths that lie on the host are used as they are; others are waited for."""
    del block_tokens
    return AttentionPlan(query_starts, context_lengths, block_tables.device, window)


def plan_tiles(
    block_tables: Tensor, query_starts: Tensor, context_lengths: Tensor, *, block_tokens: int, window: int | None
) -> AttentionPlan:
    """The same with every row in tiles of one shape: whether decoding and prefill tiles round alike is then no question."""
    del block_tokens
    return AttentionPlan(query_starts, context_lengths, block_tables.device, window, tiled=True)


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

    key_blocks [N, Hkv, B, D], value_blocks [N, Hkv, B, Dv] of query's type or float8_e4m3fn, each head's rows contiguous, B of 16, 32, 64,
    128; block_tables [S, M] int32, query_starts [S + 1] int32, context_lengths [S] int32. Every query row belongs to a sequence; else as
    `reference.paged_attention`. Reads 2 · Hkv · D elements for each token seen by a sequence; 4 · Hq · D FLOPs for each (row, token) pair.
    Raises ValueError for other types, sizes or strides.
    """
    check_attention(query, key_blocks, value_blocks, block_tables)
    tile = tile_of(query.dtype, max(query.shape[2], value_blocks.shape[3]), capability(query.device))
    if plan is None:
        plan = plan_attention(block_tables, query_starts, context_lengths, block_tokens=key_blocks.shape[2], window=window)
    work = plan.dense(query.shape[1] // key_blocks.shape[1], tile)
    out = query.new_empty(query.shape[0], query.shape[1], value_blocks.shape[3])
    options = attention_options(query, key_blocks, value_blocks, context_lengths.shape[0], (window, softcap, sink_logits))
    numbers = (context_lengths.shape[0], *score_factors(scale, softcap))
    strides = (*query.stride()[:2], *out.stride()[:2], block_tables.stride(0), *key_blocks.stride()[:3], *value_blocks.stride()[:3])
    tensors = (query, key_blocks, value_blocks, out, block_tables, query_starts, context_lengths)
    if work.tiles:
        grid = (work.tiles, key_blocks.shape[1])
        prefill_kernel[grid](
            *tensors, work.tile_ends, sink_logits, *numbers, *strides,
            ROWS=tile.rows, num_warps=tile.warps, num_stages=tile.stages, maxnreg=REGISTERS, **options,
        )  # fmt: skip
    if work.splits:
        _decode(tensors, work, sink_logits, numbers, strides, options)
    return out


def score_factors(scale: float, softcap: float | None) -> tuple[float, float]:
    """The factors `scale` and `cap` of the kernels, see `online_softmax`. Raises ValueError for a scale or cap that is not positive."""
    if scale <= 0 or (softcap is not None and softcap <= 0):
        raise ValueError(f"the scale of scores and their cap must be positive, not {scale} and {softcap}")
    return (scale * LOG2_E, 1.0) if softcap is None else (scale / softcap, softcap * LOG2_E)


def _decode(
    tensors: tuple[Tensor, ...],
    work: Work,
    sink_logits: Tensor | None,
    numbers: tuple[int, float, float],
    strides: tuple[int, ...],
    options: dict[str, Any],
) -> None:
    query, keys, _, out, _, query_starts, _ = tensors
    heads, kv_heads = query.shape[1], keys.shape[1]
    peaks, sums = query.new_empty((2, work.splits, heads), dtype=torch.float32)
    parts = query.new_empty((work.splits, heads, out.shape[2]), dtype=torch.float32)
    tile = decode_tile(query.dtype, max(query.shape[2], out.shape[2]), heads // kv_heads)
    grid = (min(work.splits, -(-programs(query.device, tile.warps) // kv_heads)), kv_heads)
    decode_kernel[grid](
        *tensors, work.split_ends, sink_logits, peaks, sums, parts, *numbers, *strides,
        ROWS=tile.rows, num_warps=tile.warps, num_stages=tile.stages, maxnreg=REGISTERS, **options,
    )  # fmt: skip
    if work.splits > 1:
        reduce_kernel[(numbers[0], heads)](
            out, query_starts, work.split_ends, sink_logits, peaks, sums, parts, *out.stride()[:2],
            VALUE_DIM=options["VALUE_DIM"], BLOCK_VALUE=options["BLOCK_VALUE"], SINKS=options["SINKS"], num_warps=1, num_stages=3,
        )  # fmt: skip


def attention_options(
    query: Tensor, keys: Tensor, values: Tensor, sequences: int, scoring: tuple[int | None, float | None, Tensor | None]
) -> dict[str, Any]:
    """The constants that a launch is compiled for; `scoring` are the window, the cap on scores and the learned sinks."""
    window, softcap, sinks = scoring
    return {
        "SEQUENCES": sequence_room(sequences),
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


def sequence_room(sequences: int) -> int:
    """How many sequences a kernel looks through for the one that owns a work item: a power of two, the same for all up to 256."""
    return max(256, triton.next_power_of_2(sequences))


@cache
def programs(device: torch.device, warps: int) -> int:
    """Programs of a looping kernel that a device has room for at once; on none, where kernels are interpreted, those of one processor."""
    processors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
    return processors * max(1, WARPS_PER_PROCESSOR // warps)


@cache
def capability(device: torch.device) -> int:
    """90 for sm_90 and the like; where kernels are interpreted, that of the newest chip that tiles are chosen for."""
    if device.type != "cuda":
        return 90
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def check_attention(query: Tensor, keys: Tensor, values: Tensor, tables: Tensor) -> None:
    """Raise ValueError, with what is wrong, for tensors that the attention kernels do not take."""
    if query.dtype not in TYPES or keys.dtype not in (query.dtype, FP8) or values.dtype != keys.dtype:
        types = f"{query.dtype}, {keys.dtype}, {values.dtype}"
        raise ValueError(f"query, keys and values must share one of {TYPES}, or keys and values be {FP8}: not {types}")
    if keys.shape[2] not in BLOCK_SIZES or keys.shape[:3] != values.shape[:3]:
        raise ValueError(f"blocks of keys {tuple(keys.shape)} and values {tuple(values.shape)} must agree and hold {BLOCK_SIZES} tokens")
    if query.shape[1] % keys.shape[1] or query.shape[2] != keys.shape[3]:
        raise ValueError(f"query {tuple(query.shape)} does not divide over the heads of keys {tuple(keys.shape)}")
    if any(tensor.stride(-1) != 1 for tensor in (query, keys, values, tables)):
        raise ValueError("the last dimension of query, keys, values and tables must be contiguous")
