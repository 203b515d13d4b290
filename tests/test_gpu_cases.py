"""Cases of `gpu_bench` at small shapes, interpreted on a fake device: what they count is what their kernels load and store, by address, and
they can be recorded and timed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("triton")

from triton.runtime.interpreter import GridExecutor, InterpreterBuilder

from loadtests import gpu_attention_cases as attention
from loadtests import gpu_bench, gpu_cases
from loadtests.gpu_attention_cases import Dense, Sparse
from loadtests.gpu_cases import Case, Place
from loadtests.gpu_peers import LIBRARIES
from tests.fake_cuda.device import DEVICE
from tests.fake_cuda.install import fake_cuda

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are interpreted without a device only")
HERE = Place("cuda", torch.float16)
DENSE = Dense(32, 2, 192, heads=4, kv_heads=2)
SPARSE = Sparse(32, 2, 1, 576, 1, window=100)


@pytest.fixture
def device() -> Iterator[None]:
    with fake_cuda():
        yield


class Traffic:
    """Addresses that launches load from and store to, each with its bytes, but for integers of 32 and 64 bits."""

    def __init__(self) -> None:
        self._seen: dict[str, dict[int, list[Any]]] = {"load": {}, "store": {}}

    def note(self, how: str, pointers: Any, mask: Any) -> None:
        kind = pointers.get_element_ty()
        size = kind.primitive_bitwidth // 8
        if not (kind.is_int() and size > 2):
            self._seen[how].setdefault(size, []).append(np.unique(pointers.data[mask.data]))

    @property
    def outer_bytes(self) -> int:
        """Bytes of what was loaded and is not a launch's own, and of what was stored for others than launches."""
        total = 0
        for size in self._seen["load"].keys() | self._seen["store"].keys():
            loaded, stored = (np.unique(np.concatenate(self._seen[how].get(size, [np.zeros(0, np.uint64)]))) for how in self._seen)
            total += size * len(np.setxor1d(loaded, stored))
        return total


@contextmanager
def counted() -> Iterator[Traffic]:
    """The traffic of what is launched inside; tensors given to launches live until the end, so that no address is used twice."""
    traffic, kept = Traffic(), []
    load, store, launch = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store, GridExecutor.__call__

    def noted_load(self: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
        traffic.note("load", pointers, mask)
        return load(self, pointers, mask, *rest)

    def noted_store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        traffic.note("store", pointers, mask)
        return store(self, pointers, value, mask, *rest)

    def held(self: Any, *arguments: Any, **options: Any) -> Any:
        kept.append(arguments)
        return launch(self, *arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(InterpreterBuilder, "create_masked_load", noted_load)
        patch.setattr(InterpreterBuilder, "create_masked_store", noted_store)
        patch.setattr(GridExecutor, "__call__", held)
        yield traffic


CASES: dict[str, Callable[[], Case]] = {
    "decode": lambda: attention.dense_case(HERE, DENSE),
    "decode of a window": lambda: attention.dense_case(HERE, replace(DENSE, window=100)),
    "decode of 8 bits": lambda: attention.dense_case(HERE, replace(DENSE, fp8=True)),
    "prefill": lambda: attention.dense_case(HERE, replace(DENSE, context=100, prefill=True)),
    "prefill of a window": lambda: attention.dense_case(HERE, replace(DENSE, context=100, prefill=True, window=50)),
    "int8": lambda: attention.sparse_case(HERE, replace(SPARSE, sequences=2)),
    "int4": lambda: attention.sparse_case(HERE, replace(SPARSE, store="int4")),
    "native": lambda: attention.sparse_case(HERE, replace(SPARSE, store="native")),
    "choice": lambda: attention.choice_case(HERE, SPARSE),
    "demotion": lambda: attention.demote_case(HERE, 3, 2, 32, "int8"),
    "demotion to 4 bits": lambda: attention.demote_case(HERE, 3, 2, 32, "int4"),
    "native demotion": lambda: attention.demote_case(HERE, 3, 2, 32, "native"),
    **{op: lambda op=op: gpu_cases.linear_case(HERE, op, 5, 70, 90) for op in ("int8_linear", "weight_only_linear", "ordered_linear")},  # type: ignore[misc]
    **{
        op: lambda op=op: gpu_cases.elementwise_case(HERE, op, 5, 4, 32)  # type: ignore[misc]
        for op in ("rms_norm", "add_rms_norm", "rotate", "swiglu", "head_gate")
    },
    "rotate_write": lambda: gpu_cases.write_case(HERE, 5, 4, 2, 32),
    "images": lambda: gpu_cases.image_case(HERE, 5, 6, 2, 16, 70),
    "sample": lambda: gpu_cases.sample_case(HERE, 3, 700, 0, 1.0),
    "sample filtered": lambda: gpu_cases.sample_case(HERE, 3, 700, 5, 0.9),
}


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("name", CASES)
def test_a_case_counts_the_bytes_that_its_kernels_cannot_do_without(name: str) -> None:
    case = CASES[name]()
    case.check()
    with counted() as traffic:
        result = case.run()
    assert traffic.outer_bytes == case.moved_bytes
    assert result is None or all(torch.isfinite(tensor).all() for tensor in (result if isinstance(result, tuple) else (result,)))
    for peer, make in case.peers.items():
        if peer not in ("flex_attention_in_order", *LIBRARIES):
            make()()


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("name", ["decode", "int8", "choice", "demotion", "int8_linear", "images", "sample"])
def test_a_case_is_timed_as_a_replay(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_bench, "FLUSH_BYTES", 1 << 10)
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    row = gpu_bench.row_of(CASES[name](), gpu_bench.Clock(1), {"bytes_us": 1e3, "flops_us": 1e3, "int8_us": 1e3})
    assert "failed" not in row and row["us"]["median"] == 1e3 == row["eager_us"]["median"] and len(DEVICE.graphs) >= 1, row
    assert all(isinstance(row[peer], dict) or "No module" in row[peer] for peer in row if peer.startswith(("torch", "ours"))), row


def test_flex_attention_sees_the_same_window(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    case = attention.dense_case(Place("cpu", torch.float16), replace(DENSE, sequences=1, context=100, prefill=True, window=50))
    gpu_cases.check(case.run, case.peers["flex_attention_in_order"]())


def test_tokens_that_rows_see_are_counted() -> None:
    rows = range(100)
    assert replace(DENSE, context=100, prefill=True, window=50).pairs == sum(len(range(max(row - 49, 0), row + 1)) for row in rows)
    assert replace(DENSE, context=100, prefill=True).pairs == 5050 and replace(DENSE, window=50).pairs == 50
    # Position 575 sees its window's 99 tokens before it from block 7 on, the sink block and one of 6.
    assert SPARSE.seen_tokens(575) == 576 - 7 * 64 + 2 * 64 and SPARSE.candidates(575) == 6
    assert SPARSE.seen_tokens(99) == 100 and SPARSE.seen_tokens(227) == 2 * 64 + 228 - 2 * 64


@pytest.mark.usefixtures("device")
def test_several_rows_move_what_one_of_them_does_at_least() -> None:
    shape = replace(SPARSE, context=580, rows=4, refresh=2)
    case = attention.sparse_case(HERE, shape)
    with counted() as traffic:
        assert case.run().isfinite().all()
    assert case.op == "sparse_prefill" and 0.5 * traffic.outer_bytes < case.moved_bytes <= traffic.outer_bytes
    assert case.flops == 4 * 4 * 32 * sum(map(shape.seen_tokens, range(576, 580)))


def test_shapes_of_the_device_are_sound_and_differ() -> None:
    assert list(gpu_bench.CASES) == ["attention", "sparse", "total", "far", "linear", "elementwise", "write", "images", "sample"]
    assert len(set(attention.DENSE)) == len(attention.DENSE) and len(set(attention.SPARSE)) == len(attention.SPARSE)
    for dense in attention.DENSE:
        assert dense.heads % dense.kv_heads == 0 and dense.read_tokens <= dense.context
    for sparse in attention.SPARSE:
        # The first row chooses, and there is more to choose from than is compared.
        assert sparse.anchors[0] % sparse.refresh == 0 and sparse.candidates(sparse.anchors[0]) > 4 * sparse.far_blocks
    assert {shape.store for shape in attention.SPARSE} == {store for *_, store in attention.DEMOTED} == {"int8", "int4", "native"}
