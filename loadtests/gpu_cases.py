"""What `gpu_bench` measures: of each kernel some shapes, the bytes and operations it cannot do without, and who else computes the same.

It does not know clocks or rows. Invariant: a case is made when it is asked for, and its tensors are gone with it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

BLOCK, HEADS, KV_HEADS = 64, 32, 8


@dataclass(frozen=True)
class Case:
    """One measurement: what runs, the bytes it must move and the operations it must do, and who else computes the same."""

    op: str
    shape: dict[str, Any]
    run: Callable[[], Any]
    moved_bytes: float
    flops: float
    # Of the machine's rates the one that its operations are held against.
    rate: str = "flops_us"
    # Each makes what is timed, so that one that cannot be made is a row too.
    peers: dict[str, Callable[[], Callable[[], Any]]] = field(default_factory=dict)
    check: Callable[[], None] = lambda: None


def paged(sequences: int, context: int, heads: int, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """(keys, values, tables) of sequences of `context` tokens in blocks scattered at random."""
    blocks = sequences * -(-context // BLOCK)
    shape = (blocks + 1, heads, BLOCK, size)
    keys, values = (torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    tables = (torch.randperm(blocks, device="cuda") + 1).to(torch.int32).view(sequences, -1)
    return keys, values, tables


def dense(query: Tensor, keys: Tensor, values: Tensor, tables: Tensor, context: int) -> Callable[[], Tensor]:
    """Our dense attention of query rows that are the last of each sequence, planned once as an engine's step plans it."""
    from service.kernels.gpu import paged_attention as ours

    sequences = tables.shape[0]
    rows = query.shape[0] // sequences
    starts = torch.arange(0, query.shape[0] + 1, rows, dtype=torch.int32)
    lengths = torch.full((sequences,), context, dtype=torch.int32)
    plan = ours.plan_attention(tables, starts, lengths, block_tokens=BLOCK, window=None)
    there = starts.cuda(), lengths.cuda()
    scale = query.shape[2] ** -0.5
    return lambda: ours.paged_attention(query, keys, values, tables, *there, scale=scale, window=None, plan=plan)


def attention_cases() -> Iterator[Case]:
    """Dense decode over batches and contexts, dense prefill, beside torch on keys and values that lie in order already."""
    from torch.nn.functional import scaled_dot_product_attention as sdpa

    for size, sequences, context, rows in (
        *((size, b, c, 1) for size in (64, 128) for b, c in ((1, 1024), (1, 16384), (1, 131072), (32, 16384), (256, 1024), (8, 131072))),
        *((size, 1, c, c) for size in (64, 128) for c in (2048, 16384)),
    ):
        kv_heads = KV_HEADS
        keys, values, tables = paged(sequences, context, kv_heads, size)
        query = torch.randn(sequences * rows, HEADS, size, device="cuda", dtype=torch.bfloat16)
        run = dense(query, keys, values, tables, context)
        ordered = [
            blocks[tables.long()].transpose(1, 2).reshape(sequences, kv_heads, -1, size)[:, :, :context].contiguous()
            for blocks in (keys, values)
        ]
        asked = query.view(sequences, rows, HEADS, size).transpose(1, 2)

        def torch_run(asked: Tensor = asked, ordered: list[Tensor] = ordered, causal: bool = rows > 1) -> Tensor:
            return sdpa(asked, *ordered, is_causal=causal, enable_gqa=True)

        seen = sequences * (context if rows == 1 else rows * (context - rows) + rows * (rows + 1) / 2)
        read = 2 * sequences * kv_heads * context * size * 2
        shape = {"sequences": sequences, "context": context, "rows": rows, "head_dim": size, "heads": HEADS, "kv_heads": kv_heads}
        peers: dict[str, Callable[[], Callable[[], Any]]] = {"torch_sdpa_in_order": lambda run=torch_run: run}  # type: ignore[misc]
        if rows > 1:
            peers["flex_attention_in_order"] = partial(flex, asked, ordered)
        op, flops = "decode" if rows == 1 else "prefill", 4.0 * seen * HEADS * size
        yield Case(op, shape, run, read, flops, peers=peers, check=partial(check, run, torch_run))


def flex(query: Tensor, ordered: list[Tensor]) -> Callable[[], Any]:
    """Causal flex_attention, compiled at its first call."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    compiled = torch.compile(flex_attention)

    def causal(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return q >= k

    mask = create_block_mask(causal, None, None, query.shape[2], ordered[0].shape[2], device="cuda")
    return lambda: compiled(query, *ordered, block_mask=mask, enable_gqa=True)


def sparse_cases() -> Iterator[Case]:
    """Choice and attention over two stores of one decode step, beside our own dense attention over everything."""
    from service.kernels.gpu import choose_far, far_store, window_sparse
    from service.kernels.reference_sparse import FIRST_STAGE, SECOND_STAGE, ChosenFar, FarBlocks

    window, refresh, sinks = 2048, 1, 1
    for size, kv_heads, (sequences, context) in (
        (size, kv, place) for size, kv in ((128, 8), (64, 16)) for place in ((1, 16384), (1, 131072), (32, 16384), (32, 131072))
    ):
        heads, budget = 2 * kv_heads, 16 if context <= 32768 else 32
        keys, values, tables = paged(sequences, context, kv_heads, size)
        query = torch.randn(sequences, heads, size, device="cuda", dtype=torch.bfloat16)
        store = empty_store(keys.shape, FarBlocks)
        ids = torch.arange(1, keys.shape[0], device="cuda")
        far_store.demote(keys, values, store, ids, ids)
        end = max(context - window, 0) // BLOCK
        per_row = [torch.full((sequences,), number, dtype=torch.int32, device="cuda") for number in (end, budget)]
        order = torch.arange(sequences, device="cuda")
        starts, lengths = torch.arange(sequences + 1, dtype=torch.int32), torch.full((sequences,), context, dtype=torch.int32)
        rule: dict[str, Any] = {"window": window, "refresh": refresh, "sink_blocks": sinks}
        plan = window_sparse.plan_sparse(tables, starts, lengths, far=None, block_tokens=BLOCK, **rule)
        there = starts.cuda(), lengths.cuda()

        def run(  # noqa: PLR0913, PLR0917
            query: Tensor = query, keys: Tensor = keys, values: Tensor = values, tables: Tensor = tables, store: Any = store,
            order: Tensor = order, per_row: list[Tensor] = per_row, plan: Any = plan, there: Any = there, budget: int = budget,
            rule: dict[str, Any] = rule,
        ) -> Tensor:  # fmt: skip
            chosen = choose_far.choose_far(query, store, tables, order, *per_row, sink_blocks=sinks, most=budget)
            far = ChosenFar(store, tables, *chosen, order)
            scale = query.shape[2] ** -0.5
            return window_sparse.window_sparse_attention(query, keys, values, tables, *there, far=far, scale=scale, **rule, plan=plan)

        candidates = max(end - sinks, 0)
        near = min(sinks, end) + context // BLOCK - end
        kept, compared, chosen = (min(many * budget, candidates) for many in (FIRST_STAGE, SECOND_STAGE, 1))
        # Bytes a feature: near in 16 bits; chosen keys and values, and keys that are compared, in 8; bounds of blocks and of their parts.
        features = 2 * near * BLOCK * 2 + 2 * chosen * BLOCK + compared * BLOCK + 2 * candidates + 2 * 4 * kept
        read = sequences * kv_heads * (size * features + 2 * BLOCK * (2 * chosen + compared))
        shape = {"sequences": sequences, "context": context, "head_dim": size, "kv_heads": kv_heads, "window": window, "far_blocks": budget}
        beside = partial(dense, query, keys, values, tables, context)
        yield Case("sparse_decode", shape, run, read, 0.0, peers={"ours_dense": beside})


def empty_store(shape: torch.Size, kind: Any) -> Any:
    """An int8 far store of blocks of this shape."""
    blocks, heads, tokens, size = shape
    data = [torch.empty(shape, dtype=torch.int8, device="cuda") for _ in range(2)]
    scales = [torch.empty((blocks, heads, tokens), dtype=torch.float16, device="cuda") for _ in range(2)]
    bounds = torch.empty((blocks, heads, 1 + tokens // 16, 2, size), dtype=torch.int8, device="cuda")
    return kind(*data, *scales, bounds, torch.empty((blocks, heads), dtype=torch.float16, device="cuda"))


def linear_cases() -> Iterator[Case]:
    """int8 products beside torch's bfloat16 product of the same shape."""
    from service.kernels.gpu import int8_linear

    for outputs, inputs in ((14336, 4096), (4096, 14336)):
        weight = torch.randint(-127, 128, (outputs, inputs), dtype=torch.int8, device="cuda")
        scales, plain = torch.rand(outputs, device="cuda") / 127, torch.randn(outputs, inputs, device="cuda", dtype=torch.bfloat16)
        for rows in (1, 16, 256, 1024, 4096):
            x = torch.randn(rows, inputs, device="cuda", dtype=torch.bfloat16)
            shape, moved = {"rows": rows, "outputs": outputs, "inputs": inputs}, outputs * inputs + 2 * rows * (inputs + outputs)
            beside = partial(partial, torch.matmul, x, plain.t())
            for name, rate in (("int8_linear", "int8_us"), ("weight_only_linear", "flops_us")):
                run = partial(getattr(int8_linear, name), x, weight, scales)
                yield Case(name, shape, run, moved, 2.0 * rows * outputs * inputs, rate, {"torch_bf16": beside})


def elementwise_cases() -> Iterator[Case]:
    """One pass over memory each, beside torch's."""
    from service.kernels import elementwise as plain
    from service.kernels.gpu import elementwise as ours

    weight = torch.randn(4096, device="cuda", dtype=torch.bfloat16)
    for rows in (32, 8192):
        x, residual = (torch.randn(rows, 4096, device="cuda", dtype=torch.bfloat16) for _ in range(2))
        wide, phase = torch.randn(rows, 2 * 14336, device="cuda", dtype=torch.bfloat16), torch.rand(rows, 64, device="cuda")
        calls: dict[str, tuple[tuple[Any, ...], float]] = {
            "rms_norm": ((x, weight, 1e-6), 2.0 * x.nbytes),
            "add_rms_norm": ((x, residual, weight, 1e-6), 4.0 * x.nbytes),
            "rotate": ((x.view(rows, 32, 128), phase.cos(), phase.sin()), 2.0 * x.nbytes),
            "swiglu": ((wide,), 1.5 * wide.nbytes),
        }
        for name, (arguments, moved) in calls.items():
            beside = partial(partial, getattr(plain, name), *arguments)
            yield Case(name, {"rows": rows}, partial(getattr(ours, name), *arguments), moved, 0.0, peers={"torch": beside})


def write_cases() -> Iterator[Case]:
    """Rotation of 32 query and 8 key heads and the write of keys and values, beside the same in two launches."""
    from service.kernels.gpu import elementwise, kv_store

    for rows in (32, 8192):
        heads = torch.randn(rows, 48, 128, device="cuda", dtype=torch.bfloat16)
        phase = torch.rand(rows, 64, device="cuda")
        angles, value = (phase.cos(), phase.sin()), heads[:, 40:]
        blocks = torch.zeros(2, rows // 64 + 2, 8, 64, 128, device="cuda", dtype=torch.bfloat16)
        places = *blocks, torch.arange(rows, device="cuda") // 64 + 1, torch.arange(rows, device="cuda") % 64

        def fused(heads: Tensor = heads, value: Tensor = value, angles: Any = angles, places: Any = places) -> Tensor:
            return kv_store.rotate_write(heads[:, :40], value, *angles, *places)

        def apart(heads: Tensor = heads, value: Tensor = value, angles: Any = angles, places: Any = places) -> Tensor:
            turned = elementwise.rotate(heads[:, :40], *angles)
            kv_store.write_kv(turned[:, 32:], value, *places)
            return turned[:, :32]

        yield Case("rotate_write", {"rows": rows}, fused, 2.0 * heads.nbytes, 0.0, peers={"two launches": partial(partial, apart)})


def check(run: Callable[[], Tensor], other: Callable[[], Tensor]) -> None:
    """Refuse to time what is wrong: `other` gives [B, H, L, D]."""
    found = run()
    expected = other().transpose(1, 2).reshape(found.shape)
    error = (found.float() - expected.float()).abs().max().item()
    if not error <= 0.02 * expected.float().abs().max().item():
        raise ValueError(f"a result is off by {error:.3g}: run make gpu-check")


CASES: dict[str, Callable[[], Iterator[Case]]] = {
    "attention": attention_cases,
    "sparse": sparse_cases,
    "linear": linear_cases,
    "elementwise": elementwise_cases,
    "write": write_cases,
}
