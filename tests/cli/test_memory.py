"""The printed budget against the memory that the processes hold once the KV blocks are populated; and a window's share by hand."""

from __future__ import annotations

import os
import re
import signal
import time
from pathlib import Path

import httpx
import pytest
import torch

from loadtests.shapes import write_shape
from service.engine.kv_pool import KvPool
from service.types.kv_layout import KvGroup, KvLayout
from tests.cli.conftest import Start

MIB = 1 << 20


def resident_bytes(pid: int) -> int:
    with open(f"/proc/{pid}/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def worker_of(parent: int) -> int:
    """The largest child of the front end."""
    children = [int(pid) for pid in Path(f"/proc/{parent}/task/{parent}/children").read_text().split()]
    return max(children, key=resident_bytes)


def printed_bytes(lines: list[str], name: str) -> float:
    [found] = [match[1] for line in lines if (match := re.fullmatch(rf"\s*{re.escape(name)}\s+([\d.]+) MiB.*", line))]
    return float(found) * MIB


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_what_is_printed_is_what_is_used(start: Start, tmp_path: Path) -> None:
    model = write_shape("llama-60m", tmp_path / "model")
    command = start("service.cli.serve", "--model", str(model), "--port", "0", "--dtype", "float32", "--kv_bytes", "1GiB")
    url = command.read_until("serving ").rpartition(" ")[2]
    total, front = printed_bytes(command.lines, "total"), printed_bytes(command.lines, "memory of the front end")
    command.read_until("try: ")
    for index in range(16):
        prompt = [(index * 977 + position * 31) % 30_000 + 300 for position in range(1_000)]
        body = {"model": "model", "prompt": prompt, "max_tokens": 1}
        assert httpx.post(f"{url}/v1/completions", json=body, timeout=200).status_code == 200
    worker = worker_of(command.process.pid)
    deadline = time.monotonic() + 120
    while resident_bytes(worker) < 0.95 * total and time.monotonic() < deadline:
        httpx.get(f"{url}/v1/models")  # blocks are populated while the worker is idle
    worker_now, front_now = resident_bytes(worker), resident_bytes(command.process.pid)
    print(f"worker {worker_now / MIB:.0f} of {total / MIB:.0f} MiB printed, front end {front_now / MIB:.0f} of {front / MIB:.0f} MiB")
    command.signal(signal.SIGINT)
    assert command.end()[0] == 0
    assert total >= 1 << 30
    assert abs(worker_now - total) <= 0.05 * total
    assert abs(front_now - front) <= 0.05 * total


def test_the_window_groups_bytes_are_those_computed_by_hand() -> None:
    """2 tensors of (9 + 1) blocks of 16 tokens, 3 heads of 8 numbers of 4 bytes, in 2 layers."""
    layout = KvLayout((KvGroup("full", (0,), 3, 8, 8), KvGroup("window20", (1, 2), 3, 8, 8, 20)), block_tokens=16)
    pool = KvPool(layout, (30, 9), torch.float32, torch.device("cpu"))
    by_hand = 2 * 10 * 16 * 3 * 8 * 4 * 2
    storages = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for layer in (1, 2) for tensor in pool.blocks_of(layer)
    }
    assert sum(storages.values()) == by_hand == layout.block_bytes(layout.groups[1], 4) * 10
    assert pool.reserved_bytes == by_hand + 2 * 31 * 16 * 3 * 8 * 4
