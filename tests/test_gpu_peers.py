"""Other libraries beside our attention, by stand-ins that take what is documented of their calls: they are given the same attention."""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from loadtests import gpu_attention_cases as attention
from loadtests import gpu_bench, gpu_cases, gpu_peers
from loadtests.gpu_attention_cases import Dense
from loadtests.gpu_cases import Place

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are interpreted without a device only")
CPU = Place("cpu", torch.float16)
DECODE = Dense(32, 2, 270, heads=4, kv_heads=2)
SHAPES = {
    "decode": DECODE,
    "decode of a window": replace(DECODE, window=100),
    "prefill": replace(DECODE, context=70, prefill=True),
    "prefill of a window": replace(DECODE, context=70, prefill=True, window=40),
}


def attend(query: Tensor, keys: Tensor, values: Tensor, reach: int) -> Tensor:
    """Causal attention of the last rows, query [R, Hq, D] over keys and values [L, Hkv, D]; each sees `reach` tokens before its own."""
    group, behind = query.shape[1] // keys.shape[1], torch.arange(len(query))[:, None] + len(keys) - len(query) - torch.arange(len(keys))
    seen = (behind >= 0) & ((behind <= reach) if reach >= 0 else True)
    wide = [x.double().repeat_interleave(group, 1).transpose(0, 1) for x in (keys, values)]
    scores = query.double().transpose(0, 1) @ wide[0].transpose(1, 2) * query.shape[2] ** -0.5
    return (scores.masked_fill(~seen, -torch.inf).softmax(2) @ wide[1]).transpose(0, 1).to(query.dtype)


@dataclass
class Wrapper:
    """FlashInfer's wrappers: pages by sequence, in the layout with heads before tokens."""

    workspace: Tensor
    layout: str
    use_tensor_cores: bool = False

    def plan(self, *given: Any, causal: bool = False, window_left: int = -1, q_data_type: torch.dtype, kv_data_type: torch.dtype) -> None:
        several = len(given) == 8
        assert self.layout == "HND" and self.use_tensor_cores != several and causal == several
        assert q_data_type == kv_data_type == torch.float16 and all(t.dtype == torch.int32 for t in given[: 3 + several])
        rows = given[0] if several else torch.arange(len(given[0]))
        self.planned = rows, *given[several : several + 3], window_left
        self.sizes = given[several + 3 :]

    def run(self, query: Tensor, cache: tuple[Tensor, Tensor]) -> Tensor:
        rows, pages, indices, last, reach = self.planned
        keys = cache[0]
        assert self.sizes == (query.shape[1], keys.shape[1], query.shape[2], keys.shape[2]) and indices.is_contiguous()
        found = []
        for number in range(len(last)):
            mine = indices[pages[number] : pages[number + 1]].long()
            length = (len(mine) - 1) * keys.shape[2] + int(last[number])
            tokens = [x[mine].transpose(1, 2).flatten(0, 1)[:length] for x in cache]
            found.append(attend(query[rows[number] : rows[number + 1]], *tokens, reach))
        return torch.cat(found)


def varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    causal: bool,
    window_size: tuple[int, int],
) -> Tensor:
    assert causal and max_seqlen_q == max_seqlen_k == 70 and cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32
    spans = [(slice(*cu_seqlens_q[at : at + 2]), slice(*cu_seqlens_k[at : at + 2])) for at in range(len(cu_seqlens_q) - 1)]
    return torch.cat([attend(q[rows], k[tokens], v[tokens], window_size[0]) for rows, tokens in spans])


def with_cache(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, *, cache_seqlens: Tensor, tables: Tensor, causal: bool, window_size: tuple[int, int]
) -> Tensor:
    assert causal and tables.dtype == cache_seqlens.dtype == torch.int32 and k_cache.stride(-1) == 1
    assert window_size in ((-1, -1), (window_size[0], 0))
    sequences = zip(q, tables.long(), cache_seqlens.tolist(), strict=True)
    return torch.stack(
        [attend(rows, *(x[table].flatten(0, 1)[:length] for x in (k_cache, v_cache)), window_size[0]) for rows, table, length in sequences]
    )


def paged_by_256(q: Tensor, k_cache: Tensor, v_cache: Tensor, *, block_table: Tensor, **options: Any) -> Tensor:
    assert k_cache.shape[1] % 256 == 0 and k_cache.is_contiguous()
    return with_cache(q, k_cache, v_cache, tables=block_table, **options)


def paged_by_any(q: Tensor, k_cache: Tensor, v_cache: Tensor, *, page_table: Tensor, **options: Any) -> Tensor:
    return with_cache(q, k_cache, v_cache, tables=page_table, **options)


STAND_INS: dict[str, dict[str, Any]] = {
    "flashinfer": {"BatchDecodeWithPagedKVCacheWrapper": Wrapper, "BatchPrefillWithPagedKVCacheWrapper": Wrapper},
    "flash_attn": {"flash_attn_varlen_func": varlen, "flash_attn_with_kvcache": paged_by_256},
    "flash_attn_interface": {"flash_attn_with_kvcache": paged_by_any},
}


@pytest.fixture
def libraries(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, functions in STAND_INS.items():
        module = ModuleType(name)
        vars(module).update(functions)
        monkeypatch.setitem(sys.modules, name, module)


@pytest.mark.parametrize("name", SHAPES)
def test_each_library_is_given_the_same_attention(name: str, libraries: None) -> None:
    case = attention.dense_case(CPU, SHAPES[name])
    assert set(gpu_peers.LIBRARIES) < set(case.peers)
    for library in gpu_peers.LIBRARIES:
        assert case.peers[library]()().isfinite().all()


class Clock:
    """Times nothing, but runs."""

    def times(self, run: Any) -> list[float]:
        run()
        return [2.0, 2.0]

    eager = times


MACHINE = {"bytes_us": 1e3, "flops_us": 1e3, "int8_us": 1e3}


def test_what_is_not_installed_is_a_word_in_the_row(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in STAND_INS:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    row = gpu_bench.row_of(attention.dense_case(CPU, replace(DECODE, context=70)), Clock(), MACHINE)  # type: ignore[arg-type]
    assert row["us"]["median"] == 2.0 and row["flex_attention_in_order"]["median"] == 2.0
    for name in gpu_peers.LIBRARIES:
        assert "import of flash" in row[name], row[name]


def test_a_library_that_computes_something_else_is_not_timed(libraries: None, monkeypatch: pytest.MonkeyPatch) -> None:
    right = Wrapper.run
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    monkeypatch.setattr(Wrapper, "run", lambda self, *given: right(self, *given) * 1.1)
    row = gpu_bench.row_of(attention.dense_case(CPU, replace(DECODE, context=70)), Clock(), MACHINE)  # type: ignore[arg-type]
    assert "another result" in row["flashinfer_paged"] and row["flash_attn_2"]["median"] == 2.0


def test_flex_attention_of_a_row_is_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    case = attention.dense_case(CPU, SHAPES["decode of a window"])
    gpu_cases.check(case.run, case.peers["flex_attention_in_order"]())


def test_attention_of_a_whole_step_is_the_sum_of_its_layers() -> None:
    shape = attention.Sparse(32, 2, 1, 576, 1, window=100)
    case, sparse = attention.total_case(CPU, shape, 3), attention.sparse_case(CPU, shape)
    dense = attention.dense_case(CPU, Dense(32, 1, 576, heads=4, kv_heads=2))
    assert case.moved_bytes == sparse.moved_bytes + 2 * dense.moved_bytes and case.flops == sparse.flops + 2 * dense.flops
    case.check()
    assert len(case.run()) == len(case.peers["ours_all_dense"]()()) == 3
    assert {(total.sequences, total.context) for total in attention.TOTALS} == {(32, 16384), (32, 131072)}
