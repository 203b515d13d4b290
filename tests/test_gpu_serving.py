"""The measurement of whole serving, on a CPU with tiny shapes: what is counted, beside what, and what is said when something is lacking."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from loadtests import gpu_bench, gpu_serving, in_process
from loadtests import rows as result_rows
from loadtests.gpu_cases import Case
from loadtests.gpu_serving import LLAMA_8B, TARGETS, Bench, Work
from loadtests.peers import ContinuousBatchingPeer, Run
from service.engine.torch_backend import TorchBackend
from service.types.errors import CapacityError
from service.types.plan import BatchPlan

CPU = torch.device("cpu")
SHORT = ["--device", "cpu", "--rounds", "1", "--steps", "6", "--step_tokens", "128"]
LIMITS = {"bytes_us": 1e4, "flops_us": 1e6, "int8_us": 2e6}


@pytest.fixture
def rows(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, dict[str, Any]]]:
    """Rows that were kept, by file; the machine's limits are given, not measured."""
    kept: list[tuple[str, dict[str, Any]]] = []
    for script in (gpu_serving, gpu_bench):
        monkeypatch.setattr(script, "keep", lambda name, row: kept.append((name, row)))
    monkeypatch.setattr(gpu_serving, "limits", lambda device, dtype: LIMITS)
    return kept


def bench(name: str) -> Bench:
    return Bench(TARGETS[name], gpu_serving.parse(SHORT))


def test_each_shape_gives_a_row_with_our_speed_its_limit_and_the_peer(rows: list[tuple[str, dict[str, Any]]]) -> None:
    assert gpu_serving.main([*SHORT, "--batches", "1", "3", "--keep"]) == 0
    assert [(name, row["shape"]) for name, row in rows] == [("gpu_serving", name) for name in TARGETS if name.startswith("tiny")]
    for _, row in rows:
        spec, context = TARGETS[row["shape"]].spec, TARGETS[row["shape"]].context
        assert row["device"] == "cpu" and row["dtype"] == "float32" and row["commit"] and row["torch_version"]
        for part, sequences in (("decode_1", 1), ("decode_3", 3)):
            found = row[part]
            assert found["sequences"] == sequences and found["prompt"] + found["generate"] == context
            assert found["prompt"] < found["context"] < context
            reads = spec.bytes_read(sequences, found["context"], 4, 4)
            assert found["limit_tokens_s"] == pytest.approx(sequences / (reads / 1e10), rel=1e-3)
            assert found["share_of_limit"] == pytest.approx(found["tokens_s"]["median"] / found["limit_tokens_s"], rel=1e-2)
            # Steps in which every sequence, and no prompt, had its token.
            assert found["engine_ms"]["rounds"] >= 6 and found["forwards"] == {}
        assert row["prefill"]["prompt"] == context - 1 and row["prefill"]["tokens_s"]["median"] > 0
        peers = [row[part]["transformers"] for part in ("prefill", "decode_1", "decode_3")]
        if TARGETS[row["shape"]].has_twin:
            assert all(isinstance(peer, dict) for peer in peers), peers
        else:
            assert peers == ["transformers has no twin of this shape"] * 3


def test_the_peer_computes_with_our_weights_and_gives_our_tokens() -> None:
    pytest.importorskip("transformers")
    one = bench("tiny-llama")
    plan, work = one.plan(3), Work(3, 40, 12)
    ours, theirs = one.ours(plan, work), one.peer(work)
    assert not isinstance(theirs, str), theirs
    assert len(ours.runs) == len(theirs) == 1
    assert [len(tokens) for tokens in ours.runs[0].tokens] == [12] * 3
    assert theirs[0].tokens == ours.runs[0].tokens
    assert all(len(times) == 12 and times == sorted(times) and times[0] > theirs[0].began_s for times in theirs[0].times_s)


def test_a_peer_that_fails_leaves_its_reason(monkeypatch: pytest.MonkeyPatch, rows: list[tuple[str, dict[str, Any]]]) -> None:
    pytest.importorskip("transformers")

    def fail(self: ContinuousBatchingPeer, texts: list[tuple[int, ...]], generate: int) -> Run:
        raise RuntimeError("no room\nand more")

    monkeypatch.setattr(ContinuousBatchingPeer, "run", fail)
    assert gpu_serving.main([*SHORT, "--shapes", "tiny-llama", "--batches", "2", "--keep"]) == 0
    [(_, row)] = rows
    assert row["decode_2"]["transformers"] == row["prefill"]["transformers"] == "no room"
    assert row["decode_2"]["tokens_s"]["median"] > 0 and "ratio" not in row["decode_2"]


def test_an_engine_that_fails_leaves_its_reason(monkeypatch: pytest.MonkeyPatch, rows: list[tuple[str, dict[str, Any]]]) -> None:
    def fail(self: TorchBackend, plan: BatchPlan) -> None:
        raise MemoryError("one token does not fit into memory")

    monkeypatch.setattr(TorchBackend, "execute", fail)
    assert gpu_serving.main([*SHORT, "--shapes", "tiny-v5.2", "--batches", "1", "--keep"]) == 0
    assert rows[0][1]["prefill"] == rows[0][1]["decode_1"] == "MemoryError: one token does not fit into memory"


def test_fewer_sequences_run_where_memory_is_short(monkeypatch: pytest.MonkeyPatch) -> None:
    one = bench("tiny-v5.2")
    whole, _ = one.plan(64)
    layout, context = TARGETS["tiny-v5.2"].spec.kv_layout(), TARGETS["tiny-v5.2"].context
    monkeypatch.setattr(in_process, "available_bytes", lambda: 24 * layout.sequence_bytes(context, 4))
    fewer, memory = one.plan(64)
    assert whole.max_rows == 64 > fewer.max_rows > 4
    assert all(
        blocks >= fewer.max_rows * layout.blocks_for(group, context)
        for blocks, group in zip(memory.group_blocks, layout.groups, strict=True)
    )
    monkeypatch.setattr(in_process, "available_bytes", lambda: 1000)
    with pytest.raises(CapacityError):
        one.plan(64)


def test_limits_are_the_reads_of_a_step_and_the_products_of_a_prompt() -> None:
    assert LLAMA_8B.parameters == 8_030_261_248
    weights, token = 2 * (LLAMA_8B.parameters - 128_256 * 4096 - 65 * 4096), 32 * 2 * 8 * 128 * 2
    for sequences, context in ((1, 1000.0), (256, 900.0)):
        seconds = (weights + sequences * context * token) / 4e12
        assert gpu_serving.decode_limit(LLAMA_8B, sequences, context, 2, 4e6) == pytest.approx(sequences / seconds)
    work = Work(16, 1023, 1)
    products = 2 * 1023 * (weights / 2 - 128_256 * 4096) + 2 * 128_256 * 4096 + 4 * 1023 * 511.5 * 32 * 4096
    assert gpu_serving.prefill_limit(LLAMA_8B, work, 8e8) == pytest.approx(1023 / products * 8e14)


def test_the_two_v5_2_differ_in_what_they_read_alone() -> None:
    sparse, full = TARGETS["v5.2"].spec, TARGETS["v5.2-full"].spec
    assert sparse.parameters == full.parameters and {layer.attention.window for layer in full.layers} == {None}
    read = [spec.bytes_read(1, 16_000, 2, 2) - 2 * spec.matmul_parameters for spec in (sparse, full)]
    assert read[1] == 24 * 8 * 2 * 64 * 2 * 16_000 and 4 < read[1] / read[0] < 7


def test_decode_is_counted_while_all_decode_and_bursts_do_not_matter() -> None:
    # Two sequences, a token every 10 ms each; the second starts late and its tokens come two at a time.
    early = [0.1 + 0.01 * index for index in range(20)]
    late = [0.2 + 0.02 * (index // 2) for index in range(20)]
    run = Run(0.0, [early, late], [[0] * 20, [0] * 20])
    assert gpu_serving.together(run) == [(10, 19), (0, 9)]
    assert gpu_serving.decode_rate(run) == pytest.approx(9 / 0.09 + 9 / 0.08)
    assert gpu_serving.context_of(run, Work(2, 100, 20)) == pytest.approx(100 + (14.5 + 4.5) / 2)
    assert gpu_serving.prefill_rate(run, Work(2, 100, 20)) == pytest.approx(200 / 0.2)
    with pytest.raises(ValueError, match="--steps"):
        gpu_serving.decode_rate(Run(0.0, [early, [time + 1 for time in late]], run.tokens))


def test_the_first_sequences_decode_until_the_last_prompt_is_done() -> None:
    assert Work.decoding(256, 1024, 2048, 64) == Work(256, 832, 192)
    assert Work.decoding(1, 16_384, 2048, 64).context == 16_384
    with pytest.raises(ValueError, match="--step_tokens"):
        Work.decoding(256, 1024, 256, 64)
    assert len({prompt for seed in (0, 1) for prompt in Work(3, 40, 2).prompts(331, seed)}) == 6


def test_what_is_missing_is_said_and_the_kernels_rows_stay(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], rows: list[tuple[str, dict[str, Any]]]
) -> None:
    monkeypatch.setattr(gpu_serving, "find_spec", lambda name: None if name in gpu_serving.NEEDED else object())
    assert gpu_serving.main(SHORT) == 2
    said = "gpu_serving: serving is not measured, because msgspec and prometheus_client cannot be imported here\n"
    assert capsys.readouterr().err == said
    on_a_device(monkeypatch, {"one": lambda: iter([Case("copy", {}, lambda: 2.0, 1e4, 0.0)])})
    assert gpu_bench.main() == 2 and capsys.readouterr().err == said
    assert [(name, row["op"], row["share_of_limit"]) for name, row in rows] == [("gpu", "copy", 0.5)]


def on_a_device(monkeypatch: pytest.MonkeyPatch, cases: dict[str, Any]) -> None:
    """A clock that believes what is run, and limits that are given."""
    times = {name: lambda self, run: [run()] for name in ("times", "eager")}
    monkeypatch.setattr(gpu_bench, "Clock", type("Clock", (), {"__init__": lambda self, rounds: None, **times}))
    monkeypatch.setattr(gpu_bench, "limits", lambda clock: LIMITS)
    monkeypatch.setattr(gpu_bench, "CASES", cases)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a device")
    monkeypatch.setattr("sys.argv", ["gpu_bench", "--keep"])


def test_what_fails_on_a_device_is_a_row_and_the_rest_goes_on(
    monkeypatch: pytest.MonkeyPatch, rows: list[tuple[str, dict[str, Any]]]
) -> None:
    """Whatever is raised: by a kernel, by a check of its result, while a peer is made or runs, while a case is made."""

    def fail() -> float:
        raise OverflowError("too many registers")

    def ending() -> Iterator[Case]:
        yield Case("first", {}, lambda: 4.0, 1e4, 0.0)
        raise KeyError("no memory")

    peers = {"made": lambda: lambda: 3.0, "not made": fail, "not run": lambda: fail}
    cases = [
        Case("sound", {}, lambda: 2.0, 1e4, 2e7, "int8_us", peers),
        Case("slow", {}, fail, 1.0, 0.0, peers={"made": peers["made"]}),
        Case("wrong", {}, lambda: 1.0, 1.0, 0.0, check=fail),
    ]
    on_a_device(monkeypatch, {"one": lambda: iter(cases), "two": ending, "three": lambda: iter([Case("last", {}, lambda: 5.0, 1e4, 0.0)])})
    gpu_bench.kernels(["one", "two", "three"], 1, kept=True)
    found = [row for _, row in rows]
    assert [row["op"] for row in found] == ["sound", "slow", "wrong", "first", "two", "last"]
    sound = found[0]
    assert sound["us"]["median"] == sound["eager_us"]["median"] == 2.0 and sound["made"]["median"] == 3.0
    assert sound["limit_us"] == 2e7 / LIMITS["int8_us"] and sound["share_of_limit"] == sound["limit_us"] / 2
    assert sound["not made"] == sound["not run"] == found[1]["failed"] == found[2]["failed"] == "too many registers"
    assert found[1]["made"]["median"] == 3.0 and "us" not in found[2] and found[4]["failed"] == "'no memory'"


def test_a_row_is_kept_and_names_its_commit_where_no_history_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert result_rows.surroundings()["commit"] == "unknown"
    monkeypatch.setenv("ROWS_COMMIT", "0123456789ab")
    assert result_rows.surroundings()["commit"] == "0123456789ab"
    monkeypatch.setattr(result_rows, "RESULTS", tmp_path / "deep" / "results")
    assert result_rows.keep("some", {"a": 1}).read_text(encoding="utf-8") == '{"a": 1}\n'


def test_random_weights_serve_as_loaded_ones_do() -> None:
    spec = replace(TARGETS["tiny-v5.2"].spec, tied_embeddings=False)
    decoder, weights = in_process.random_decoder(spec, CPU, torch.float32)
    again, _ = in_process.random_decoder(spec, CPU, torch.float32)
    assert sum(math.prod(weight.shape) for weight in weights.values()) == spec.parameters
    hidden = torch.randn(2, spec.dim)
    assert torch.equal(decoder.logits(hidden), again.logits(hidden)) and decoder.logits(hidden).isfinite().all()
    assert decoder.head is not None and decoder.head.weight is None, "linears are packed"
