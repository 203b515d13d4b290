"""Attention over near blocks in 8 bits and far blocks: every store, rule and instruction set, the same bits however work is cut."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from service.kernels import kv_store, reference_sparse, window_sparse
from service.kernels.native import window_sparse as kernel
from tests.kernels.conftest import needs_native
from tests.kernels.sparse_batches import SparseBatch, make_sparse

pytestmark = pytest.mark.usefixtures("nan_memory")
MIXED = ([77, 1, 96, 0, 21, 64, 130, 300], [1, 1, 30, 0, 21, 1, 3, 1])
STORES = ("int8", "int4", "evict")
# Where query rows and weights become steps of 8 bits too.
STEPS = ("avx512", "amx")


def narrow(batch: SparseBatch) -> SparseBatch:
    """The same batch with near blocks in 8 bits; poison is a scale of NaN over steps of 0."""
    keys, values = (kv_store.quantise_rows(blocks) for blocks in (batch.key_blocks, batch.value_blocks))
    return replace(batch, key_blocks=keys, value_blocks=values)


def expected(batch: SparseBatch) -> Tensor:
    """In float64, of what rows stand for."""
    wide = {name: kv_store.widen_rows(getattr(batch, name)).double() for name in ("key_blocks", "value_blocks")}
    return batch.run(query=batch.query.double(), **wide)


def check(found: Tensor, batch: SparseBatch, exact: bool) -> None:
    """Widening is exact to float32; with steps errors are 2 % of the largest value, 0.4 % on average."""
    error, largest = (found.double() - expected(batch)).abs(), 3.0
    assert torch.isfinite(found).all()
    worst, average = (1e-5, 1e-5) if exact else (0.02, 0.004)
    assert error.max() <= worst * largest and error.mean() <= average * largest, f"off by {error.max():.3g}, {error.mean():.3g} on average"


def run(batch: SparseBatch, **changes: Any) -> Tensor:
    return batch.run(kernel.window_sparse_attention, **changes)


@pytest.mark.parametrize("store", STORES)
def test_without_compiled_kernels_it_is_attention_over_what_rows_stand_for(store: str) -> None:
    batch = narrow(make_sparse(*MIXED, store=store))
    check(batch.run(window_sparse.window_sparse_attention), batch, exact=True)
    check(batch.run(reference_sparse.window_sparse_attention), batch, exact=True)


@needs_native
@pytest.mark.parametrize("store", STORES)
@pytest.mark.parametrize(("window", "refresh", "sinks"), [(20, 4, 1), (7, 1, 0), (63, 8, 3)])
def test_stores_and_rules(window: int, refresh: int, sinks: int, store: str, instructions: str) -> None:
    batch = narrow(make_sparse(*MIXED, store=store, window=window, refresh=refresh, sink_blocks=sinks))
    check(run(batch), batch, exact=instructions not in STEPS)


@needs_native
@pytest.mark.parametrize("store", ["int8", "int4"])
@pytest.mark.parametrize("shape", [(2, 2, 64, None, 64), (6, 2, 20, 12, 16), (7, 1, 80, None, 48), (8, 1, 128, None, 64)])
def test_head_shapes(shape: tuple[int, int, int, int | None, int], store: str, instructions: str) -> None:
    heads, kv_heads, size, value_size, block_tokens = shape
    sizes = {"heads": heads, "kv_heads": kv_heads, "size": size, "value_size": value_size, "block_tokens": block_tokens}
    batch = narrow(make_sparse([500, 230, 300], [1, 1, 40], store=store, window=70, **sizes))
    check(run(batch), batch, exact=instructions not in STEPS)


@needs_native
@pytest.mark.parametrize("scoring", [{"softcap": 1.5}, {"sink_logits": torch.tensor([0.5, -3.0, 4.0, 0.0])}])
def test_score_cap_and_sinks(scoring: dict[str, Any], instructions: str) -> None:
    batch = narrow(make_sparse(*MIXED, **scoring))
    check(run(batch), batch, exact=instructions not in STEPS)


@needs_native
@pytest.mark.parametrize("refresh", [1, 16])
@pytest.mark.parametrize("store", ["int8", "int4"])
def test_the_same_bits_in_one_pass_in_pieces_one_by_one_and_with_any_number_of_threads(store: str, refresh: int, instructions: str) -> None:
    shape = {"budget": 3, "refresh": refresh, "window": 130, "block_tokens": 64, "heads": 5, "kv_heads": 1, "size": 64}
    whole = narrow(make_sparse([420], [420], store=store, **shape))
    found = run(whole)
    assert whole.far is not None
    for start, end in ((100, 101), (410, 411), (333, 349), (5, 420)):
        starts, length = torch.tensor([0, end - start], dtype=torch.int32), torch.tensor([end], dtype=torch.int32)
        far = whole.far._replace(anchors=whole.far.anchors[start:end])
        part = run(whole, query=whole.query[start:end], far=far, query_starts=starts, context_lengths=length)
        assert torch.equal(part, found[start:end])
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert torch.equal(run(whole), found)
    finally:
        torch.set_num_threads(threads)


@needs_native
@pytest.mark.parametrize("wrong", ["near scale", "far scale", "choice"])
def test_teeth(wrong: str) -> None:
    batch = narrow(make_sparse([300, 130], [1, 1], budget=4))
    assert batch.far is not None
    changes: dict[str, Any] = {}
    if wrong == "near scale":
        changes["key_blocks"] = batch.key_blocks.clone()
        changes["key_blocks"][..., -4:] = (batch.key_blocks[..., -4:].contiguous().view(torch.float32) * 1.5).view(torch.int8)
    elif wrong == "far scale":
        scales = batch.far.blocks.value_scales
        assert scales is not None
        changes["far"] = batch.far._replace(blocks=batch.far.blocks._replace(value_scales=scales * 1.5))
    else:
        changes["far"] = batch.far._replace(choices=batch.far.choices[..., :1].expand_as(batch.far.choices))
    with pytest.raises(AssertionError, match="off by"):
        check(run(batch, **changes), batch, exact=False)
