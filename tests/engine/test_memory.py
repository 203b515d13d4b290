"""The memory plan: sizes against a recount by hand, windows, refusals with numbers, control groups; freed memory given back."""

from __future__ import annotations

import dataclasses
import mmap
import platform

import pytest
import torch

from service.engine.kv_pool import KvPool
from service.engine.memory import Usage, _group_room, available_bytes, plan_memory, resident_bytes, settled_bytes, workspace_bytes
from service.types.catalog import V2_3, V5_2
from service.types.errors import CapacityError
from service.types.kv_layout import FarSpec, FarStore
from service.types.model_spec import ModelSpec
from service.types.plan import LoadRequest

MIB = 1 << 20
PLENTY = Usage(10 * MIB, 200 * MIB, 64 << 30)


def full_spec(context: int = 4096) -> ModelSpec:
    spec = V2_3.spec(dict(V2_3.shapes)["nano"])
    return dataclasses.replace(spec, context_tokens=context)


def mixed_spec(context: int = 4096, window: int = 256) -> ModelSpec:
    """Every second layer sees a window."""
    spec = full_spec(context)
    windowed = dataclasses.replace(spec.layers[0], attention=dataclasses.replace(spec.layers[0].attention, window=window))
    return dataclasses.replace(spec, layers=tuple(windowed if at % 2 else layer for at, layer in enumerate(spec.layers)))


def planned(spec: ModelSpec, usage: Usage = PLENTY, **request):
    return plan_memory(spec, spec.kv_layout(), 4, LoadRequest("model", **request), usage)


def test_unbounded_memory_gives_every_row_its_full_context() -> None:
    spec = full_spec()
    plan = planned(spec, max_rows=8)
    assert plan.group_blocks == (8 * 64,)
    assert plan.context_tokens == 4096
    lines = dict(plan.lines)
    group = spec.kv_layout().groups[0]
    assert lines["kv:full"] == (8 * 64 + 1) * 64 * len(spec.layers) * group.kv_heads * 2 * group.key_dim * 4
    assert lines["weights"] == 10 * MIB
    assert lines["runtime"] == 200 * MIB
    assert plan.total_bytes == sum(lines.values())


def test_keys_and_values_may_have_a_type_of_their_own() -> None:
    whole = planned(full_spec(), max_rows=8)
    for kept, share in (("bfloat16", 2), ("fp8", 4)):
        narrow = planned(full_spec(), max_rows=8, kv_cache_dtype=kept)
        assert dict(narrow.lines) == dict(whole.lines) | {"kv:full": dict(whole.lines)["kv:full"] // share}


def test_eight_bits_with_scales_are_counted_to_the_byte() -> None:
    spec, request = full_spec(), LoadRequest("model", max_rows=8, kv_cache_dtype="int8")
    layout = spec.kv_layout().in_eight_bits()
    lines = dict(plan_memory(spec, layout, 4, request, PLENTY).lines)
    pool = KvPool(layout, (8 * 64,), torch.int8, torch.device("cpu"))
    assert lines["kv:full"] == pool.reserved_bytes
    head_dim = spec.layers[0].attention.head_dim
    assert pool.reserved_bytes * 4 * head_dim == dict(planned(spec, max_rows=8).lines)["kv:full"] * (head_dim + 4)


def test_bounded_memory_holds_twice_the_blocks_of_half_the_size() -> None:
    bounded = [planned(full_spec(), kv_bytes=20 * MIB, kv_cache_dtype=kept).group_blocks[0] for kept in ("auto", "float16")]
    assert bounded[1] == 2 * bounded[0] + 1


@pytest.mark.parametrize("store", [FarStore.INT8, FarStore.INT4, FarStore.EVICT])
def test_near_blocks_in_eight_bits_beside_far_ones_are_counted_to_the_byte(store: FarStore) -> None:
    shape = dataclasses.replace(dict(V5_2.shapes)["nano"], far=FarSpec(store=store))
    spec, request = V5_2.spec(shape), LoadRequest("model", max_rows=2, kv_cache_dtype="int8")
    layout, whole = spec.kv_layout().in_eight_bits(), spec.kv_layout()
    plan = plan_memory(spec, layout, 4, request, PLENTY)
    pool = KvPool(layout, plan.group_blocks, torch.int8, torch.device("cpu"), torch.float32)
    assert sum(size for name, size in plan.lines if name.startswith("kv:")) == pool.reserved_bytes
    for group, before in zip(layout.groups, whole.groups, strict=True):
        assert group.key_dim - before.key_dim == (0 if group.source is not None else 4)
    assert layout.sequence_bytes(8192, 1) < whole.sequence_bytes(8192, 2)
    with pytest.raises(CapacityError, match="int8 does not go with --kv_far bf16"):
        V5_2.spec(dataclasses.replace(shape, far=FarSpec(store=FarStore.NATIVE))).kv_layout().in_eight_bits()


def test_a_window_costs_its_window() -> None:
    plan = planned(mixed_spec(), max_rows=8, max_step_tokens=512)
    full, windowed = plan.group_blocks
    assert full == 8 * 64
    # Four blocks of window and one more for each row, and a chunk of 512 tokens for the step.
    assert windowed == 8 * 5 + 8


def test_an_explicit_size_is_used_up_and_not_exceeded() -> None:
    for size in (40 * MIB, 100 * MIB, 333 * MIB):
        spec = mixed_spec()
        plan = planned(spec, kv_bytes=size, max_rows=8)
        taken = sum(bytes_ for name, bytes_ in plan.lines if name.startswith("kv:"))
        largest = max(spec.kv_layout().block_bytes(group, 4) for group in spec.kv_layout().groups)
        assert size - 2 * largest <= taken <= size
        full, windowed = plan.group_blocks
        assert abs(full / 64 - (windowed - 8) / 5) <= 1 / 5  # as many longest sequences in one as in the other


def test_by_itself_it_takes_half_of_what_is_free() -> None:
    spec = full_spec()
    workspace = workspace_bytes(spec, 512, 64, 4)
    usage = Usage(10 * MIB, 0, 10 * MIB + workspace + 200 * MIB)
    plan = planned(spec, usage)
    taken = dict(plan.lines)["kv:full"]
    assert 98 * MIB < taken <= 100 * MIB


def test_the_models_own_context_shrinks_and_an_asked_one_is_refused() -> None:
    spec = full_spec()
    group = spec.kv_layout().groups[0]
    block = spec.kv_layout().block_bytes(group, 4)
    plan = planned(spec, kv_bytes=11 * block)
    assert (plan.context_tokens, plan.group_blocks) == (640, (10,))
    with pytest.raises(CapacityError, match=r"One sequence of 4096 tokens needs .* enough for 640 tokens"):
        planned(spec, kv_bytes=11 * block, context_tokens=4096)
    assert planned(spec, kv_bytes=11 * block, context_tokens=640).context_tokens == 640
    with pytest.raises(CapacityError, match="One sequence of 256 tokens"):
        planned(spec, kv_bytes=4 * block)
    with pytest.raises(CapacityError, match="the model has 4096"):
        planned(spec, context_tokens=4097)


def test_what_exceeds_the_machine_is_refused_with_numbers() -> None:
    with pytest.raises(CapacityError, match=r"10.0 MiB for weights.*1000.0 MiB for KV blocks, and 500.0 MiB are free"):
        planned(full_spec(), Usage(10 * MIB, 0, 500 * MIB), kv_bytes=1000 * MIB)
    with pytest.raises(CapacityError):
        planned(full_spec(), Usage(600 * MIB, 0, 500 * MIB))


def write_group(directory, limit: str, used: str, cache: str, names, key: str) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / names[0]).write_text(limit)
    (directory / names[1]).write_text(used)
    (directory / "memory.stat").write_text(f"anon 5\n{key} {cache}\n")


def test_limits_of_control_groups_are_found_at_every_level(tmp_path) -> None:
    names = ("memory.max", "memory.current")
    write_group(tmp_path / "pod" / "box", "max\n", "7\n", "0", names, "inactive_file")
    write_group(tmp_path / "pod", "1000\n", "700\n", "50", names, "inactive_file")
    assert _group_room(tmp_path, "0::/pod/box\n") == [350]
    old = ("memory.limit_in_bytes", "memory.usage_in_bytes")
    write_group(tmp_path / "memory" / "box", "500", "100", "20", old, "total_inactive_file")
    assert _group_room(tmp_path, "9:cpu:/box\n4:memory:/box\n") == [420]
    assert _group_room(tmp_path, "9:cpu:/box\n") == []


def test_this_machine_has_memory() -> None:
    assert 1 * MIB < resident_bytes() < available_bytes() + (64 << 30)
    # Pages of its own: the allocator could serve a block of bytes from what it already holds.
    with mmap.mmap(-1, 64 * MIB) as pages:
        before = resident_bytes()
        for _ in range(64):
            pages.write(bytes(MIB))
        assert resident_bytes() - before > 60 * MIB


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries have no call for it")
def test_holes_between_what_is_kept_are_given_back() -> None:
    blocks = [b"x" * (64 << 10) for _ in range(1024)]
    kept, full = blocks[::16], resident_bytes()
    del blocks
    assert resident_bytes() > full - 8 * MIB
    assert settled_bytes() < full - 50 * MIB
    assert all(block == b"x" * (64 << 10) for block in kept)
