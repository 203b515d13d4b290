"""How many instructions compiled attention kernels execute for a chip that need not be here, counted by running them (see `ptx`).

Run as `python -m tests.kernels.gpu.executed 90`: one JSON object a line, case and kernel, kept with --keep. An instruction counts once
for each warp; a multiprocessor issues four a clock at most. They are those of PTX, which the assembler joins and doubles here and there.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator

import torch
import triton

from loadtests.rows import keep, surroundings
from tests.kernels.gpu.ptx import driver
from tests.kernels.gpu.ptx.machine import EXECUTED

# One sequence and K/V head with four heads of random queries, blocks of 64: a window of 512, a sink and 16 of 38 far blocks; or all.
CONTEXT, WINDOW, BUDGET, GROUP = 3008, 512, 16, 4


def cases() -> Iterator[tuple[str, int, int, Callable[[], object]]]:
    """(name, head_dim, tokens, what to run): a decoding row and a prompt's slice of 64 tokens, over one store and two."""
    from service.kernels.gpu import paged_attention, window_sparse
    from tests.kernels.conftest import make_batch
    from tests.kernels.sparse_batches import make_sparse

    for size in (64, 128):
        for tokens in (1, 64):
            shape = {"heads": GROUP, "kv_heads": 1, "size": size, "block_tokens": 64, "dtype": torch.bfloat16}
            sparse = make_sparse([CONTEXT], [tokens], window=WINDOW, budget=BUDGET, store="int8", **shape)
            yield "two stores", size, tokens, lambda batch=sparse: batch.run(window_sparse.window_sparse_attention)
            dense = make_batch([CONTEXT], [tokens], **shape)
            yield "dense", size, tokens, lambda batch=dense: batch.run(paged_attention.paged_attention)


def main() -> None:
    """Count, print, and keep where asked."""
    parser = argparse.ArgumentParser(description="Count the instructions that compiled attention kernels execute.")
    parser.add_argument("capability", type=int, choices=tuple(driver.SHARED_BYTES))
    parser.add_argument("--keep", action="store_true", help="append the rows to loadtests/results/gpu_executed.jsonl")
    options = parser.parse_args()
    driver.use(options.capability)
    for name, size, tokens, run in cases():
        EXECUTED.clear()
        run()
        for kernel, count in EXECUTED.items():
            row = {"case": name, "head_dim": size, "tokens": tokens, "kernel": kernel, "warp_instructions": count}
            row = {"capability": options.capability, "triton": triton.__version__, **row}
            print(json.dumps(row), flush=True)
            if options.keep:
                keep("gpu_executed", {**surroundings(), **row})


if __name__ == "__main__":
    main()
